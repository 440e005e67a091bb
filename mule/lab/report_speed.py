"""The report's sections on speed: training, stability, decoding with and without a cache, compiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mule.lab.document import Block, Figures, Section, Table, Text
from mule.lab.findings import Evidence
from mule.lab.plot_axes import Axis
from mule.lab.plots import Bar, Figure, Line, interval_plot, line_plot
from mule.lab.records import Arm, Row
from mule.lab.report_losses import step_figures
from mule.lab.wording import (
    MISSING,
    mebibytes,
    number,
    of_size,
    percent,
    plus_minus,
    seconds,
    short,
    size_in_bytes,
)


def training(evidence: Evidence) -> Section:
    """Tokens a second, share of the matmul peak, memory."""
    found = evidence.found["training"]
    rows = [
        [
            row["arm"],
            plus_minus(row["tokens_per_second"], 0),
            percent(_mean(row["share_of_peak"])),
            _of_baseline(evidence, row),
            mebibytes(_mean(row["peak_memory_bytes"])),
            seconds(row["seconds"]),
        ]
        for row in found
    ]
    columns = ["variant", "tokens/s", "share of peak", "of the baseline's", "peak memory"]
    columns.append("time of a run")
    caption = (
        "Mean over seeds ± half width of the 95% interval. Share of peak: useful FLOP/s over the best "
        "matmul measured on the same machine; the fourth column is that share against the "
        "baseline's."
    )
    bars = [
        Bar(row["arm"], evidence.study.arm(row["arm"]).style, speed["mean"], speed["half_width"])
        for row in found
        if (speed := row["tokens_per_second"])
    ]
    blocks: list[Block] = [Table(caption, columns, rows)]
    if bars:
        told = "Mean over seeds; the whisker is the 95% confidence interval."
        axis = Axis("training tokens per second")
        title = "Training speed"
        blocks.append(
            Figures([interval_plot("training-speed", title, told, bars, axis, from_zero=True)])
        )
    return Section("Training speed and memory", blocks)


def stability(evidence: Evidence) -> Section:
    """Gradient norms, spikes, refused updates."""
    rows = [
        [
            row["arm"],
            plus_minus(row["mean_grad_norm"], 3),
            number(row["worst_max_grad_norm"], 2),
            plus_minus(row["num_spikes"], 1),
            number(row["worst_num_spikes"]),
            plus_minus(row["refused_updates"], 1),
        ]
        for row in evidence.found["training"]
    ]
    columns = ["variant", "gradient norm, mean", "highest of any seed", "loss spikes a run"]
    columns += ["most of any seed", "refused updates"]
    caption = (
        "Gradient norms before clipping. A spike is a loss far above those just before it; a refused "
        "update had a loss or gradient that was not finite, or far too large."
    )
    figures = step_figures(
        evidence,
        "gradient-norm",
        "Gradient norm over training",
        "Mean over seeds, the band reaches from the lowest to the highest seed.",
        "grad_norm",
        "gradient norm",
    )
    blocks: list[Block] = [Table(caption, columns, rows)]
    return Section("Stability", [*blocks, Figures(figures)] if figures else blocks)


def decoding(evidence: Evidence) -> Section:
    """Tokens a second with and without a cache, and what the cache takes."""
    found = evidence.found["decoding"]
    blocks: list[Block] = []
    if found:
        batches = (row["batch"] for one in found for row in one.get("rows", []))
        batch = min(batches, default=1)
        blocks.append(Text(_decode_setup(found, batch)))
        blocks.append(_decode_table(found, batch))
        if larger := _larger_batches(found, batch):
            blocks.append(larger)
        for size in evidence.study.sizes:
            own = [one for one in found if evidence.study.arm(one["arm"]).size == size]
            if figures := _decode_figures(evidence, own, batch, size):
                blocks.append(Figures(figures))
    else:
        blocks.append(Text("Decoding was not measured: its speeds are missing.", "warning"))
    blocks.append(_cache_table(evidence))
    return Section("Decoding, and the KV cache", blocks)


def compiling(evidence: Evidence) -> Section:
    """Graph breaks, recompiles, what compiling gains."""
    rows = []
    for arm in evidence.study.arms:
        found = evidence.study.compiled.get(arm.file_stem)
        if found is not None:
            rows.append(
                [
                    arm.name,
                    number(found.get("graph_breaks")),
                    number(found.get("recompiles")),
                    number(found.get("compile_s"), 1),
                    f"{found['gain']:.2f}×" if found.get("gain") else MISSING,
                ]
            )
    if not rows:
        told = (
            "Compiling was not measured: graph breaks, recompiles and gain are missing. "
            "compile_table=true measures them: mule lab run CAMPAIGN.yaml compile_table=true"
        )
        return Section("Compiling", [Text(told, "warning")])
    caption = "Gain: tokens per second of training, compiled against not compiled."
    columns = ["variant", "graph breaks", "recompiles", "compile time (s)", "gain"]
    return Section("Compiling", [Table(caption, columns, rows)])


# ---------------------------------------------------------------- training


def _mean(interval: Row | None) -> float | None:
    return interval["mean"] if interval else None


def _of_baseline(evidence: Evidence, row: Row) -> str:
    study = evidence.study
    size = study.arm(row["arm"]).size
    base = study.baseline_of(size)
    known = {one["arm"]: _mean(one["share_of_peak"]) for one in evidence.found["training"]}
    own, its = known[row["arm"]], known.get(base.name) if base else None
    return percent(own / its, 0) if own and its else MISSING


# ---------------------------------------------------------------- decoding


def _decode_setup(found: list[Row], batch: int) -> str:
    precisions = sorted({str(one.get("precision")) for one in found})
    engines = sorted({str(one["engine"]) for one in found if one.get("engine")})
    errors = [one["max_error"] for one in found if one.get("max_error") is not None]
    checked = (
        f"Cached logits were compared with uncached ones first: they differ by at most "
        f"{max(errors):.2g}."
        if errors
        else "The difference of cached and uncached logits is missing."
    )
    where = f", by {' and '.join(engines)}" if engines else ""
    return (
        f"Measured in {' and '.join(precisions)}{where}; prompt and decoding apart, greedy, nothing "
        f"stops the text, warm-up untimed. {checked} Without a cache the whole text is computed again "
        f"for every token. The tables and plots are for a batch of {batch}."
    )


def _rows_by_place(one: Row, batch: int | None = None) -> dict[tuple[int, int], dict[bool, Row]]:
    """(batch, context) -> cached or not -> row."""
    found: dict[tuple[int, int], dict[bool, Row]] = {}
    for row in one.get("rows", []):
        if batch in (None, row["batch"]):
            found.setdefault((row["batch"], row["context"]), {})[bool(row["cached"])] = row
    return dict(sorted(found.items()))


def _decode_table(found: list[Row], batch: int) -> Table:
    rows = []
    for one in found:
        for (_, context), both in _rows_by_place(one, batch).items():
            cached, whole = both.get(True, {}), both.get(False, {})
            gain = _gain(one, (batch, context), both)
            rows.append(
                [
                    one["arm"],
                    number(context),
                    _rate(cached),
                    _rate(whole),
                    f"{gain['gain']:.1f}×" if gain.get("gain") else MISSING,
                    f"{gain['predicted']:.1f}×" if gain.get("predicted") else MISSING,
                    percent(gain.get("share"), 0),
                    number(cached.get("prefill_tokens_per_second")),
                    _milliseconds(cached.get("time_to_first_token_s")),
                    percent(cached.get("share_of_bandwidth"), 0),
                ]
            )
    columns = ["variant", "context", "tokens/s, cache", "tokens/s, none", "gain", "predicted"]
    columns += ["of predicted", "prefill tokens/s", "first token (ms)", "of bandwidth"]
    caption = (
        "Decoding speed, mean ± standard deviation of repetitions. Predicted: from the measured rate "
        "of a forward pass and the measured bandwidth of memory. More than all of the bandwidth means "
        "that the model stays in the processor's caches."
    )
    return Table(caption, columns, rows)


def _larger_batches(found: list[Row], batch: int) -> Table | None:
    rows = [
        [
            one["arm"],
            number(place[0]),
            number(place[1]),
            _rate(both.get(True, {})),
            _rate(both.get(False, {})),
        ]
        for one in found
        for place, both in _rows_by_place(one).items()
        if place[0] > batch
    ]
    if not rows:
        return None
    columns = ["variant", "batch", "context", "tokens/s, cache", "tokens/s, none"]
    return Table("Larger batches: tokens per second of all texts together.", columns, rows)


def _gain(one: Row, place: tuple[int, int], both: dict[bool, Row]) -> Row:
    """As the measurement gives it; else from the two rates, and from what they can reach."""
    for gain in one.get("gains", []):
        if (gain["batch"], gain["context"]) == place:
            return gain
    cached, whole = both.get(True), both.get(False)
    if not cached or not whole:
        return {}
    measured = cached["decode_tokens_per_second"] / whole["decode_tokens_per_second"]
    share, rate = cached.get("share_of_bandwidth"), cached.get("prefill_tokens_per_second")
    if not share or not rate:
        return {"gain": measured}
    ceiling = cached["decode_tokens_per_second"] / share
    predicted = min(ceiling, rate) * place[1] / rate
    return {"gain": measured, "predicted": predicted, "share": measured / predicted}


def _decode_figures(evidence: Evidence, found: list[Row], batch: int, size: str) -> list[Figure]:
    speeds = {
        cached: _lines(evidence, found, batch, lambda one, place, both, c=cached: _speed(both, c))
        for cached in (True, False)
    }
    gains = _lines(
        evidence, found, batch, lambda one, place, both: _gain(one, place, both).get("gain")
    )
    shares = _lines(
        evidence, found, batch, lambda one, place, both: _gain(one, place, both).get("share")
    )
    x = Axis("context (tokens)", log=True)
    rate, of_prediction = "tokens per second", Axis("share of the prediction", low=0)
    plans = (
        ("decode-cached", "Decoding with the cache", speeds[True], Axis(rate, low=0)),
        ("decode-uncached", "Decoding without a cache", speeds[False], Axis(rate, log=True)),
        ("decode-gain", "Gain of the cache", gains, Axis("times as fast", log=True)),
        ("decode-share", "Gain, measured over predicted", shares, of_prediction),
    )
    return [
        line_plot(of_size(name, size, "-"), of_size(title, size), _ends(lines), lines, (x, y))
        for name, title, lines, y in plans
        if lines
    ]


def _lines(evidence: Evidence, found: list[Row], batch: int, value: Any) -> list[Line]:
    lines = []
    for one in found:
        places = _rows_by_place(one, batch).items()
        points = [(float(p[1]), v) for p, both in places if (v := value(one, p, both))]
        if points:
            x, y = zip(*points)
            style = evidence.study.arm(one["arm"]).style
            lines.append(Line(one["arm"], style, x, y, marks=True))
    return lines


def _speed(both: dict[bool, Row], cached: bool) -> float | None:
    return both.get(cached, {}).get("decode_tokens_per_second")


def _ends(lines: Sequence[Line]) -> str:
    last = max(line.x[-1] for line in lines)
    told = [f"{line.name} {short(line.y[-1])}" for line in lines if line.x[-1] == last]
    return f"At {last:,.0f} tokens: {', '.join(told)}."


def _rate(row: Row) -> str:
    rate = row.get("decode_tokens_per_second")
    if rate is None:
        return MISSING
    std = row.get("decode_std")
    return number(rate, 1) if std is None else f"{rate:,.1f} ± {std:,.1f}"


def _milliseconds(value: Any) -> str:
    return number(value * 1000, 1) if value is not None else MISSING


# ---------------------------------------------------------------- the cache


def _cache_table(evidence: Evidence) -> Table:
    base: dict[str | None, float] = {}
    for arm in evidence.study.arms:
        if arm.variant == evidence.study.baseline and arm.shape.get("kv_bytes_per_token"):
            base[arm.size] = arm.shape["kv_bytes_per_token"]
    rows = []
    for arm in evidence.study.arms:
        recorded, formula = arm.shape.get("kv_bytes_per_token"), kv_formula_bytes(arm)
        first = base.get(arm.size)
        longest = _longest(evidence, arm)
        rows.append(
            [
                arm.name,
                size_in_bytes(recorded),
                size_in_bytes(formula),
                percent(recorded / first, 1) if first and recorded is not None else MISSING,
                _head_share(arm),
                size_in_bytes(arm.shape.get("state_bytes")),
                number(longest.get("context")),
                size_in_bytes(longest.get("cache_bytes")),
                size_in_bytes(longest.get("cache_formula_bytes")),
            ]
        )
    columns = ["variant", "KV bytes/token", "by the formula", "of the baseline's", "n_kv / n_head"]
    columns += ["state bytes", "measured at", "cache in memory", "its formula"]
    caption = (
        "Bytes of cache per token against 2 × attention layers × key/value heads × head size × 2 bytes, "
        "computed here from the settings of the run; and, where decoding was measured, the whole cache "
        "as it lay in memory."
    )
    return Table(caption, columns, rows)


def kv_formula_bytes(arm: Arm) -> int | None:
    """Bytes of keys and values for one token at 2 bytes a number; None without the run's settings."""
    model = arm.settings.get("model") or {}
    layers = _attention_layers(model)
    if layers is None:
        return None
    if layers == 0:
        return 0
    heads, width = model.get("num_heads"), model.get("hidden_size")
    if not heads or not width:
        return None
    kv_heads = model.get("num_kv_heads") or heads
    return 2 * layers * kv_heads * (model.get("head_dim") or width // heads) * 2


def _attention_layers(model: Row) -> int | None:
    layers, mamba = model.get("num_layers"), model.get("mamba") or {}
    if layers is None:
        return None
    is_mamba = model.get("family") == "jamba" or (
        model.get("family") == "granitemoehybrid" and mamba.get("kind") != "none"
    )
    if not is_mamba:
        return int(layers)
    every = mamba.get("attention_every")
    return int(layers) // int(every) if every else 0


def _head_share(arm: Arm) -> str:
    model = arm.settings.get("model") or {}
    heads = model.get("num_heads")
    if not heads or _attention_layers(model) == 0:
        return "–" if model else MISSING
    return f"{model.get('num_kv_heads') or heads} / {heads}"


def _longest(evidence: Evidence, arm: Arm) -> Row:
    """The row of the longest context whose cache was measured."""
    found = evidence.study.decode.get(arm.file_stem) or {}
    rows = [row for row in found.get("rows", []) if row.get("cache_bytes") is not None]
    least = min((row["batch"] for row in rows), default=0)
    rows = [row for row in rows if row["batch"] == least]
    return max(rows, key=lambda row: row["context"], default={})
