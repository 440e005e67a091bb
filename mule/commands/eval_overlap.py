"""Which items of a task stand in the training files of the models, as their runs name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import MuleError

if TYPE_CHECKING:
    from mule.data.clean.compare import TrainingItem
    from mule.evaluate.items import Task
    from mule.evaluate.measure import Outcomes
    from mule.evaluate.subject import Subject

_MOST_BYTES = 256 * 2**20  # of training files: 12 bytes a word are held in memory


def overlaps(
    subjects: Sequence[Subject], tasks: Sequence[Task]
) -> dict[str, dict[int, str]] | None:
    """Task -> place of an item -> the words it shares with what a model of these was trained on.

    None where no training file is known, or they cannot be looked at; a note says why.
    """
    if not tasks:
        return None
    runs = _runs(subjects)
    if not runs:
        progress.note(
            "whether the training data holds these items is not known: no model here is of a run"
        )
        return None
    try:
        items = [item for folder in runs for item in _trained_on(folder)]
    except (MuleError, OSError) as error:
        said = error.message if isinstance(error, MuleError) else f"{error}"
        progress.note(f"overlap with the training data was not looked for: {said}", "warning")
        return None
    from mule.evaluate.overlap import Training

    training = Training(items)
    return {task.name: training.overlapping(task) for task in tasks}


def rows(
    known: dict[str, dict[int, str]] | None,
    tasks: Sequence[Task],
    subjects: Sequence[Subject],
    outcomes: Outcomes,
) -> list[dict[str, Any]]:
    """Of each task how many items overlap, and the scores with and without those."""
    found = []
    for task in tasks if known is not None else ():
        shared = known[task.name] if known else {}
        row: dict[str, Any] = {"task": task.name, "items": len(task.items)}
        row["overlapping"] = len(shared)
        for subject in subjects if shared else ():
            measure, values = next(iter(outcomes[task.name, subject.name].scores.items()))
            rest = [value for place, value in enumerate(values) if place not in shared]
            row["measure"] = measure
            row.setdefault("with", {})[subject.name] = sum(values) / len(values)
            row.setdefault("without", {})[subject.name] = sum(rest) / len(rest) if rest else None
        found.append(row)
    return found


def _runs(subjects: Sequence[Subject]) -> list[Path]:
    """The folders of the runs that the models came from, each once."""
    from mule.commands.lineage import lineage_of

    named = [lineage_of(subject.source).get("run") for subject in subjects]
    folders = dict.fromkeys(Path(name) for name in named if name)
    return [folder for folder in folders if (folder / "resolved.yaml").is_file()]


def _trained_on(run: Path) -> list[TrainingItem]:
    from mule.config.load import load_recipe
    from mule.data.prepare import read_options
    from mule.data.sources import expand, read
    from mule.errors import UserError

    data = load_recipe(run / "resolved.yaml", []).recipe.data
    files = expand(data.train)
    num_bytes = sum(file.stat().st_size for file in files)
    if num_bytes > _MOST_BYTES:
        raise UserError(
            f"the training files of {run.name} have {num_bytes:,} bytes",
            "clean them before training: mule data mix, with decontaminate",
        )
    return list(read(files, read_options(data)))
