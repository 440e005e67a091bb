"""`mule eval`: did it help, and did it break anything? Loss and tasks, models beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.evaluate.comparison import Compared
    from mule.evaluate.items import Task
    from mule.evaluate.measure import Outcomes
    from mule.evaluate.subject import Subject

HELD_OUT, GENERAL = "held-out", "general"


@dataclass(frozen=True)
class Limits:
    """How much is measured; None is all."""

    max_rows: int | None = None
    max_items: int | None = None


def run(
    sources: Sequence[str],
    *,
    tasks: Sequence[str] = (),
    data: Sequence[str] | None = None,
    limits: Limits | None = None,
    base: str | None = None,
    with_base: bool = True,
    out: Path | None = None,
    show_failures: int = 0,
) -> dict[str, Any]:
    """Measure models on held-out rows and on tasks, each beside the first; an adapter beside its base.

    The figures of the rows at the top of the result are those of the first of `sources`.
    """
    from mule.commands import eval_held_out, eval_overlap
    from mule.evaluate.comparison import fewest_differing, judged
    from mule.evaluate.measure import LOWER_IS_BETTER, measure

    limits = limits or Limits()
    subjects = _subjects(sources, base, with_base=with_base)
    chosen, rows = _plan(tasks, data, comparing=len(subjects) > 1)
    _refuse_idle(limits, show_failures, chosen, rows, out)
    loaded = [_cut(task, limits.max_items) for task in _loaded(chosen, data)]
    named = subjects[-len(sources)].name
    result: dict[str, Any] = {"model": sources[0]}
    apart: list[Compared] = []
    with eval_held_out.shared_rows(subjects, data if rows == "data" else None, rows) as held_out:
        outcomes: Outcomes = {}
        for subject in subjects:
            if held_out is not None:
                held_out.measure(subject, limits.max_rows)
            for task in loaded:
                outcomes[task.name, subject.name] = measure(subject, task)
            subject.release()
    if held_out is not None:
        result |= held_out.figures(named)
        apart += held_out.compared()
    apart += _compared(loaded, subjects, outcomes)
    known = eval_overlap.overlaps(subjects, loaded)
    result["models"] = [subject.name for subject in subjects]
    result["tasks"] = [row for task in loaded for row in _rows(task, subjects, outcomes)]
    result["comparison"] = [row.as_dict() for row in judged(apart, LOWER_IS_BETTER)]
    if apart:
        result["fewest_differing"] = fewest_differing(len(apart))
    result["overlap"] = eval_overlap.rows(known, loaded, subjects, outcomes)
    items = _items(loaded, subjects, outcomes, known or {})
    if out is not None:
        _write(out, result, items)
        result["out"] = str(out)
    result["failures"] = _failures(items, subjects, show_failures)
    result["next"] = f"mule chat {' '.join(sources)}"
    return result


def export(
    tasks: Sequence[str], form: str, folder: Path, data: Sequence[str] | None
) -> dict[str, Any]:
    """Write tasks for another program: `lm-eval`, EleutherAI's lm-evaluation-harness."""
    from mule.evaluate.lm_eval import write

    if form != "lm-eval":
        raise UserError(f"{form} is no program that tasks are written for", "--export lm-eval DIR")
    names = [name for name in tasks if name != HELD_OUT]
    if not names:
        raise UserError("no task is named that could be written", "--task general, for example")
    loaded = _loaded(names, data)
    found = write(loaded, folder)
    command = (
        f"lm_eval run --model hf --model_args pretrained=FOLDER --include_path {folder} "
        f"--tasks {','.join(found)}"
    )
    return {"folder": str(folder), "written": found, "next": command}


# ---------------------------------------------------------------- what is measured


def _subjects(sources: Sequence[str], base: str | None, *, with_base: bool) -> list[Subject]:
    """The models in order; of an adapter named alone its base comes first."""
    from mule.adapters.source import find_source
    from mule.commands.chat import distinct_names
    from mule.commands.lineage import lineage_of
    from mule.evaluate.subject import Subject

    found = [find_source(text, base=base) for text in sources]
    names = distinct_names(sources, [source.name for source in found])
    subjects = [
        Subject(name, source, knows_chats=lineage_of(source).get("kind", "chat") == "chat")
        for name, source in zip(names, found, strict=True)
    ]
    alone = found[0]
    if len(found) == 1 and alone.adapter_dir is not None and with_base:
        before = find_source(str(alone.model_dir))
        name = before.name if before.name != names[0] else f"{before.name} (base)"
        knows = lineage_of(before).get("kind", "chat") == "chat"
        subjects.insert(0, Subject(name, before, knows_chats=knows))
    return subjects


def _plan(
    tasks: Sequence[str], data: Sequence[str] | None, *, comparing: bool
) -> tuple[list[str], str]:
    """The tasks to run, and where held-out rows come from: data, run, any or none.

    `any`: of the run if there is one; nobody asked for them by name.
    """
    from mule.evaluate.items import needs_data

    if repeated := [name for name in tasks if list(tasks).count(name) > 1]:
        raise UserError(f"the task {repeated[0]} is named twice", "name each task once")
    names = [name for name in tasks if name != HELD_OUT]
    takes_data = any(needs_data(name) for name in names)
    if data and not takes_data:
        rows = "data"
    elif HELD_OUT in tasks or not tasks:
        rows = "run" if HELD_OUT in tasks or not comparing else "any"
    else:
        rows = "none"
    if not tasks and comparing:
        names.append(GENERAL)
    return names, rows


def _refuse_idle(
    limits: Limits, show_failures: int, tasks: Sequence[str], rows: str, out: Path | None
) -> None:
    """What cannot take effect, and a file that could not be written at the end."""
    if not tasks and (limits.max_items is not None or show_failures):
        option = "--show-failures" if show_failures else "--max-items"
        raise UserError(
            f"{option} cannot take effect: no task is measured",
            "name one, as --task general, or leave it out",
        )
    if rows == "none" and limits.max_rows is not None:
        raise UserError(
            "--max-rows cannot take effect: no held-out rows are measured",
            "add --task held-out, or leave it out; --max-items limits tasks",
        )
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent}: no such folder", f"mkdir -p {out.parent}")


def _loaded(names: Sequence[str], data: Sequence[str] | None) -> list[Task]:
    """The tasks, those without rows with the rows of `data`."""
    from mule.evaluate.items import load_task, needs_data

    found = [load_task(name, data if needs_data(name) else None) for name in names]
    called = [task.name for task in found]
    for name in called:
        if called.count(name) > 1:
            raise UserError(f"two tasks are called {name}", "rename one of their files")
    return found


def _cut(task: Task, max_items: int | None) -> Task:
    """At most so many items, spread evenly over all of them."""
    from dataclasses import replace

    count = len(task.items)
    if max_items is None or count <= max_items:
        return task
    places = [i * count // max_items for i in range(max_items)]
    return replace(task, items=tuple(task.items[place] for place in places))


# ---------------------------------------------------------------- what is told


def _rows(task: Task, subjects: Sequence[Subject], outcomes: Outcomes) -> list[dict[str, Any]]:
    """A row for each measure, with the share of each model; then those of all answers."""
    own = {subject.name: outcomes[task.name, subject.name] for subject in subjects}
    first = own[subjects[0].name]
    found: list[dict[str, Any]] = []
    for measure in (*first.scores, *first.along):
        judged = measure in first.scores
        found.append(
            {
                "task": task.name,
                "measure": measure,
                "items": len(task.items),
                "scores": {
                    name: one.mean(measure) if judged else one.along[measure]
                    for name, one in own.items()
                },
                "by_group": _by_group(task, subjects, outcomes, measure) if judged else {},
            }
        )
    return found


def _by_group(
    task: Task, subjects: Sequence[Subject], outcomes: Outcomes, measure: str
) -> dict[str, dict[str, float]]:
    groups: dict[str, list[int]] = {}
    for place, item in enumerate(task.items):
        groups.setdefault(item.group, []).append(place)
    if list(groups) == [""]:
        return {}
    return {
        group: {
            s.name: sum(outcomes[task.name, s.name].scores[measure][i] for i in places)
            / len(places)
            for s in subjects
        }
        for group, places in groups.items()
    }


def _compared(
    tasks: Sequence[Task], subjects: Sequence[Subject], outcomes: Outcomes
) -> list[Compared]:
    from mule.evaluate.comparison import paired

    first = subjects[0].name
    return [
        paired(
            task.name,
            measure,
            (first, other.name),
            (values, outcomes[task.name, other.name].scores[measure]),
        )
        for task in tasks
        for measure, values in outcomes[task.name, first].scores.items()
        for other in subjects[1:]
    ]


def _items(
    tasks: Sequence[Task],
    subjects: Sequence[Subject],
    outcomes: Outcomes,
    known: dict[str, dict[int, str]],
) -> list[dict[str, Any]]:
    """Every item with every model's answer and scores."""
    found = []
    for task in tasks:
        for place, item in enumerate(task.items):
            answered = {}
            for subject in subjects:
                outcome = outcomes[task.name, subject.name]
                scores = {name: values[place] for name, values in outcome.scores.items()}
                answered[subject.name] = outcome.answers[place] | {"scores": scores}
            row: dict[str, Any] = {"task": task.name, "place": item.place}
            row |= {"question": item.question, "right": list(item.references)}
            if shared := known.get(task.name, {}).get(place):
                row["in_training_data"] = shared
            found.append(row | {"answers": answered})
    return found


def _failures(
    items: Sequence[dict[str, Any]], subjects: Sequence[Subject], count: int
) -> list[dict[str, Any]]:
    """Of each task the items that the last model does worst, those it lost to the first before all."""
    from mule.evaluate.measure import LOWER_IS_BETTER

    def badness(item: dict[str, Any]) -> tuple[float, float]:
        found = []
        for subject in (subjects[0], subjects[-1]):
            measure, score = next(iter(item["answers"][subject.name]["scores"].items()))
            found.append(-score if measure in LOWER_IS_BETTER else score)
        before, now = found
        return now - before, now

    shown: list[dict[str, Any]] = []
    for task in dict.fromkeys(item["task"] for item in items):
        own = sorted((item for item in items if item["task"] == task), key=badness)
        scores = [next(iter(i["answers"][subjects[-1].name]["scores"].values())) for i in own]
        bad = [i for i, score in zip(own, scores) if badness(i)[1] < 1 and score != 1.0]
        shown += bad[:count]
    return shown


def _write(out: Path, result: dict[str, Any], items: Sequence[dict[str, Any]]) -> None:
    from mule import fsio

    fsio.write_json(out, {"version": 1, **result, "items": list(items)})
