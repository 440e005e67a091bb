"""The user's token for gated and private repositories; never logged, never written."""

from __future__ import annotations

import os
import re
from contextvars import ContextVar
from pathlib import Path

from mule.errors import UserError

TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_ENV_LINE = re.compile(r"(?:export\s+)?HF_TOKEN\s*=\s*(?P<quote>['\"]?)(?P<value>.*?)(?P=quote)\s*")

_env_folder: ContextVar[Path | None] = ContextVar("env_folder", default=None)


def look_for_token_in(folder: Path) -> None:
    """Also look for a `.env` in `folder`, that of the recipe; without it only in the current one."""
    _env_folder.set(folder)


def token() -> str | None:
    """HF_TOKEN of a `.env`; None leaves it to the library: the environment, else its own login.

    Nothing else of the file is read. Raises UserError when the value cannot be a token.
    """
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return None
    beside = _env_folder.get()
    for folder in ([beside] if beside else []) + [Path()]:
        if (found := _token_in(folder / ".env")) is not None:
            return found
    return None


def has_token() -> bool:
    """Whether there is one: in a `.env`, the environment or the library's login. Asks nobody.

    Raises UserError as `token` does.
    """
    from huggingface_hub import constants

    if token() or os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    login = Path(constants.HF_TOKEN_PATH)
    return login.is_file() and bool(login.read_text(encoding="utf-8", errors="replace").strip())


def _token_in(file: Path) -> str | None:
    if not file.is_file():
        return None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{file}: cannot be read as text", "write it as one line: HF_TOKEN=hf_..."
        ) from None
    matches = [match for line in lines if (match := _ENV_LINE.fullmatch(line.strip()))]
    if not matches or not (value := matches[-1]["value"].strip()):
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise UserError(
            f"{file}: the value of HF_TOKEN is not a token (it holds spaces or other signs)",
            f"copy it again from {TOKENS_PAGE}, as HF_TOKEN=hf_...",
        )
    return value
