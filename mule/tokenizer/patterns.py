"""Regular expressions of a foreign tokenizer, tried in a child process before they are used.

One with nested repetition can take exponential time on some texts; the library then aborts in the
middle of an encoding, or hangs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mule.errors import ModelError
from mule.tokenizer.words import PATTERNS

_TIME_LIMIT_S = 10.0

# Long runs of one and of two characters, each ended by one that fits nothing, and then by the
# characters of the pattern: the engine gives up at once on a text without them.
_CHILD = """
import json, sys
from tokenizers import Regex, pre_tokenizers
pattern = json.load(sys.stdin)
split = pre_tokenizers.Split(Regex(pattern), "isolated")
some = "aA1.' \\n\\t_\\u00e9\\u4e2d"
own = "".join(dict.fromkeys(c for c in pattern if c not in some))[:24]
try:
    for run in [*some, *own, *(a + b for a in some + own[:8] for b in some + own[:8])]:
        for end in ("", "!", "\\0", "!" + own, "\\0" + own + some, "a" + own):
            split.pre_tokenize_str(run * 500 + end)
except BaseException:
    sys.exit(3)
"""


def check_patterns(backend: Tokenizer, file: Path) -> None:
    """Raises ModelError for a pattern in `file` that does not end in time on a short text."""
    for pattern in dict.fromkeys(_patterns(backend)):
        if pattern not in PATTERNS and not _ends(pattern):
            shown = pattern if len(pattern) <= 60 else pattern[:60] + "..."
            raise ModelError(
                f"{file}: its pattern {shown} takes exponential time on some texts, "
                "so encoding would hang",
                "take the tokenizer.json from its original author, or remove nested repetition "
                "such as (a+)+ from the pattern",
            )


def _patterns(backend: Tokenizer) -> Iterator[str]:
    for part in (backend.normalizer, backend.pre_tokenizer):
        if part is not None:
            yield from _regexes(json.loads(part.__getstate__()))


def _regexes(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("Regex"), str):
            yield value["Regex"]
        for item in value.values():
            yield from _regexes(item)
    elif isinstance(value, list):
        for item in value:
            yield from _regexes(item)


def _ends(pattern: str) -> bool:
    try:
        result = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps(pattern).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIME_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return result.returncode == 0
