"""Runs side by side: the settings that differ, how far each came, and what their seeds can show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from mule import statistics
from mule.compare.normalise import training_seconds
from mule.config.dump import idle_keys, value_of
from mule.config.knobs import knobs
from mule.config.schema import Recipe
from mule.doctor.history import History, read_history
from mule.message import Message
from mule.run import Run

_SEED = "train.seed"
_NAMES = frozenset({"name", "extends"})  # say nothing of how a run was trained
_SETTLED = 0.1  # of the updates: before it speed is that of compiling and warming up
_AVERAGED = 0.05  # of the run: the last training loss is the mean over so much
_METRICS = (("val_loss", "validation loss"), ("loss", "training loss"))


@dataclass(frozen=True)
class Told:
    """A run as it is compared; its name is its folder's, with the path where several are alike."""

    name: str
    run: Run
    history: History


def read(runs: Sequence[Run]) -> list[Told]:
    """The runs with their histories; UserError of one that made no update."""
    folders = {run.folder.resolve(): run.name for run in runs}
    counts = Counter(folders.values())
    return [
        Told(run.name if counts[run.name] == 1 else str(run.folder), run, read_history(run))
        for run in runs
    ]


def figures(told: Told) -> dict[str, Any]:
    """How far the run came and what it took; None where it was not logged."""
    rows, history = told.history.rows, told.history
    held_out = [(row["val_loss"], row["step"]) for row in rows if row.get("val_loss") is not None]
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    best = min(held_out, default=(None, None))
    settled = rows[int(len(rows) * _SETTLED) :]
    speeds = [row["tokens_per_second"] for row in settled if row.get("tokens_per_second")]
    tail = losses[-max(1, round(len(losses) * _AVERAGED)) :]
    return {
        "updates": history.step,
        "epochs": rows[-1].get("epoch") if rows else None,
        "first_loss": losses[0] if losses else None,
        "train_loss": fmean(tail) if tail else None,
        "val_loss": held_out[-1][0] if held_out else None,
        "best_val_loss": best[0],
        "best_step": best[1],
        "tokens_per_second": median(speeds) if speeds else None,
        "memory_bytes": max((row.get("memory_bytes") or 0 for row in rows), default=0) or None,
        "seconds": training_seconds(told.run),
    }


# ---------------------------------------------------------------- settings


def differing(runs: Sequence[Told]) -> list[dict[str, Any]]:
    """The settings that are not the same in all: key, a value for each run, and the setting's role.

    A setting without effect counts as its default.
    """
    values = [_effective(told.history.recipe) for told in runs]
    found = []
    for key, knob in knobs().items():
        own = [each[key] for each in values]
        if key not in _NAMES and any(value != own[0] for value in own):
            found.append({"key": key, "values": own, "role": knob.role})
    return found


def _effective(recipe: Recipe) -> dict[str, Any]:
    idle = idle_keys(recipe)
    known = knobs()
    return {key: known[key].default if key in idle else value_of(recipe, key) for key in known}


# ---------------------------------------------------------------- seeds


def grouped(runs: Sequence[Told]) -> dict[str, dict[int, Told]]:
    """The runs by their settings but the seed: name of the first such run -> seed -> run.

    A second run of the same settings and seed is left out: it is no further evidence.
    """
    keys: dict[tuple[str, ...], str] = {}
    groups: dict[str, dict[int, Told]] = {}
    for told in runs:
        values = _effective(told.history.recipe)
        identity = tuple(
            repr(values[key])
            for key, knob in knobs().items()
            if knob.role == "identity" and key != _SEED
        )
        name = keys.setdefault(identity, told.name)
        groups.setdefault(name, {}).setdefault(int(values[_SEED]), told)
    return groups


def significance(runs: Sequence[Told]) -> dict[str, Any]:
    """What the seeds can show of the differences to the first setting: paired, and in words."""
    groups = grouped(runs)
    metric, label = _metric(runs)
    values: dict[str, dict[int, float]] = {
        name: {seed: _value(told, metric) for seed, told in group.items()}
        for name, group in groups.items()
    }
    first, *others = groups
    differences = [statistics.paired_difference(first, name, values) for name in others]
    verdicts = statistics.judge(differences)
    return {
        "metric": metric,
        "label": label,
        "groups": {name: sorted(group) for name, group in groups.items()},
        "differences": [_row(verdict) for verdict in verdicts],
        "words": _words(runs, groups, verdicts, label),
    }


def _metric(runs: Sequence[Told]) -> tuple[str, str]:
    for name, label in _METRICS:
        if all(len(told.history.series(name)) for told in runs):
            return name, label
    return _METRICS[-1]


def _value(told: Told, metric: str) -> float:
    found = figures(told)["val_loss" if metric == "val_loss" else "train_loss"]
    return math.nan if found is None else found


def _row(verdict: statistics.Verdict) -> dict[str, Any]:
    difference, interval = verdict.difference, verdict.difference.interval
    return {
        "first": difference.first,
        "second": difference.second,
        "seeds": list(difference.seeds),
        "mean": interval.mean if interval else None,
        "half_width": interval.half_width if interval else None,
        "p": verdict.adjusted_p,
        "detectable": verdict.detectable,
        "is_beyond_noise": verdict.is_beyond_noise,
    }


def _words(
    runs: Sequence[Told],
    groups: Mapping[str, Mapping[int, Told]],
    verdicts: Sequence[statistics.Verdict],
    label: str,
) -> list[str]:
    """A sentence for each difference."""
    if len(groups) == 1:
        seeds = len(next(iter(groups.values())))
        if seeds == 1:
            return [
                Message(
                    "The same settings and the same seed: nothing differs but the machine's doing."
                )
            ]
        return [Message("The same settings with {} seeds: what differs is chance.", seeds)]
    said = [_sentence(verdict, label) for verdict in verdicts]
    if not _same_data(runs):
        said.append(
            Message(
                "The data differs, so that the {} is of other texts: it says little of the settings.",
                label,
            )
        )
    return said


def _sentence(verdict: statistics.Verdict, label: str) -> str:
    difference, interval = verdict.difference, verdict.difference.interval
    names = Message("{!s} against {!s}", difference.second, difference.first)
    if interval is None:
        return Message(
            "{}: no seed is common to both, and nothing is paired; give both the same seeds.", names
        )
    shown = Message("{}: {} {:+.4f}", names, label, interval.mean)
    if interval.half_width is None:
        return Message(
            "{} with one seed. The seed alone may do that: train both with train.seed=1 and "
            "train.seed=2 too, and compare all six.",
            shown,
        )
    told = Message(
        "{} ± {:.4f} over {} seeds (p = {:.2g})",
        shown,
        interval.half_width,
        interval.n,
        verdict.adjusted_p,
    )
    if verdict.is_beyond_noise:
        better = Message("lower") if interval.mean < 0 else Message("higher")
        return Message("{}: {} beyond what seeds do.", told, better)
    seen = ""
    if verdict.detectable:
        seen = Message("; with these seeds {:.3g} would have been seen", verdict.detectable)
    return Message("{}: no measurable difference{}.", told, seen)


def _same_data(runs: Sequence[Told]) -> bool:
    """The same files, cut into tokens alike."""
    keys = ("data.train", "data.valid", "data.valid_share", "data.format")
    found = [
        [told.history.lineage.get("tokenizer"), *(value_of(told.history.recipe, k) for k in keys)]
        for told in runs
    ]
    return all(one == found[0] for one in found)
