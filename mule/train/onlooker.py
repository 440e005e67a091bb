"""A run folder as the processes that do not write see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from mule.run import Run


class Onlooker(Run):
    """Reads like a Run; what it is told to write, the first process of the group writes."""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        yield

    def discard(self) -> None: ...

    def start_attempt(self, from_step: int | None = None) -> int:
        return self.attempt

    def log_metrics(self, row: dict[str, Any]) -> None: ...

    def log_event(self, kind: str, **fields: Any) -> None: ...

    def log_samples(self, step: int, answers: dict[str, str], **about: dict[str, Any]) -> None: ...

    def sync(self) -> None: ...
