"""Is this data fit to train on? Everything a person would want to know before the first step."""

from __future__ import annotations

from typing import Any

from mule.data.check.row import Part
from mule.data.check.survey import Parts, Settings, Survey
from mule.tokenizer import Tokenizer

__all__ = ["Part", "Parts", "Settings", "check"]


def check(files: Parts, tokenizer: Tokenizer, settings: Settings) -> dict[str, Any]:
    """Look at every row of `files`; `ok` is False where training on them would be a mistake.

    Memory is bounded: 40 bytes a row, and the texts of at most 200,000 rows.
    """
    survey = Survey(files, tokenizer, settings)
    survey.read()
    return survey.finish()
