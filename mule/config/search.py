"""The section `search` of a campaign: settings of the optimizer, found for each variant alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from mule.config.optim import Rate
from mule.config.schema import Count
from mule.config.section import Problem, Section, knob

Decay = Annotated[float, Field(gt=0, le=10)]
SAMPLED = ("learning_rate", "weight_decay")  # of the section optim, with trials
_RANGE = "two numbers, the lower one first, such as [1e-4, 1e-2]"


def searched_keys(search: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that a search finds, by dotted key, from the values of its section."""
    if search.get("learning_rates"):
        return ("optim.learning_rate",)
    return tuple(f"optim.{name}" for name in SAMPLED if search.get(name))


class SearchSection(Section):
    """A small search of optimizer settings, for each variant alone, with short runs of one seed."""

    learning_rates: list[Rate] = knob([], "The learning rates to try; none is no such search.")
    trials: Annotated[int, Field(ge=2, le=10_000)] | None = knob(
        None,
        "In place of a list: how many tries a variant gets, sampled by Optuna (extra search) from "
        "the ranges below.",
    )
    learning_rate: list[Rate] | None = knob(
        None, "With trials: its range, sampled on a logarithmic scale.", form=_RANGE
    )
    weight_decay: list[Decay] | None = knob(
        None, "With trials: its range, sampled on a logarithmic scale.", form=_RANGE
    )
    tokens: Count | None = knob(None, "Length of a try. Default: a fifth of a run.", unit="tokens")

    @property
    def searched(self) -> tuple[str, ...]:
        """The settings that it finds, by dotted key; none where nothing is searched."""
        return searched_keys(self.model_dump())

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each searched setting, by dotted key."""
        if self.learning_rates:
            return {"optim.learning_rate": (min(self.learning_rates), max(self.learning_rates))}
        given = {f"optim.{name}": getattr(self, name) for name in SAMPLED}
        return {key: (values[0], values[1]) for key, values in given.items() if values}

    def idle(self) -> Iterator[Problem]:
        for name in ("trials", *SAMPLED):
            if self.learning_rates:
                why = "cannot take effect beside search.learning_rates; remove one of the two"
                yield Problem(name, why, because="learning_rates")
            elif name != "trials" and self.trials is None:
                why = "cannot take effect without search.trials; add how many, such as trials: 12"
                yield Problem(name, why, because="trials")

    def conflicts(self) -> Iterator[Problem]:
        if len(self.learning_rates) == 1:
            yield Problem(
                "learning_rates", "one rate is no search; set optim.learning_rate, or add others"
            )
        if len(set(self.learning_rates)) < len(self.learning_rates):
            yield Problem("learning_rates", "one is listed twice; remove it")
        for name in SAMPLED:
            if said := _wrong_range(getattr(self, name)):
                yield Problem(name, said)
        if self.trials is not None and not self.learning_rates and not self.searched:
            why = "cannot take effect without a range; add learning_rate: [1e-4, 1e-2], or another"
            yield Problem("trials", why)
        if self.tokens is not None and not self.searched:
            why = "cannot take effect without search.learning_rates or search.trials; remove it"
            yield Problem("tokens", why)


def _wrong_range(values: list[float] | None) -> str | None:
    if values is None:
        return None
    if len(values) != 2:
        return f"a range is {_RANGE}; here are {len(values)}"
    low, high = values
    return None if low < high else f"{low:g} is not below {high:g}; a range is {_RANGE}"
