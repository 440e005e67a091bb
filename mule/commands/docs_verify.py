"""The generated part of docs/verify.md: which planted faults are caught, and how they are named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.docs_table import table

PAGE, RESULT = "verify.md", "verify.json"
_NOTHING_YET = "Nothing is recorded yet: `python -m bench.verify run`, then `make docs`.\n"
_MAX_CHARS = 170  # of a failure in the table
_COLUMNS = ("what was done to the file", "in", "caught", "the first failure")
_GOOD_COLUMNS = ("type", "files", "passed", "largest mean KL", "least top-1", "same answers")


def verify_markdown(results: Path) -> str:
    """Two tables: a row for each fault, a row for each type of good exports."""
    file = results / RESULT
    if not file.is_file():
        return _NOTHING_YET
    found = fsio.read_json(file)
    faults, good = found["faults"], found["good"]
    named, passed = sum(row["named"] for row in faults), sum(row["ok"] for row in good)
    kinds = len({row["fault"] for row in faults})
    families = len({row["family"] for row in good})
    head = (
        f"**{named} of {len(faults)} files with a planted fault were caught and named** ({kinds} "
        f"kinds), and **{passed} of {len(good)} good exports of {families} families passed**. "
        f"`{found['command']}`, {found['date']}, {found['seconds']} s on "
        f"{found['machine']['cores']} cores, xllamacpp {found['xllamacpp']}.\n\n"
    )
    rows = [_row(name, faults) for name in dict.fromkeys(row["fault"] for row in faults)]
    types = dict.fromkeys(row["type"] for row in good)
    passes = [_good_row(name, [row for row in good if row["type"] == name]) for name in types]
    return head + table(_COLUMNS, rows) + "\nGood exports:\n\n" + table(_GOOD_COLUMNS, passes)


def _row(name: str, faults: list[Mapping[str, Any]]) -> tuple[str, ...]:
    rows = [row for row in faults if row["fault"] == name]
    families = ", ".join(dict.fromkeys(row["family"] for row in rows))
    caught = sum(row["named"] for row in rows)
    first = rows[0]["first"].replace("|", r"\|").replace("<", r"\<")
    first = first if len(first) <= _MAX_CHARS else f"{first[:_MAX_CHARS]}..."
    return (rows[0]["title"], families, f"{caught} of {len(rows)}", first)


def _good_row(name: str, rows: list[Mapping[str, Any]]) -> tuple[str, ...]:
    same, asked = (sum(row[key] for row in rows) for key in ("num_greedy_equal", "num_prompts"))
    return (
        name,
        str(len(rows)),
        str(sum(row["ok"] for row in rows)),
        f"{max(row['kl_mean'] for row in rows):.1e}",
        f"{min(row['top1'] for row in rows):.1%}",
        f"{same} of {asked}",
    )


def limits_markdown() -> str:
    """What a file of each type must keep to, from mule/export/limits.py."""
    from mule.export.limits import LIMITS, limits_of

    gemma = limits_of("f32", "gemma3")
    assert gemma is not None
    rows: list[tuple[str, ...]] = []
    for name, limits in LIMITS.items():
        more = []
        if limits.logit is not None:
            more.append(f"each logit within {limits.logit:g} (Gemma {gemma.logit:g})")
        if limits.greedy_margin is not None:
            more.append(
                f"answers part only where the model's lead is below {limits.greedy_margin:g}"
            )
        figures = (f"{limits.kl_mean:g}", f"{limits.kl_p99:g}", f"+{100 * limits.ppl:g}%")
        rows.append((name, *figures, "; ".join(more)))
    columns = "type", "mean KL", "99% of KL below", "perplexity", "more"
    return table(columns, rows)
