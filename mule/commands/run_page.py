"""What the page of a run shows beside its curves: head, samples, recipe, lineage, files, report."""

from __future__ import annotations

from typing import Any

from mule.commands import stop
from mule.commands.run_files import Kept, settings_of
from mule.commands.runs import files, following
from mule.run import Run

_SHOWN_SAMPLES = 24  # of a prompt: the first, the last, and evenly between
_REPORT_CHARS = 40_000


def head(run: Run, summaries: Kept[dict[str, Any]]) -> dict[str, Any]:
    """The run in figures, the next command, and what can be done with it from here.

    `can` is stop or resume, `stopping` that it was asked already, or nothing; `elsewhere` says that
    no process of this machine that may be asked trains it.
    """
    summary = summaries.of(run)
    can, elsewhere = "", False
    if summary["state"] == "running":
        elsewhere = stop.holder(run) is None
        can = "" if elsewhere else "stopping" if stop.was_asked(run) else "stop"
    elif summary["state"] != "finished":
        can = "resume"
    return summary | {"can": can, "elsewhere": elsewhere, "next": following(run)}


def samples(run: Run) -> list[dict[str, Any]]:
    """For each prompt its answers over time, the newest first."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in run.samples():
        for prompt, text in row["answers"].items():
            by_prompt.setdefault(prompt, []).append({"step": row["step"], "answer": text})
    return [
        {"prompt": prompt, "answers": _spread(answers)[::-1], "of": len(answers)}
        for prompt, answers in by_prompt.items()
    ]


def about(run: Run) -> dict[str, Any]:
    """The recipe with its reasons, where the run comes from, its files, and the doctor's report."""
    report = run.folder / "report.md"
    recipe = run.folder / "recipe.yaml"
    return {
        "run": run.name,
        "settings": settings_of(run),
        "typed": recipe.read_text(encoding="utf-8", errors="replace"),
        "lineage": dict(_flat(run.read_lineage())),
        "files": files(run),
        "report": report.read_text(encoding="utf-8")[:_REPORT_CHARS] if report.is_file() else "",
        "report_command": f"mule doctor {run.folder} --report",
    }


def _spread(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    count = len(answers)
    if count <= _SHOWN_SAMPLES:
        return answers
    last = _SHOWN_SAMPLES - 1
    return [answers[place * (count - 1) // last] for place in range(_SHOWN_SAMPLES)]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted name and text of each value in nested dicts and lists that says anything."""
    if isinstance(value, dict):
        pairs = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = [(f"{name}.{place}", item) for place, item in enumerate(value, 1)]
    else:
        told = ", ".join(str(v) for v in value) if isinstance(value, list) else value
        return [(name, str(told))] if told not in (None, "") else []
    return [found for key, item in pairs for found in _flat(item, key)]
