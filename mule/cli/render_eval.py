"""The tables of `mule eval`: loss, tasks, what differs measurably, overlap, failures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mule.cli import render

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_CHARACTERS = 400  # of a question or an answer


def show_eval(console: Console, result: dict[str, Any]) -> None:
    """All of it; of one model without a task only its figures."""
    models = result["models"]
    differences = {(row["task"], row["measure"], row["model"]): row for row in result["comparison"]}
    if held_out := result.get("held_out"):
        _show_held_out(console, result, held_out, differences)
    if result["tasks"]:
        _show_tasks(console, result["tasks"], models, differences)
    for row in result["overlap"]:
        render.print_line(console, _overlap(row))
    if result["comparison"]:
        render.print_line(console, f"\n{_summary(result['comparison'])}")
        render.print_line(
            console,
            f"{result['fewest_differing']} items at least must differ, all one way, to be measurable "
            "in this table",
        )
    for item in result["failures"]:
        _show_failure(console, item)
    if result.get("out"):
        render.print_line(console, f"\nevery answer  {result['out']}")


def _show_held_out(
    console: Console,
    result: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    differences: dict[tuple[str, str, str], dict[str, Any]],
) -> None:
    columns = ["", "loss", "perplexity", "bits per byte", "tokens"]
    several = len(rows) > 1
    table = []
    for row in rows:
        figures = [
            row["model"],
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.4g}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['num_targets']:,}",
        ]
        table.append([*figures, *([_difference(row, rows[0], differences)] if several else [])])
    title = f"Held-out data, {result['rows']:,} rows"
    columns += [f"against {rows[0]['model']}"] if several else []
    render.print_table(console, title, columns, table)
    for name in ("sources", "categories"):
        if result[name]:
            render.print_rows(console, f"\n{name} of {result['model']}", result[name])


def _difference(
    row: dict[str, Any],
    first: dict[str, Any],
    differences: dict[tuple[str, str, str], dict[str, Any]],
) -> str:
    if row is first:
        return ""
    found = differences.get(("held-out", "loss", row["model"]))
    if found is None:
        return "another tokenizer: compare bits per byte"
    return _in_words(found)


def _show_tasks(
    console: Console,
    rows: Sequence[dict[str, Any]],
    models: Sequence[str],
    differences: dict[tuple[str, str, str], dict[str, Any]],
) -> None:
    """A line for each model, so that their names may be long; then the groups."""
    table = []
    for row in rows:
        head = [row["task"], row["measure"], f"{row['items']:,}"]
        for name in models:
            found = differences.get((row["task"], row["measure"], name))
            told = "" if found is None else _in_words(found)
            table.append([*head, name, f"{row['scores'][name]:.1%}", told])
            head = ["", "", ""]
    columns = ["task", "measure", "items", "model", "share", f"against {models[0]}"]
    if len(models) == 1:
        columns, table = columns[:-1], [line[:-1] for line in table]
    render.print_table(console, "\nTasks", columns, table)
    for task in dict.fromkeys(row["task"] for row in rows):
        groups = next(row["by_group"] for row in rows if row["task"] == task)
        if groups:
            lines = [
                [group, *(f"{scores[name]:.1%}" for name in models)]
                for group, scores in groups.items()
            ]
            render.print_table(console, f"\n{task}, by group", ["", *models], lines)


def _in_words(row: dict[str, Any]) -> str:
    """`+4.0 points (1.2 to 6.9): better`, and of a loss in nats."""
    if row["measure"] == "loss":
        figures = f"{row['difference']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
    else:
        points = [100 * row[name] for name in ("difference", "low", "high")]
        figures = "{:+.1f} points ({:+.1f} to {:+.1f})".format(*points)
    return f"{figures}: {row['verdict']}"


def _summary(rows: Sequence[dict[str, Any]]) -> str:
    """Did it help, and did it break anything?"""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        told = []
        for verdict in ("better", "worse"):
            found = [f"{row['task']} {row['measure']}" for row in own if row["verdict"] == verdict]
            if found:
                told.append(f"{verdict} on {', '.join(found)}")
        rest = sum(row["verdict"] == "no measurable difference" for row in own)
        if rest:
            told.append(f"no measurable difference on {rest} of {len(own)}")
        lines.append(f"{model} against {own[0]['than']}: {'; '.join(told)}")
    return "\n".join(lines)


def _overlap(row: dict[str, Any]) -> str:
    if not row["overlapping"]:
        return f"{row['task']}: none of {row['items']} items found in the training data"
    shares = [
        f"{name} {share:.1%}, without them {_share(row['without'][name])}"
        for name, share in row["with"].items()
    ]
    return (
        f"{row['task']}: {row['overlapping']} of {row['items']} items stand in the training data; "
        f"{row['measure']} of {'; '.join(shares)}"
    )


def _share(value: float | None) -> str:
    return "nothing is left" if value is None else f"{value:.1%}"


def _show_failure(console: Console, item: dict[str, Any]) -> None:
    render.print_line(console, f"\n{item['task']} {item['place']}")
    render.print_line(console, f"  asked   {_short(item['question'])}")
    if item["right"]:
        render.print_line(console, f"  right   {_short(' | '.join(item['right']))}")
    for name, answer in item["answers"].items():
        scores = ", ".join(f"{key} {value:g}" for key, value in answer["scores"].items())
        render.print_line(console, f"  {name} ({scores}): {_short(answer['answer'])}")


def _short(text: str) -> str:
    """On one line, control characters spelled out."""
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))
    return textwrap.shorten(plain, _SHOWN_CHARACTERS, placeholder=" ...") or "(nothing)"
