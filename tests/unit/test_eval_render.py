"""The tables of `mule eval`, read as a user would."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from mule.cli.render_eval import show_eval


def shown(**changes: Any) -> str:
    console = Console(file=io.StringIO(), width=160, highlight=False)
    result: dict[str, Any] = {"models": ["base", "tuned"], "tasks": [], "comparison": []}
    result |= {"overlap": [], "failures": [], "fewest_differing": 7}
    show_eval(console, result | changes)
    return console.file.getvalue()  # type: ignore[attr-defined]


def compared(task: str, measure: str, verdict: str, *figures: float) -> dict[str, Any]:
    difference, low, high = figures
    return {
        "task": task,
        "measure": measure,
        "model": "tuned",
        "than": "base",
        "difference": difference,
        "low": low,
        "high": high,
        "verdict": verdict,
    }


def row(model: str, loss: float) -> dict[str, Any]:
    figures = {"loss": loss, "perplexity": 2.5, "bits_per_byte": 0.5, "num_targets": 1234}
    return {"model": model, **figures}


def test_held_out_rows_with_their_difference() -> None:
    held_out = {"held_out": [row("base", 3.0), row("tuned", 2.75)], "rows": 40}
    held_out |= {"sources": [], "categories": []}
    rows = [compared("held-out", "loss", "better", -0.25, -0.3, -0.2)]
    text = shown(**held_out, comparison=rows)
    assert "Held-out data, 40 rows" in text and "against base" in text
    assert "-0.2500 (-0.3000 to -0.2000): better" in text
    assert "tuned against base: better on held-out loss" in text
    assert "7 items at least must differ, all one way, to be measurable in this table" in text
    assert "another tokenizer: compare bits per byte" in shown(**held_out)


def test_tasks_with_groups_and_overlap() -> None:
    scores = {"base": 0.6, "tuned": 0.5}
    task = {"task": "general", "measure": "accuracy", "items": 100, "scores": scores}
    task["by_group"] = {"facts": {"base": 0.75, "tuned": 0.25}}
    overlap = {"task": "general", "items": 100, "overlapping": 2, "measure": "accuracy"}
    overlap |= {"with": scores, "without": {"base": 0.58, "tuned": None}}
    rows = [compared("general", "accuracy", "no measurable difference", -0.1, -0.2, 0.01)]
    text = shown(tasks=[task], comparison=rows, overlap=[overlap])
    assert "-10.0 points (-20.0 to +1.0): no measurable difference" in text
    assert "general, by group" in text and "75.0%" in text
    assert "tuned against base: no measurable difference on 1 of 1" in text
    assert (
        "general: 2 of 100 items stand in the training data; accuracy of base 60.0%, without them "
        "58.0%; tuned 50.0%, without them nothing is left"
    ) in text
    overlap = {"task": "general", "items": 100, "overlapping": 0}
    assert "general: none of 100 items found in the training data" in shown(overlap=[overlap])


def test_failures_cannot_move_the_cursor() -> None:
    answers = {
        "base": {"answer": "", "scores": {"exact_match": 0.0}},
        "tuned": {"answer": "\x1b[2J" + "long " * 200, "scores": {"exact_match": 0.0}},
    }
    item = {"task": "mine", "place": "rows.jsonl:3", "question": "a\nb?", "right": ["c"]}
    text = shown(failures=[item | {"answers": answers}])
    assert "mine rows.jsonl:3\n  asked   a b?\n  right   c\n" in text
    assert "  base (exact_match 0): (nothing)\n" in text
    assert "  tuned (exact_match 0): \\x1b[2Jlong long" in text and text.endswith(" ...\n")
