"""What a run folder tells about a run, up to one of its updates. Read from the folder alone."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from mule import fsio
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import UserError
from mule.logs import Rows, pick
from mule.run import Run

FACTS = "facts.json"  # what assembling found out: data, labels, machine, plan
Row = dict[str, Any]
Kind = Literal["pretrain", "fine-tune", "adapter"]


def kind_of(recipe: Recipe) -> Kind:
    """From scratch, all weights of a model, or an adapter on it."""
    if recipe.adapter.kind != "none":
        return "adapter"
    return "pretrain" if recipe.model.path is None else "fine-tune"


@dataclass(frozen=True)
class Series:
    """A figure where it was logged: updates and finite values, in order."""

    steps: Sequence[int]
    values: Sequence[float]

    def __len__(self) -> int:
        return len(self.steps)


def series_of(points: Iterable[tuple[int, float | None]]) -> Series:
    """The figure of these points, but for those without a value."""
    steps, values = array("q"), array("d")
    for step, value in points:
        if value is not None:
            steps.append(step)
            values.append(value)
    return Series(steps, values)


@dataclass(frozen=True)
class History:
    """One run as its folder shows it.

    `rows`, `events` and `samples` are those that stand: of the newest attempts, and not rolled back.
    `facts` is what assembling found out, empty of a run that recorded none.
    """

    name: str
    recipe: Recipe
    num_steps: int
    rows: Sequence[Row]
    events: Sequence[Row]
    samples: Sequence[Row]
    lineage: Row
    facts: Row

    @property
    def kind(self) -> Kind:
        """What the run does."""
        return kind_of(self.recipe)

    @property
    def is_over(self) -> bool:
        """Whether the last update is there, or evaluate.patience ended the run."""
        ended = any(event["kind"] == "stopped early" for event in self.events)
        return ended or self.step >= self.num_steps

    @property
    def step(self) -> int:
        """The newest update; 0 before the first."""
        return self.rows[-1]["step"] if self.rows else 0

    @cached_property
    def _series(self) -> dict[str, Series]:
        return {}

    @cached_property
    def _has(self) -> dict[str, bool]:
        return {}

    def series(self, name: str) -> Series:
        """A figure of the rows, such as `loss` or `val_loss`; empty where none was logged."""
        if name not in self._series:
            self._series[name] = series_of(self.pick(name))
        return self._series[name]

    def pick(self, *names: str, of_attempt: int | None = None) -> Iterator[tuple[Any, ...]]:
        """The update and these figures of every row, None where one is missing.

        `of_attempt` leaves out the rows of others.
        """
        for attempt, step, *figures in pick(self.rows, "attempt", "step", *names):
            if of_attempt is None or (attempt or 1) == of_attempt:
                yield step, *figures

    @cached_property
    def newest_attempt(self) -> int:
        """A resumed run is another process from then on."""
        return max((attempt or 1 for (attempt,) in pick(self.rows, "attempt")), default=1)

    def has(self, name: str) -> bool:
        """Whether a rule's need is there: a figure of the rows, `samples`, or `facts.<key>`."""
        if name == "samples":
            return bool(self.samples)
        if name.startswith("facts."):
            return self.facts.get(name.removeprefix("facts.")) is not None
        if name not in self._has:
            self._has[name] = any(value is not None for _, value in self.pick(name))
        return self._has[name]

    def until(self, step: int) -> History:
        """The history as it was after that update."""
        return replace(
            self,
            rows=Rows(row for row in self.rows if row["step"] <= step),
            events=[event for event in self.events if event.get("step", 0) <= step],
            samples=[sample for sample in self.samples if sample["step"] <= step],
        )


def read_history(run: Run, recipe: Recipe | None = None) -> History:
    """The history of a run; UserError of one that never began.

    `recipe` is the resolved one, where it is at hand; else it is read from the folder.
    """
    file = run.folder / "resolved.yaml"
    if recipe is None and not file.is_file():
        raise UserError(
            f"{run.folder} has made no update yet: there is nothing to examine",
            f"start it: mule train {run.folder}/recipe.yaml --resume",
        )
    recipe = recipe or load_recipe(file, []).recipe
    facts = run.folder / FACTS
    return History(
        name=run.name,
        recipe=recipe,
        num_steps=int(recipe.train.steps or 0),
        rows=run.metrics(),
        events=_standing_events(run),
        samples=run.samples(),
        lineage=run.read_lineage(),
        facts=fsio.read_json(facts) if facts.is_file() else {},
    )


def _standing_events(run: Run) -> list[Row]:
    """The events without those of updates that a later attempt made again."""
    events = run.events()
    placed = {event["kind"] for event in events if "step" in event}
    others = [event for event in events if event["kind"] not in placed]
    return sorted(others + run.standing_events(*placed), key=lambda event: event["at"])
