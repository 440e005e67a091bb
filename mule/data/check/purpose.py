"""Is there enough of it, and is it what it should be used for?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mule.data.check.findings import Finding, Place, Problem, counted

# Below so many conversations: what people have got out of them.
_PURPOSES = (
    (50, "less than a trial (under 50 rows)"),
    (200, "a trial (50 to 200 rows)"),
    (500, "a light fine-tune (200 to 500 rows)"),
    (2000, "a real fine-tune (500 to 2,000 rows)"),
)
_FEWEST = _PURPOSES[0][0]
_THOROUGH = "a thorough fine-tune (2,000 rows and more)"
_TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (Chinchilla): the best use of a compute budget

_EVALUATIONS = {"humaneval": "HumanEval", "mbpp": "MBPP"}
_TEST_FILE = re.compile(r"test\b|test-", re.IGNORECASE)


def size_of(kind: str, num_rows: int, num_tokens: int) -> dict[str, Any]:
    """What so much data is good for; `parameters`: the model that so many tokens suit best."""
    if kind == "document":
        parameters = num_tokens // _TOKENS_PER_PARAMETER
        text = (
            f"a model of about {_short(parameters)} parameters from scratch "
            f"({_TOKENS_PER_PARAMETER} tokens a parameter), or to train one further"
        )
        return {"purpose": text, "parameters": parameters}
    purpose = next((text for below, text in _PURPOSES if num_rows < below), _THOROUGH)
    return {"purpose": purpose, "parameters": None}


def problems(
    kind: str, num_rows: int, formats: Iterable[tuple[Path, str, bool]]
) -> Iterator[Problem]:
    """About the amount, and about evaluation sets among the training files.

    A format is (file, name, whether the user asked for it); unasked, training refuses HumanEval.
    """
    yield from _about_amount(kind, num_rows)
    for file, name, asked in formats:
        is_test = name == "gsm8k" and _TEST_FILE.match(file.name)
        if known := "the GSM8K test set" if is_test else _EVALUATIONS.get(name):
            yield Problem(
                "error" if name == "humaneval" and not asked else "warning",
                "evaluation-set",
                f"this is {known}, which models are measured with",
                "train on something else: after training on it, the score means nothing",
                Finding(1, [Place(str(file), None)]),
            )


def _about_amount(kind: str, num_rows: int) -> Iterator[Problem]:
    if num_rows == 0:
        yield Problem(
            "error", "no-rows", "there is no usable row", "mend what is above, or add rows"
        )
    elif kind != "document" and num_rows < _FEWEST:
        yield Problem(
            "warning",
            "too-few",
            f"{counted(num_rows, 'row')}: a model learns no more than a manner from so few",
            f"write at least {_FEWEST} for a trial; 200 to 500 make a light fine-tune",
        )


def _short(number: int) -> str:
    """Two digits: it is a rule of thumb."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{float(f'{number / size:.2g}'):g}{unit}"
    return f"{float(f'{number:.2g}'):g}"
