"""A repository of the hub: its name and revision, what it holds, and where the cache keeps it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mule import fsio
from mule.hub.token import token

HOME = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Repo:
    """ORG/NAME, and the branch, tag or commit wanted of it ("" is main)."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str = ""

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    @property
    def page(self) -> str:
        return f"{HOME}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def at(self, commit: str) -> Repo:
        return replace(self, revision=commit)

    def storage(self) -> Path:
        """Its folder in the cache, with blobs/, refs/ and snapshots/COMMIT/."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"{self.kind}s--{self.name.replace('/', '--')}"

    def cached(self) -> Path | None:
        """The snapshot in the cache, whole or not; None when nothing of the revision is there."""
        ref = self.storage() / "refs" / (self.revision or "main")
        commit = self.revision
        if not self.is_pinned:
            commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
        folder = self.storage() / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def remember(self, commit: str) -> None:
        """Note in the cache what the revision names now, for when the hub cannot be asked."""
        if not self.is_pinned:
            fsio.write_text(self.storage() / "refs" / (self.revision or "main"), commit)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the hub; the SHA-256 is known of large ones only."""

    num_bytes: int
    sha256: str | None
    git_oid: str | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit, and the models its card says it was made from."""

    commit: str
    files: dict[str, RemoteFile]
    bases: tuple[str, ...]
    private: bool = False


def address_of(folder: Path) -> tuple[str, str] | None:
    """(ORG/NAME, commit) of a model's folder in the cache; None for any other folder."""
    kind, *words = folder.parent.parent.name.split("--")
    if folder.parent.name != "snapshots" or kind != "models" or len(words) != 2:
        return None
    return "/".join(words), folder.name


# ---------------------------------------------------------------- asking


def look(repo: Repo) -> Listing:
    """What the hub says of the repository; raises huggingface_hub's errors."""
    from huggingface_hub import HfApi

    api = HfApi(token=token())
    ask: Callable[..., Any] = api.model_info if repo.kind == "model" else api.dataset_info
    info = ask(repo.name, revision=repo.revision or "main", files_metadata=True)
    files = {
        file.rfilename: RemoteFile(
            file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id
        )
        for file in info.siblings or []
    }
    bases = (info.card_data.get("base_model") if info.card_data else None) or ()
    named = (bases,) if isinstance(bases, str) else tuple(bases)
    return Listing(info.sha, files, named, bool(info.private))


def chosen(
    listing: Listing, allow: Sequence[str], ignore: Sequence[str] = ()
) -> dict[str, RemoteFile]:
    """The files of a listing that fit the patterns."""
    from huggingface_hub.utils import filter_repo_objects

    names = filter_repo_objects(
        listing.files, allow_patterns=list(allow), ignore_patterns=list(ignore)
    )
    return {name: listing.files[name] for name in names}
