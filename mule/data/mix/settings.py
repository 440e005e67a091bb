"""What a mix is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mule.data.sources.options import ReadOptions
from mule.errors import UserError


@dataclass(frozen=True)
class MixSettings:
    """The keys of `caps`, `weights` and `repeats` name a source: its path, file name or stem.

    `near` is the Jaccard index from which two items count as near-duplicates; None keeps them.
    `decontaminate`: files or folders of evaluation sets. Raises UserError for a value out of range.
    """

    caps: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    repeats: Mapping[str, int] = field(default_factory=dict)
    max_examples: int | None = None
    valid_share: float = 0.05
    seed: int = 0
    near: float | None = 0.8
    exact: bool = True
    decontaminate: Sequence[str] = ()
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self) -> None:
        for option, given in (("--cap", self.caps), ("--repeat", self.repeats)):
            for key, value in given.items():
                _at_least_one(f"{option} {key}={value}", value)
        for key, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(
                    f"--weight {key}={weight:g}: a weight is a share of the result, above 0",
                    f"leave {key} out of the sources if nothing of it is wanted",
                )
        if self.max_examples is not None:
            _at_least_one(f"--max-examples {self.max_examples}", self.max_examples)
        if not 0 <= self.valid_share < 1:
            raise UserError(
                f"--valid-share {self.valid_share:g}: a share is at least 0 and below 1",
                "use 0.05 to hold one row in twenty out",
            )
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative", "use 0 or above")

    def as_dict(self) -> dict[str, Any]:
        """The settings for a file of JSON."""
        return {
            "caps": dict(self.caps),
            "weights": dict(self.weights),
            "repeats": dict(self.repeats),
            "max_examples": self.max_examples,
            "valid_share": self.valid_share,
            "seed": self.seed,
            "exact": self.exact,
            "near": self.near,
            "decontaminate": list(self.decontaminate),
            "format": self.read.format,
            "columns": dict(self.read.columns),
            "threads": self.read.threads,
            "wikitext": self.read.wikitext,
        }


def _at_least_one(given: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{given}: the number must be at least 1", "leave it out for no limit")
