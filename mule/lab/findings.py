"""The statistics of a campaign as plain values: what `--json` prints and the report tells."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from mule.lab.curves import ROUTING, Routing, Row, routing_of, rows_of_arm
from mule.lab.record_checks import what_differs, what_is_missing
from mule.lab.records import Arm, Study
from mule.lab.techniques import contrasts, own_module
from mule.plan.starvation import starved
from mule.statistics import (
    CONFIDENCE,
    POWER,
    Interval,
    Verdict,
    difference_among,
    judge,
    mean_interval,
    pooled_sd,
)

_LOSSES = ("loss", "perplexity", "bits_per_byte", "bits_per_word")
_SPEEDS = ("tokens_per_second", "share_of_peak", "peak_memory_bytes", "final_loss")
_STABILITY = ("max_grad_norm", "mean_grad_norm", "num_spikes", "refused_updates")


@dataclass
class Evidence:
    """A campaign with the logs of its runs, and what follows from both."""

    study: Study
    rows: dict[str, list[list[Row]]]  # of each arm, of each seed whose run is there
    found: dict[str, Any] = field(default_factory=dict)

    def routings(self, arm: Arm) -> list[Routing]:
        """Of each seed whose run tells of experts."""
        return [routing for rows in self.rows[arm.name] if (routing := routing_of(rows))]


def gather(study: Study) -> Evidence:
    """Read the logs, and compute every statistic of the report."""
    evidence = Evidence(study, {arm.name: rows_of_arm(arm) for arm in study.arms})
    verdicts, ranking = _verdicts(study), _ranking(study)
    best = _best_arm(ranking, study)
    evidence.found = {
        "folder": str(study.folder),
        "variants": study.variants,
        "sizes": [size for size in study.sizes if size],
        "seeds": study.seeds,
        "baseline": study.baseline,
        "confidence": CONFIDENCE,
        "power": POWER,
        "ranking": ranking,
        "best_run": _best_run(study, best),
        "best_arm": best,
        "own_modules": [arm.name for arm in study.arms if own_module(arm, study.asked)],
        "seed_noise": _seed_noise(study),
        "differences": verdicts,
        "training": [_training(arm) for arm in study.arms],
        "experts": [row for arm in study.arms if (row := _experts(evidence, arm))],
        "decoding": [
            {"arm": arm.name, **study.decode[arm.file_stem]}
            for arm in study.arms
            if study.decode.get(arm.file_stem)
        ],
        "searches": [
            {"arm": arm.name, **study.searches[arm.file_stem]}
            for arm in study.arms
            if study.searches.get(arm.file_stem)
        ],
        "missing": what_is_missing(study),
        "warnings": [*what_differs(study), *_own_warnings(study)],
    }
    return evidence


def interval_values(interval: Interval | None) -> dict[str, Any] | None:
    """As plain values: mean, half width, deviation, n."""
    if interval is None:
        return None
    return {
        "mean": interval.mean,
        "half_width": interval.half_width,
        "sd": interval.sd,
        "n": interval.n,
    }


# ---------------------------------------------------------------- losses


def _ranking(study: Study) -> list[dict[str, Any]]:
    """Each size's arms, the lowest mean test loss first; those without one last."""
    ranked = []
    for size in study.sizes:
        arms = [arm for arm in study.arms if arm.size == size]
        rows = [_ranked(arm, study) for arm in arms]
        rows.sort(key=lambda row: row["test"]["loss"]["mean"] if row["test"]["loss"] else 1e99)
        ranked += [{"rank": place, **row} for place, row in enumerate(rows, 1)]
    return ranked


def _ranked(arm: Arm, study: Study) -> dict[str, Any]:
    base = study.baseline_of(arm.size)
    against = None
    if base is not None and base is not arm:
        difference = difference_among(base.name, arm.name, _losses(study, arm.size))
        against = interval_values(difference.interval)
    return {
        "arm": arm.name,
        "variant": arm.variant,
        "size": arm.size,
        "seeds": list(arm.seeds),
        "active_params": arm.shape.get("active_params"),
        "test": {
            **{name: _mean_of(arm, "test", name) for name in _LOSSES},
            "word_perplexity": _word_perplexity(arm),
            "by_source": _by_source(arm),
        },
        "valid": {name: _mean_of(arm, "valid", name) for name in _LOSSES},
        "against_baseline": against,
    }


def _mean_of(arm: Arm, part: str, name: str) -> dict[str, Any] | None:
    return interval_values(mean_interval(list(arm.values(part, name).values())))


def _best_arm(ranking: list[dict[str, Any]], study: Study) -> str | None:
    """The variant whose mean test loss is lowest, at the largest size."""
    ranked = (r["arm"] for r in ranking if r["size"] == study.sizes[-1] and r["test"]["loss"])
    return next(ranked, None)


def _best_run(study: Study, arm: str | None) -> str | None:
    """The variant's run with the lowest test loss."""
    if arm is None:
        return None
    losses = study.arm(arm).values("test", "loss")
    best = min(losses, key=losses.__getitem__)
    run = next(r.run for r in study.arm(arm).results if r.seed == best)
    return str(run) if run is not None else None


def _word_perplexity(arm: Arm) -> dict[str, Any] | None:
    """Of the text's words, whatever the tokens: 2 ** bits per word."""
    bits = arm.values("test", "bits_per_word").values()
    return interval_values(mean_interval([2**value for value in bits if value < 1000]))


def _by_source(arm: Arm) -> dict[str, Any]:
    """The test loss of each source, where there are several."""
    parts = [result.record["test"].get("by_source") or {} for result in arm.results]
    names = sorted(set.intersection(*(set(part) for part in parts)))
    return {name: interval_values(mean_interval([part[name] for part in parts])) for name in names}


def _seed_noise(study: Study) -> dict[str, Any] | None:
    """How much the test loss of one variant varies between seeds, over all variants."""
    pooled = pooled_sd([list(arm.values("test", "loss").values()) for arm in study.arms])
    return {"sd": pooled[0], "df": pooled[1]} if pooled else None


def _verdicts(study: Study) -> list[dict[str, Any]]:
    planned = contrasts(study)
    losses = {size: _losses(study, size) for size in study.sizes}
    judged = judge(
        [difference_among(c.first, c.second, losses[study.arm(c.second).size]) for c in planned]
    )
    return [
        {
            "technique": contrast.technique,
            "size": study.arm(contrast.second).size,
            "first": contrast.first,
            "second": contrast.second,
            "seeds": list(verdict.difference.seeds),
            "df": verdict.difference.df,
            "difference": interval_values(verdict.difference.interval),
            "p": verdict.difference.p,
            "adjusted_p": verdict.adjusted_p,
            "detectable": verdict.detectable,
            "verdict": _word(verdict),
            "told": tell(verdict),
        }
        for contrast, verdict in zip(planned, judged)
    ]


def _losses(study: Study, size: str) -> dict[str, dict[int, float]]:
    """The test loss of each seed, of the arms of one size that have any."""
    arms = {arm.name: arm.values("test", "loss") for arm in study.arms if arm.size == size}
    return {name: values for name, values in arms.items() if values}


def _word(verdict: Verdict) -> str:
    """better, worse, no measurable difference, or not known."""
    interval = verdict.difference.interval
    if interval is None or verdict.adjusted_p is None:
        return "not known"
    if not verdict.is_beyond_noise:
        return "no measurable difference"
    return "better" if interval.mean < 0 else "worse"


def tell(verdict: Verdict) -> str:
    """The verdict as a sentence, with its numbers."""
    difference = verdict.difference
    first, second, interval = difference.first, difference.second, difference.interval
    if interval is None:
        return f"{second} against {first}: no seed has both, so nothing can be said"
    if interval.half_width is None:
        return (
            f"{second} against {first}: {interval.mean:+.4f} nats in one seed; without a second one "
            "seed noise is not known, and nothing can be said"
        )
    word, n = _word(verdict), interval.n
    if word == "no measurable difference":
        alone = difference.p is not None and difference.p < 1 - CONFIDENCE
        many = "; it would be one if it were the only comparison" if alone else ""
        return (
            f"{second} against {first}: no measurable difference ({interval.mean:+.4f} ± "
            f"{interval.half_width:.4f} nats; smaller than what {n} seeds can show, which is "
            f"{verdict.detectable:.4f} nats{many})"
        )
    return (
        f"{second} is {word} than {first} by {abs(interval.mean):.4f} ± {interval.half_width:.4f} "
        f"nats (beyond seed noise, {n} seeds)"
    )


# ---------------------------------------------------------------- training, routing, decoding


def _training(arm: Arm) -> dict[str, Any]:
    figures = {name: _mean_of(arm, "train", name) for name in (*_SPEEDS, *_STABILITY)}
    worst = {
        f"worst_{name}": max(arm.values("train", name).values(), default=None)
        for name in _STABILITY
    }
    seconds = [r.record.get("seconds") for r in arm.results]
    known = [float(s) for s in seconds if isinstance(s, (int, float))]
    rates = sorted({r for x in arm.results if (r := x.record.get("learning_rate")) is not None})
    return {
        "arm": arm.name,
        "learning_rates": rates,
        "seconds": fmean(known) if known else None,
        **figures,
        **worst,
    }


def _experts(evidence: Evidence, arm: Arm) -> dict[str, Any] | None:
    """Routing at the end of the runs, the mean over their layers and seeds."""
    routings = evidence.routings(arm)
    if not routings:
        return None
    counts = [layer for routing in routings for layer in routing.tokens_per_expert()]
    return {
        "arm": arm.name,
        "seeds": len(routings),
        "layers": len(routings[0].layers),
        "num_experts": len(counts[0]),
        "dead_experts": [_dead(routing) for routing in routings],
        "starved_experts": [_starved(routing) for routing in routings],
        **{name: _at_end(routings, name) for name in ROUTING},
        "worst_violation": _worst(routings),
    }


def _dead(routing: Routing) -> int:
    """Experts, over all layers, that no token chose in the last part of the run."""
    return sum(count == 0 for layer in routing.tokens_per_expert() for count in layer)


def _starved(routing: Routing) -> int:
    """Experts with less than a tenth of their even share, the dead ones among them."""
    layers = routing.tokens_per_expert()
    return sum(count < 0.1 * fmean(layer) for layer in layers for count in layer)


def _at_end(routings: list[Routing], name: str) -> dict[str, Any] | None:
    """Over the last part of each run: the mean over its layers and rows; then over the seeds."""
    means = []
    for routing in routings:
        last = routing.figures_at_end(name)
        if last is None:
            return None
        means.append(fmean(value for row in last for value in row))
    return interval_values(mean_interval(means))


def _worst(routings: list[Routing]) -> dict[str, Any] | None:
    """The layer with the highest MaxVio at the end, of any seed."""
    found: tuple[float, int] | None = None
    for routing in routings:
        last = routing.figures_at_end("max_violation")
        if last is None:
            return None
        for place, layer in enumerate(routing.layers):
            mean = fmean(row[place] for row in last)
            found = max(found or (mean, layer), (mean, layer))
    return {"value": found[0], "layer": found[1]} if found else None


def _own_warnings(study: Study) -> list[str]:
    found = []
    fewest = min((result.record for result in study.results), key=lambda record: record["steps"])
    active = fewest["shape"].get("active_params") or 0
    if told := starved(fewest["tokens"], fewest["tokens"] // max(fewest["steps"], 1), active):
        found.append(
            f"step-starved: {told}. The models are at the beginning of their training, where "
            "differences need not be those at its end"
        )
    seeds = {arm.name: len(arm.values("test", "loss")) for arm in study.arms}
    few = [name for name, count in seeds.items() if count < 3]
    if few:
        found.append(f"fewer than 3 seeds with a test loss: {', '.join(few)}")
    found += [
        f"the search of {arm.name} chose a {edge}: a better one may lie beyond"
        for arm in study.arms
        for edge in study.searches.get(arm.file_stem, {}).get("at_edge", [])
    ]
    return found
