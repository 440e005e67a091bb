"""Uploading files to the hub: what would change there, and one commit that changes it.

Only an explicit command comes here. Large files go up first; nothing is seen before the commit.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mule import fsio, progress
from mule.errors import UserError
from mule.hub.explain import explaining, is_away
from mule.hub.repo import Listing, Repo, look
from mule.hub.token import TOKENS_PAGE, token

Change = Literal["new", "replaces", "same"]
_REFUSED = (401, 403)
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Upload:
    """A file to be in the repository, and what that changes there."""

    file: Path
    size_bytes: int
    change: Change


def require_token(repo: Repo) -> None:
    """UserError unless there is a token to upload with, and the hub may be asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{repo.name}: nothing can be uploaded while HF_HUB_OFFLINE is set",
            "unset HF_HUB_OFFLINE",
        )
    if not (token() or get_token()):
        raise UserError(
            f"{repo.name}: uploading needs a token that may write",
            f"make one at {TOKENS_PAGE}, then set HF_TOKEN, or write HF_TOKEN=... into .env",
        )


def find(repo: Repo) -> Listing | None:
    """What the repository holds now; None where the hub shows none of this name."""
    from huggingface_hub import errors

    with explaining_upload(repo):
        try:
            return look(repo)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return None


def changes(files: Sequence[Path], listing: Listing | None) -> list[Upload]:
    """What uploading `files`, under their own names, changes."""
    found = []
    for file in files:
        there = listing.files.get(file.name) if listing else None
        change: Change = "new"
        if there is not None:
            known = there.sha256 or there.git_oid
            ours = fsio.sha256_file(file) if there.sha256 else git_oid(file)
            change = "same" if known == ours else "replaces"
        found.append(Upload(file, file.stat().st_size, change))
    return found


def upload(
    repo: Repo, uploads: Sequence[Upload], listing: Listing | None, *, private: bool, message: str
) -> str:
    """Make the repository if `listing` is None, upload, and commit; the commit's name.

    Fails where someone else committed since `listing`, so that nothing is replaced unseen.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    disable_progress_bars()
    api = HfApi(token=token())
    changed = [each for each in uploads if each.change != "same"]
    total = sum(each.size_bytes for each in changed)
    additions = [CommitOperationAdd(each.file.name, str(each.file)) for each in changed]
    with (
        explaining_upload(repo),
        progress.task(f"Uploading to {repo.name}", total=total, unit="B") as bar,
    ):
        if listing is None:
            api.create_repo(repo.name, private=private or None, repo_type="model")
        for each, addition in zip(changed, additions, strict=True):
            api.preupload_lfs_files(repo.name, [addition], free_memory=False)
            bar.advance(each.size_bytes)
        commit: Any = api.create_commit(
            repo.name,
            additions,
            commit_message=message,
            parent_commit=listing.commit if listing else None,
        )
    return str(commit.oid)


def git_oid(file: Path) -> str:
    """The name that git gives to the content of a file."""
    found = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with open(file, "rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


@contextlib.contextmanager
def explaining_upload(repo: Repo) -> Iterator[None]:
    """Errors of the hub's library, said for somebody who uploads."""
    from huggingface_hub import errors

    with explaining(repo, repo.name):
        try:
            yield
        except errors.HfHubHTTPError as error:
            code = error.response.status_code
            if code in _REFUSED and not isinstance(error, errors.RepositoryNotFoundError):
                raise UserError(
                    f"{repo.name}: your token may not write there ({code})",
                    f"give it the right to write at {TOKENS_PAGE}, or name another ORG/NAME",
                ) from None
            if code in (409, 412):
                raise UserError(
                    f"{repo.name}: it was changed by somebody else in the meantime ({code})",
                    "give the command again: it shows what would be replaced now",
                ) from None
            if is_away(error):
                raise _away(repo) from None
            raise
        except errors.HTTPError as error:
            raise _away(repo) from error


def _away(repo: Repo) -> UserError:
    return UserError(
        f"{repo.name}: the hub cannot be reached, or is overloaded",
        "give the command again later: what went up is not sent again, and nothing was changed",
    )
