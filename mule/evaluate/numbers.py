"""The number an answer ends in, as GSM8K's are judged: `#### 24`, \\boxed{24}, or the last one."""

from __future__ import annotations

import re
from decimal import Decimal

_CALCULATOR = re.compile(
    r"<<[^<>\n]*>>"
)  # <<48/2=24>> of GSM8K: the sum is written again behind it
_LATEX_COMMA = re.compile(r"\{,\}|\\[,!;]")  # 1{,}234 and 1\,234
_LATEX_SIGN = re.compile(r"\\(?=[$%])")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
_MARKED = "####"
_SAID = re.compile(r"\banswer(?:\s+is|\s*[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\.(?:\s|$)|\n")
_MINUS = "-\u2212\u2013"  # also the minus sign and the dash
_NUMBER = re.compile(
    rf"""
    (?<![\w/])(?<!\d\.)                # not the 2 of H2O, of 3.5.2 or of a date
    (?P<sign>[{_MINUS}])?              # 10-5 is a difference: its 5 is no -5
    (?:[$€£¥₹]\s?(?P<inner>[{_MINUS}])?)?
    (?:
      (?P<comma>\d{{1,3}}(?:\.\d{{3}})+,\d+)(?!\d)                                 # 1.234,56
      | (?P<mixed>\d+)\s(?P<above>\d+)/(?P<under>[1-9]\d*)(?![\d/])               # 2 1/2
      | (?P<whole>\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?P<part>\.\d+)?
        (?P<power>[eE][-+]?\d{{1,2}}(?!\w))?(?:/(?P<below>[1-9]\d*)(?![\d/]))?    # 3/4
      | (?P<bare>\.\d+)                                                            # .5
    )
    """,
    re.VERBOSE,
)
_MOST_CHARACTERS = 60  # a longer one is a model that repeats itself


def final_number(text: str) -> Decimal | None:
    """The number a text gives as its answer; None where there is none.

    What follows the first `####` counts, else the last \\boxed{}, else what follows the last "answer
    is", else the last number. Thousands commas, currencies, units, percent signs and calculator
    marks are no part of it; 3/4 is 0.75.
    """
    text = _LATEX_SIGN.sub("", _LATEX_COMMA.sub("", _CALCULATOR.sub("", text)))
    if _MARKED in text:
        marked = _numbers(text.partition(_MARKED)[2].partition(_MARKED)[0])
        return marked[0] if marked else None
    if boxed := _BOXED.findall(text):
        inside = _numbers(boxed[-1])
        return inside[-1] if inside else None
    if said := list(_SAID.finditer(text)):
        sentence = _SENTENCE_END.split(text[said[-1].end() :], maxsplit=1)[0]
        if found := _numbers(sentence):
            return found[-1] if "=" in sentence else found[0]
    every = _numbers(text)
    return every[-1] if every else None


def same_number(answer: str, reference: str) -> bool:
    """Whether both end in the same number: 24, 24.0 and $24 are."""
    found, wanted = final_number(answer), final_number(reference)
    return found is not None and found == wanted


def _numbers(text: str) -> list[Decimal]:
    matches = [match for match in _NUMBER.finditer(text) if len(match[0]) <= _MOST_CHARACTERS]
    return [_value(match) for match in matches]


def _value(match: re.Match[str]) -> Decimal:
    if match["comma"]:
        value = Decimal(match["comma"].replace(".", "").replace(",", "."))
    elif match["mixed"]:
        value = Decimal(match["mixed"]) + Decimal(match["above"]) / Decimal(match["under"])
    elif match["bare"]:
        value = Decimal("0" + match["bare"])
    else:
        digits = match["whole"].replace(",", "") + (match["part"] or "") + (match["power"] or "")
        value = Decimal(digits) / Decimal(match["below"] or 1)
    return -value if match["sign"] or match["inner"] else value
