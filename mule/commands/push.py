"""`mule push`: an export goes to the Hugging Face hub, after its files were checked and shown."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import CheckFailed, UserError

if TYPE_CHECKING:
    from mule.hub.push import Upload
    from mule.hub.repo import Listing, Repo

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_TEXT_BYTES = 4_000_000  # of a file that is looked through for what is private
_BINARY = (".gguf", ".safetensors")


@dataclass(frozen=True)
class Plan:
    """What a push would do; `listing` is None where the repository is made anew."""

    folder: Path
    repo: Repo
    uploads: Sequence[Upload]
    listing: Listing | None
    private: bool
    left_out: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        return {
            "repo": self.repo.name,
            "page": self.repo.page,
            "is_new": self.listing is None,
            "private": self.listing.private if self.listing else self.private,
            "files": [
                {"file": each.file.name, "size_bytes": each.size_bytes, "change": each.change}
                for each in self.uploads
            ],
            "left_out": list(self.left_out),
        }


def plan(folder: Path, name: str, *, private: bool = False, unverified: bool = False) -> Plan:
    """Check the export in `folder` and ask the hub what is there; nothing is changed.

    Raises UserError for a folder that is no export or was not verified, and for what must not be
    passed on; CheckFailed where a file is not what was exported.
    """
    from mule.export.record import SUMS, read_record, read_sums, write_sums
    from mule.hub.push import changes, find, require_token
    from mule.hub.repo import Repo

    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name of a repository", "write ORG/NAME, or YOU/NAME")
    record = read_record(folder)
    if record is None or not (folder / SUMS).is_file():
        raise UserError(
            f"{folder} is no export of Mule's",
            "write one: mule export RUN, or mule export RUN --hf",
        )
    if not unverified:
        _require_verified(folder, record)
    _check_sums(folder, read_sums(folder))
    write_sums(folder, record)  # a card that was edited is passed on as it is
    files = [folder / each for each in (*read_sums(folder), SUMS)]
    _require_public(files)
    repo = Repo("model", name)
    require_token(repo)
    listing = find(repo)
    if private and listing is not None and not listing.private:
        raise UserError(
            f"{name} exists and is public: --private is for a new one",
            f"make it private in its settings ({repo.page}/settings), or name a new one",
        )
    there = {file.name for file in folder.iterdir() if file.is_file()}
    left_out = sorted(there - {file.name for file in files} - {"manifest.json"})
    return Plan(folder, repo, changes(files, listing), listing, private, left_out)


def run(found: Plan) -> dict[str, Any]:
    """Upload what was planned, in one commit."""
    from mule.hub.push import upload

    told = found.as_dict()
    if all(each.change == "same" for each in found.uploads):
        return told | {"commit": found.listing.commit if found.listing else None}
    commit = upload(
        found.repo,
        found.uploads,
        found.listing,
        private=found.private,
        message="Upload with Mule",
    )
    return told | {"commit": commit}


def _require_verified(folder: Path, record: dict[str, Any]) -> None:
    for entry in record["files"]:
        check = entry.get("check")
        if check is None:
            raise UserError(
                f"{folder / entry['file']} was not verified",
                f"mule verify {folder}; or push it as it is: --unverified",
            )
        if not check["ok"]:
            raise UserError(
                f"{folder / entry['file']}: {check['verdict']}",
                f"mule verify {folder} shows all; or push it as it is: --unverified",
            )


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    """CheckFailed unless the weights are those that were exported and verified."""
    from mule import fsio, progress

    total = sum((folder / name).stat().st_size for name in sums if (folder / name).is_file())
    with progress.task("Checking the files", total=total, unit="B") as bar:
        for name, known in sums.items():
            file = folder / name
            if not file.is_file():
                raise CheckFailed(f"{file} is missing", "export again")
            same = fsio.sha256_file(file, bar.advance) == known
            if not same and file.suffix in _BINARY:
                raise CheckFailed(
                    f"{file} is not what was exported: its SHA-256 is another",
                    "export again, and verify it",
                )
            if not same:
                progress.note(f"{file} was changed by hand: it is uploaded as it is")


def _require_public(files: Sequence[Path]) -> None:
    """UserError for a text that holds a token, or the way to this user's folders."""
    from huggingface_hub import get_token

    from mule.hub.token import token

    home = str(Path.home())
    secrets = {"your token": token() or get_token()}
    if len(Path(home).parts) > 2:  # /home/name, not /root
        secrets["the path of your home folder"] = home + os.sep
    for file in files:
        if file.suffix in _BINARY or file.stat().st_size > _MAX_TEXT_BYTES:
            continue
        text = file.read_bytes().decode("utf-8", errors="replace")
        for what, secret in secrets.items():
            if secret and secret in text:
                raise UserError(f"{file} holds {what}", "take it out, then push again")
