"""Datasets of the Hugging Face hub: fetched once, kept in its cache, pinned to a commit."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio, progress
from mule.data.sources.files import COMPRESSIONS, SUFFIXES
from mule.errors import UserError

# A revision is a branch, tag or commit, or a name with slashes such as refs/convert/parquet.
_ADDRESS = re.compile(
    r"(?:hf:/{1,2}datasets/)?(?P<repo>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/@]+))?(?:/(?P<inside>.+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class HubAddress:
    """ORG/NAME, the revision asked for ("" is the newest), and a file or folder inside or ""."""

    repo: str
    revision: str
    inside: str

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Raises UserError."""
        match = _ADDRESS.fullmatch(text.rstrip("/"))
        if match is None or ".." in (match["inside"] or "").split("/"):
            raise UserError(
                f"{text}: not the address of a hub dataset",
                "write hf://datasets/ORG/NAME, hf://datasets/ORG/NAME@REVISION or "
                "hf://datasets/ORG/NAME/FILE",
            )
        return cls(match["repo"], match["revision"] or "", match["inside"] or "")

    def at(self, commit: str) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        return f"hf://datasets/{self.repo}@{commit}{inside}"

    def patterns(self) -> list[str]:
        """Which files of the repository are wanted, as patterns."""
        if self.inside.lower().endswith((*SUFFIXES, *COMPRESSIONS)):
            return [self.inside]
        below = f"{self.inside}/*" if self.inside else "*"
        return [f"{below}{suffix}{packed}" for suffix in SUFFIXES for packed in ("", *COMPRESSIONS)]


@functools.cache  # one commit for the whole run, told once
def fetch(text: str) -> Path:
    """The file or folder that a hub address means, in the cache. Raises UserError.

    Without network, or with HF_HUB_OFFLINE=1, the copy in the cache is used.
    """
    address = HubAddress.parse(text)
    folder = _snapshot(text, address)
    commit = folder.name
    found = folder / address.inside if address.inside else folder
    if not found.exists():
        raise UserError(
            f"{text}: no data file there at commit {commit[:12]}",
            f"look at https://huggingface.co/datasets/{address.repo}/tree/{commit}",
        )
    if not _COMMIT.fullmatch(address.revision):
        progress.note(
            f"{address.repo} is at commit {commit}; to use exactly this one again, write "
            f"{address.at(commit)}"
        )
    return found


def _snapshot(text: str, address: HubAddress) -> Path:
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what matters of its warnings is in our messages
    revision = address.revision or "main"
    try:
        num_bytes = _require_space(address, revision)
        with progress.task(f"Fetching {address.repo}", total=num_bytes or None, unit="B") as bar:
            folder = snapshot_download(
                address.repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=address.patterns(),
                ignore_patterns=["README*", "*/README*"],
                tqdm_class=_bar_class(bar),
            )
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise _explained(text, address, error) from None
    return Path(folder)


def _require_space(address: HubAddress, revision: str) -> int:
    """Bytes of the wanted files. Raises StorageError when they do not fit beside the cache.

    0 where the hub cannot be asked: the cache alone decides then.
    """
    from huggingface_hub import HfApi, constants, errors
    from huggingface_hub.utils import filter_repo_objects

    if _COMMIT.fullmatch(revision) or constants.HF_HUB_OFFLINE:
        return 0
    try:
        info = HfApi().dataset_info(address.repo, revision=revision, files_metadata=True)
    except (OSError, errors.HTTPError):
        return 0  # snapshot_download meets the same error, and knows the cache
    files = filter_repo_objects(
        info.siblings or [], allow_patterns=address.patterns(), key=lambda file: file.rfilename
    )
    num_bytes = sum(file.size or 0 for file in files)
    fsio.require_space(constants.HF_HUB_CACHE, num_bytes, f"{address.repo} (all its data files)")
    return num_bytes


def _explained(text: str, address: HubAddress, error: Exception) -> UserError:
    from huggingface_hub import constants, errors

    page = f"https://huggingface.co/datasets/{address.repo}"
    if isinstance(error, errors.GatedRepoError):
        message = "its owner asks you to accept terms first"
        hint = f"accept them at {page}, then set HF_TOKEN (https://huggingface.co/settings/tokens)"
    elif isinstance(error, errors.RevisionNotFoundError):
        message = f"the dataset has no revision {address.revision!r}"
        hint = f"see its branches and commits at {page}/commits/main"
    elif isinstance(error, errors.RepositoryNotFoundError):
        message = "neither a file or folder here nor a dataset on the hub (or a private one)"
        hint = "check the name; for a private dataset set HF_TOKEN"
    elif isinstance(error, errors.HFValidationError):
        message, hint = "not a valid name of a hub dataset", "write ORG/NAME"
    elif constants.HF_HUB_OFFLINE:
        message = "neither a file or folder here nor in the hub cache, and HF_HUB_OFFLINE is set"
        hint = "fetch it once with network (unset HF_HUB_OFFLINE), or give a local file"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        message = "the hub cannot be reached, and its cache does not hold this dataset"
        hint = "check the network, or give a local file"
    else:
        message = f"it could not be fetched ({(str(error).splitlines() or [repr(error)])[0]})"
        hint = "try again later, or download the files by hand"
    return UserError(f"{text}: {message}", hint)


def _bar_class(bar: progress.Task) -> type[Any]:
    """A tqdm that shows nothing itself and tells `bar` of the bytes written."""
    from tqdm import tqdm

    class Told(tqdm):
        def __init__(self, *items: Any, **options: Any) -> None:
            options["disable"] = True
            super().__init__(*items, **options)
            self._counts = str(options.get("desc", "")).startswith("Reconstruct")

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts:
                bar.advance(n or 0)
            return super().update(n)

    return Told
