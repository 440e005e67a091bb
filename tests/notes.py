"""What a user would have been told."""

from __future__ import annotations

from mule import progress


class Notes(progress.Silence):
    """Shows nothing and keeps the notes: `texts`, and `leveled`, each behind its level."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.leveled: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.texts.append(text)
        self.leveled.append(f"{level}: {text}")
