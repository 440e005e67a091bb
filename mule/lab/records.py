"""A campaign's folder as the report reads it: results, runs and measurements, some perhaps missing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.reader import YamlProblem, parse_yaml, plain
from mule.errors import UserError

Row = dict[str, Any]
_NEEDED = {"variant": str, "seed": int, "tokens": int, "steps": int, "shape": dict, "test": dict}
# campaign.json has these as they were run, with what the command line changed.
_DECIDED = ("variants", "seeds", "sizes", "baseline", "search")


@dataclass(frozen=True)
class Result:
    """One trained model of a campaign, and the run it came from."""

    file: Path
    record: Row
    run: Path | None  # None where the run's folder is not there

    @property
    def variant(self) -> str:
        return self.record["variant"]

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def size(self) -> str:
        """Empty where the campaign has one size."""
        return str(self.record.get("size") or "")

    def value(self, part: str, name: str) -> float | None:
        """A figure such as test loss; None when it is missing or not finite."""
        found = (self.record.get(part) or {}).get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return None
        return float(found) if math.isfinite(found) else None


@dataclass(frozen=True)
class Arm:
    """A variant at one size: the unit of comparison; `style` is its colour in every plot."""

    variant: str
    size: str
    style: int
    results: tuple[Result, ...]  # by seed
    settings: Row  # of its first run, as resolved; empty when there is none

    @property
    def name(self) -> str:
        return f"{self.variant} {self.size}" if self.size else self.variant

    @property
    def file_stem(self) -> str:
        """What its measurements are called: <variant>-<size>, or the variant alone."""
        return f"{self.variant}-{self.size}" if self.size else self.variant

    @property
    def shape(self) -> Row:
        return self.results[0].record["shape"]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(result.seed for result in self.results)

    def values(self, part: str, name: str) -> dict[int, float]:
        """A figure of each seed that has it."""
        found = {result.seed: result.value(part, name) for result in self.results}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Study:
    """Everything that is in a campaign's folder."""

    folder: Path
    asked: Row  # campaign.yaml, as it was run; empty when it is not there
    arms: tuple[Arm, ...]  # by size, in the campaign's order
    shapes: dict[str, Row]  # by the arm's file stem, as are the next three
    decode: dict[str, Row]
    compiled: dict[str, Row]
    searches: dict[str, Row]  # what each searched of its settings
    lineages: dict[str, Row]  # of each result's run, by the file's stem

    @property
    def results(self) -> list[Result]:
        return [result for arm in self.arms for result in arm.results]

    @property
    def seeds(self) -> list[int]:
        return sorted({result.seed for result in self.results})

    @property
    def baseline(self) -> str:
        """The variant that others are compared with: the one named, else the first."""
        return str(self.asked.get("baseline") or self.arms[0].variant)

    @property
    def sizes(self) -> list[str]:
        return list(dict.fromkeys(arm.size for arm in self.arms))

    @property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(arm.variant for arm in self.arms))

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def baseline_of(self, size: str) -> Arm | None:
        """The baseline's arm of a size, where it has a result."""
        own = (arm for arm in self.arms if arm.size == size and arm.variant == self.baseline)
        return next(own, None)


def read_study(folder: Path) -> Study:
    """What is there of a campaign. Raises UserError where there is nothing to report."""
    asked = _read_asked(folder)
    files = sorted((folder / "results").glob("*.json"))
    if not files:
        _refuse_empty(folder, bool(asked))
    results = [_read_result(folder, file) for file in files]
    shapes = _read_optional(folder / "shapes.json", [])
    return Study(
        folder,
        asked,
        _arms(results, asked),
        {row["variant"]: row for row in shapes if isinstance(row, dict) and "variant" in row},
        _read_named(folder / "decode"),
        _read_named(folder / "compile"),
        _searches(folder / "search"),
        {r.file.stem: _read_optional(r.run / "lineage.json", {}) for r in results if r.run},
    )


def read_settings(run: Path | None) -> Row:
    """A run's settings as resolved; empty when they are not there."""
    file = run / "resolved.yaml" if run is not None else None
    return _read_yaml(file) if file is not None and file.is_file() else {}


def asked_names(asked: Row) -> list[str]:
    """The variants of the campaign, in its order."""
    variants = asked.get("variants")
    return [str(name) for name in variants] if isinstance(variants, dict) else []


# ---------------------------------------------------------------- reading


def _read_asked(folder: Path) -> Row:
    """campaign.yaml, with what campaign.json says was run in its place."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder",
            "name a campaign's folder; mule lab run CAMPAIGN.yaml makes one and says where",
        )
    file = folder / "campaign.yaml"
    asked = _read_yaml(file) if file.is_file() else {}
    facts = _read_optional(folder / "campaign.json", {})
    return asked | {key: facts[key] for key in _DECIDED if facts.get(key)}


def _read_yaml(file: Path) -> Row:
    try:
        node = parse_yaml(file.read_text(encoding="utf-8"))
        value = plain(node) if node is not None else {}
    except YamlProblem as problem:
        raise UserError(
            f"{file}:{problem.line}: {problem.message}", f"correct line {problem.line} of {file}"
        ) from None
    return value if isinstance(value, dict) else {}


def _refuse_empty(folder: Path, is_campaign: bool) -> None:
    if is_campaign:
        raise UserError(
            f"{folder} has no results yet: nothing was trained to its end",
            "go on with the campaign: mule lab run CAMPAIGN.yaml",
        )
    raise UserError(
        f"{folder} is no campaign's folder: it has neither campaign.yaml nor results",
        "name the folder that mule lab run CAMPAIGN.yaml made",
    )


def _read_result(folder: Path, file: Path) -> Result:
    record = fsio.read_json(file)
    there = record if isinstance(record, dict) else {}
    lacking = [key for key, kind in _NEEDED.items() if not isinstance(there.get(key), kind)]
    if lacking:
        raise UserError(
            f"{file}: no result of a campaign: it lacks {', '.join(lacking)}",
            "remove the file; mule lab run CAMPAIGN.yaml writes it anew if it is the campaign's",
        )
    runs = (folder / "runs" / file.stem, folder / str(record.get("run", "")))
    run = next((run for run in runs if (run / "recipe.yaml").is_file()), None)
    return Result(file, record, run)


def _read_optional(file: Path, default: Any) -> Any:
    return fsio.read_json(file) if file.is_file() else default


def _read_named(folder: Path) -> dict[str, Row]:
    return {file.stem: fsio.read_json(file) for file in sorted(folder.glob("*.json"))}


def _searches(folder: Path) -> dict[str, Row]:
    """What each variant's search tried and chose; the results of its tries lie beside it."""
    found = _read_named(folder).items()
    return {name: row for name, row in found if isinstance(row.get("chosen"), dict)}


def _arms(results: list[Result], asked: Row) -> tuple[Arm, ...]:
    variants = list(dict.fromkeys([*asked_names(asked), *(r.variant for r in results)]))
    arms = []
    for size in sorted({r.size for r in results}, key=lambda size: _active(results, size)):
        for variant in variants:
            own = [r for r in results if r.variant == variant and r.size == size]
            own.sort(key=lambda result: result.seed)
            if own:
                settings = next((s for r in own if (s := read_settings(r.run))), {})
                arms.append(Arm(variant, size, variants.index(variant), tuple(own), settings))
    return tuple(arms)


def _active(results: list[Result], size: str) -> float:
    shapes = [result.record["shape"] for result in results if result.size == size]
    return min(shape.get("active_params") or 0 for shape in shapes)
