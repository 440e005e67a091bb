"""What the checks of a user's module share: the module, how it is called, and what is found."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import torch
from torch import nn

Level = Literal["fault", "warning", "note"]


class Refused(Exception):
    """The module cannot be examined further; `change` is what to do."""

    def __init__(self, found: str, change: str, place: str | None = None) -> None:
        super().__init__(found)
        self.found, self.change, self.place = found, change, place


@dataclass(frozen=True)
class Finding:
    """One thing to know about the module: what was found, what to change, and in which line."""

    level: Level
    found: str
    change: str
    place: str | None = None  # file.py:12

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Outcome:
    """What one check says: figures for the table, and findings."""

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, level: Level, found: str, change: str, place: str | None = None) -> None:
        """Note a finding, once."""
        finding = Finding(level, found, change, place)
        if finding not in self.findings:
            self.findings.append(finding)


@dataclass
class Subject:
    """The user's module, and how its forward is called so that it gives logits (B, T, V)."""

    file: Path
    name: str
    settings: dict[str, Any]
    model: nn.Module
    vocab_size: int
    keywords: dict[str, Any] = field(default_factory=dict)  # role of each further argument
    token_embedding: nn.Embedding | None = None
    most_tokens: int | None = None  # of a row, where that is known

    def ids(self, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
        """Random token ids (rows, tokens), the same for the same seed; rows are cut to `most_tokens`."""
        tokens = min(tokens, self.most_tokens or tokens)
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab_size, (rows, tokens), generator=generator)

    def call(self, ids: torch.Tensor, model: Any = None, **more: Any) -> Any:
        """Whatever forward gives for these ids; `model` stands for the module where it is given."""
        arguments = {name: _filled(role, ids) for name, role in self.keywords.items()}
        called = self.model if model is None else model
        return called(ids, **{**arguments, **more})

    def logits(self, ids: torch.Tensor, model: Any = None) -> torch.Tensor:
        """(B, T, V) of these ids (B, T)."""
        found = find_logits(self.call(ids, model), *ids.shape)
        if found is None:
            raise Refused(
                f"forward gave no logits of shape {(*ids.shape, self.vocab_size)}",
                "return logits (B, T, V), alone, first in a tuple, or as `.logits`",
            )
        return found

    def place(self, frames: Iterable[tuple[str, int]]) -> str | None:
        """The innermost of (file name, line) that is the user's own, as file.py:12."""
        own = None
        for name, line in frames:
            if is_own(self.file, name):
                own = f"{Path(name).name}:{line}"
        return own

    def place_of(self, error: BaseException) -> str | None:
        """The line of the user's that an error came through last."""
        return self.place(lines_of(error.__traceback__))


def _filled(role: Any, ids: torch.Tensor) -> Any:
    """The value for an argument of forward: of the ids, or as it is."""
    if role == "targets":
        return ids
    if role == "positions":
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if role == "places":  # (T,), as gpt-fast and LitGPT have input_pos
        return torch.arange(ids.shape[1], device=ids.device)
    if role == "ones":
        return torch.ones_like(ids)
    return role


def is_own(file: Path, name: str) -> bool:
    """Whether a source file is the user's: theirs, or beside it."""
    if name.startswith("<"):
        return False
    path = Path(name)
    return path == file or (file.parent in path.parents and "site-packages" not in path.parts)


def lines_of(trace: TracebackType | None) -> list[tuple[str, int]]:
    """(file name, line) of a traceback, outermost first."""
    return [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(trace)]


def lines_from(frame: FrameType | None) -> list[tuple[str, int]]:
    """(file name, line) of a running frame and its callers, outermost first."""
    found = []
    while frame is not None:
        found.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found[::-1]


def find_logits(given: Any, rows: int, tokens: int) -> torch.Tensor | None:
    """(rows, tokens, V) in what forward gave; flat (rows * tokens, V) is unfolded."""
    if isinstance(given, torch.Tensor):
        candidates = [given]
    elif hasattr(given, "logits"):
        candidates = [given.logits]
    elif isinstance(given, dict):
        candidates = [given[name] for name in ("logits", "output") if name in given]
    elif isinstance(given, (tuple, list)):
        candidates = list(given)
    else:
        candidates = []
    for candidate in candidates:
        if not isinstance(candidate, torch.Tensor) or not candidate.is_floating_point():
            continue
        if candidate.dim() == 3 and tuple(candidate.shape[:2]) == (rows, tokens):
            return candidate
        if candidate.dim() == 2 and len(candidate) == rows * tokens and rows * tokens > 1:
            return candidate.view(rows, tokens, -1)
    return None


def one_line(text: object, most: int = 220) -> str:
    """The first line of an error's text, not too long."""
    lines = [line for line in str(text).strip().splitlines() if line.strip()]
    line = " ".join(lines[0].split()) if lines else ""
    return line if len(line) <= most else line[: most - 3] + "..."
