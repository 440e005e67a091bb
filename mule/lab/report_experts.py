"""The report's section on mixtures: how evenly tokens were routed, by layer, expert and time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from mule.lab.curves import LAST_SHARE, ROUTING, Routing
from mule.lab.document import Block, Figures, Items, Section, Table, Text
from mule.lab.findings import Evidence
from mule.lab.plots import Cells, Figure, heat_map
from mule.lab.records import Arm
from mule.lab.techniques import traits_of
from mule.lab.wording import counted, percent, plus_minus, short

_BINS = 24  # of time, in a heat map
_TOP_LOAD = 2.0  # a load of twice the even share is the brightest, unless some are higher
_AS_SHARE = ("dropped", "rerouted")
_WHAT = {
    "max_violation": "how far the busiest expert is above its even share (DeepSeek's MaxVio)",
    "dropped": "share of the routed tokens that an expert had no room for",
    "rerouted": "share of the routed tokens that went to another expert than the router chose",
    "entropy": "mean entropy of a token's router probabilities, 1 is undecided",
    "confidence": "mean probability of a token's first expert",
    "aux_loss": "balancing loss before its weight",
    "z_loss": "mean squared log-sum-exp of the router's logits, before its weight",
    "bias_range": "highest less lowest bias of the layer's experts",
}


def experts(evidence: Evidence) -> Section | None:
    """Routing of every variant with experts; None where the campaign has none."""
    arms = [arm for arm in evidence.study.arms if _has_experts(evidence, arm)]
    if not arms:
        return None
    known = {row["arm"]: row for row in evidence.found["experts"]}
    silent = [arm.name for arm in arms if arm.name not in known]
    blocks: list[Block] = []
    if silent:
        told = f"The logs say nothing of routing in {', '.join(silent)}: its figures are missing."
        blocks.append(Text(told, "warning"))
    if known:
        blocks.append(_table(list(known.values())))
    for arm in arms:
        if arm.name in known:
            blocks += _of_arm(evidence, arm)
    return Section("Experts", blocks)


def _has_experts(evidence: Evidence, arm: Arm) -> bool:
    traits = traits_of(arm, evidence.study.asked)
    return bool(evidence.routings(arm)) or (traits is not None and traits.experts != "dense")


def _table(found: list[dict[str, Any]]) -> Table:
    rows = []
    for row in found:
        worst = row["worst_violation"]
        rows.append(
            [
                row["arm"],
                f"{row['layers']} × {row['num_experts']}",
                plus_minus(row["max_violation"], 3),
                f"{worst['value']:.3f} (layer {worst['layer']})" if worst else plus_minus(None, 3),
                ", ".join(str(count) for count in row["dead_experts"]),
                ", ".join(str(count) for count in row["starved_experts"]),
                _percents(row["dropped"]),
                _percents(row["rerouted"]),
                plus_minus(row["entropy"], 3),
                plus_minus(row["confidence"], 3),
                plus_minus(row["aux_loss"], 4),
                plus_minus(row["z_loss"], 4),
            ]
        )
    columns = ["variant", "layers × experts", "MaxVio", "worst layer", "dead", "starved", "dropped"]
    columns += ["re-routed", "entropy", "confidence", "aux loss", "z-loss"]
    caption = (
        f"The last {LAST_SHARE:.0%} of training, mean over layers, ± half width of the 95% interval "
        "over seeds. Dead: experts without a token there, of each seed over all layers; starved: with "
        "less than a tenth of their even share."
    )
    return Table(caption, columns, rows)


def _percents(interval: dict[str, Any] | None) -> str:
    if interval is None:
        return plus_minus(None, 2)
    return percent(interval["mean"], 2)


def _of_arm(evidence: Evidence, arm: Arm) -> list[Block]:
    routings = evidence.routings(arm)
    constant, figures = [], [_load_map(arm, routings[0]), _load_over_time(arm, routings[0])]
    for name, called in ROUTING.items():
        values = _layer_by_time(routings, name)
        if values is None:
            constant.append(f"{arm.name}, {called}: missing in the logs")
        elif not any(value for row in values for value in row):
            constant.append(
                f"{arm.name}, {called}: 0 in every layer, from the first row to the last"
            )
        else:
            figures.append(_time_map(arm, routings, name, values))
    blocks: list[Block] = [Figures(figures)]
    return [*blocks, Items(constant)] if constant else blocks


# ---------------------------------------------------------------- heat maps


def _load_map(arm: Arm, routing: Routing) -> Figure:
    """Layer x expert, over the last part of the first seed's run."""
    loads = [_loads(layer) for layer in routing.tokens_per_expert()]
    highest = max(load for layer in loads for load in layer)
    dead = sum(load == 0 for layer in loads for load in layer)
    told = (
        f"Tokens of each expert as multiples of its even share, last {LAST_SHARE:.0%} of training, "
        f"seed {_first_seed(arm)}. Highest {highest:.2f}, experts without a token: {dead}."
    )
    return heat_map(
        f"experts-{_plain(arm)}",
        f"Load of the experts, {arm.name}",
        told,
        Cells(loads, _names(routing.layers), _names(range(len(loads[0])))),
        ("expert", "layer", "times its even share"),
        high=max(_TOP_LOAD, highest),
    )


def _load_over_time(arm: Arm, routing: Routing) -> Figure:
    """Expert x time, in the layer that is most uneven at the end."""
    final = [_loads(layer) for layer in routing.tokens_per_expert()]
    place = max(range(len(final)), key=lambda layer: max(final[layer]))
    times = [tokens for tokens, _ in routing.rows]
    loads = [_loads(row["tokens_per_expert"][place]) for _, row in routing.rows]
    binned, labels = _in_bins(times, loads)
    columns = list(zip(*binned))
    highest = max(load for column in columns for load in column)
    told = (
        f"The layer that is most uneven at the end, {routing.layers[place]}, seed "
        f"{_first_seed(arm)}: load of each expert as a multiple of its even share."
    )
    return heat_map(
        f"experts-time-{_plain(arm)}",
        f"Load over training, {arm.name}",
        told,
        Cells(columns, _names(range(len(columns))), labels),
        ("tokens seen", "expert", "times its even share"),
        high=max(_TOP_LOAD, highest),
    )


def _time_map(arm: Arm, routings: list[Routing], name: str, values: list[list[float]]) -> Figure:
    """Layer x time of one figure, the mean over seeds."""
    times = [tokens for tokens, _ in routings[0].rows][: len(values)]
    binned, labels = _in_bins(times, values)
    by_layer = list(zip(*binned))
    first, last = fmean(binned[0]), fmean(binned[-1])
    shown = (
        (percent(first, 2), percent(last, 2)) if name in _AS_SHARE else (short(first), short(last))
    )
    called = ROUTING[name]
    lowest, highest = min(map(min, by_layer)), max(map(max, by_layer))
    return heat_map(
        f"{name.replace('_', '-')}-{_plain(arm)}",
        f"{called[0].upper()}{called[1:]} over training, {arm.name}",
        f"{_WHAT[name][0].upper()}{_WHAT[name][1:]}. Mean over layers: {shown[0]} at first, "
        f"{shown[1]} at the end; mean over {counted(len(routings), 'seed')}.",
        Cells(by_layer, _names(routings[0].layers), labels),
        ("tokens seen", "layer", called),
        low=lowest if lowest > 0.3 * highest else 0.0,
    )


def _names(numbers: Iterable[int]) -> list[str]:
    return [str(number) for number in numbers]


def _loads(counts: Sequence[float]) -> list[float]:
    """Tokens of each expert over the mean of them."""
    mean = fmean(counts)
    return [count / mean if mean else 0.0 for count in counts]


def _layer_by_time(routings: list[Routing], name: str) -> list[list[float]] | None:
    """(rows, layers), the mean over seeds of the rows that all have."""
    each = [routing.figures(name) for routing in routings]
    known = [values for values in each if values is not None]
    if len(known) < len(each):
        return None
    return [[fmean(of_layer) for of_layer in zip(*of_row)] for of_row in zip(*known)]


def _in_bins(times: list[float], values: list[list[float]]) -> tuple[list[list[float]], list[str]]:
    """Means over at most _BINS stretches of time, and the tokens at the end of each."""
    count = min(_BINS, len(values))
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    means = [[fmean(column) for column in zip(*values[a:b])] for a, b in pairwise(edges)]
    return means, [short(times[b - 1]) for b in edges[1:]]


def _first_seed(arm: Arm) -> int:
    return next(result.seed for result in arm.results if result.run is not None)


def _plain(arm: Arm) -> str:
    """Its name as part of a file's name and of an id."""
    return re.sub(r"[^A-Za-z0-9_+.-]", lambda found: f"{ord(found[0]):x}", arm.file_stem)
