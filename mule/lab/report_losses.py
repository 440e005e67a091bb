"""The report's sections on losses: ranking, what each technique changes, curves, sizes."""

from __future__ import annotations

from typing import Any

from mule.lab.curves import Curve, curve
from mule.lab.document import Block, Figures, Section, Table, Text
from mule.lab.findings import Evidence
from mule.lab.plot_axes import Axis
from mule.lab.plots import Bar, Figure, Line, interval_plot, line_plot
from mule.lab.wording import MISSING, of_size, plus_minus, probability

_SETTLED = 0.3  # of a run: before it the loss falls from ln(vocabulary), and would set the scale


def ranking(evidence: Evidence) -> Section:
    """Mean test losses with their intervals, the lowest first."""
    found = evidence.found
    rows = [_ranked_row(row) for row in found["ranking"]]
    columns = ["variant", "rank", "seeds", "test loss (nats)", "perplexity", "bits per byte"]
    columns += ["bits per word", "word perplexity", "validation loss"]
    columns.append(f"against {found['baseline']}")
    caption = (
        "Mean over seeds ± half width of its 95% confidence interval (Student's t). The last column "
        "is the paired difference over the same seeds, with its own interval; whether a difference is "
        "beyond seed noise is judged in the next section, for planned comparisons only."
    )
    bars = [
        Bar(row["arm"], evidence.study.arm(row["arm"]).style, **_bar(row["test"]["loss"]))
        for row in found["ranking"]
        if row["test"]["loss"]
    ]
    figure = interval_plot(
        "ranking",
        "Test loss of each variant",
        "Mean over seeds, with the 95% confidence interval where there are several seeds. Lower is "
        "better.",
        bars,
        Axis("test loss (nats per token)"),
    )
    blocks: list[Block] = [Text(_noise(found)), Table(caption, columns, rows)]
    if bars:
        blocks.append(Figures([figure]))
    if sources := _by_source(found["ranking"]):
        blocks.append(sources)
    return Section("Ranking", blocks)


def techniques(evidence: Evidence) -> Section:
    """What each technique changes, and whether it is beyond seed noise."""
    found = evidence.found
    if not found["differences"]:
        told = "There is one variant only, so there is nothing to compare."
        return Section("What each technique changes", [Text(told)])
    rows = [
        [
            row["technique"],
            f"{row['second']} − {row['first']}",
            str(len(row["seeds"])),
            MISSING if row["df"] is None else str(row["df"]),
            plus_minus(row["difference"], 4, sign=True),
            probability(row["p"]),
            probability(row["adjusted_p"]),
            f"{row['detectable']:.4f}" if row["detectable"] is not None else MISSING,
            _verdict(row),
        ]
        for row in found["differences"]
    ]
    columns = ["technique", "compared", "pairs", "df", "difference (nats)", "p", "p (Holm)"]
    columns += ["detectable", "verdict"]
    caption = (
        "Difference in test loss over the same seeds, mean ± half width of its 95% confidence "
        "interval; negative is better. p: two-sided paired t-test, in which what seeds and the other "
        "variants of the size leave unexplained counts for two degrees of freedom (df) of chance "
        "besides, and after Holm's correction for all rows of this table. "
        f"Detectable: the true difference that these seeds would find with a chance of "
        f"{found['power']:.0%}, at the level of the strictest comparison."
    )
    bars = [
        Bar(row["technique"], evidence.study.arm(row["second"]).style, **_bar(row["difference"]))
        for row in found["differences"]
        if row["difference"]
    ]
    figure = interval_plot(
        "techniques",
        "What each technique changes in test loss",
        "Paired difference with its 95% confidence interval, uncorrected. Left of zero is better.",
        bars,
        Axis("difference in test loss (nats per token)"),
    )
    table = Table(caption, columns, rows, words=(1, 8))
    title = "What each technique changes"
    return Section(title, [table, Figures([figure])] if bars else [table])


def curves(evidence: Evidence) -> Section:
    """Validation loss against tokens and against wall time."""
    axes = (("tokens", "loss-tokens", "tokens seen"), ("wall_s", "loss-time", "wall time (s)"))
    figures = [
        figure
        for size in evidence.study.sizes
        for by, name, label in axes
        if (figure := _loss_figure(evidence, by, size, name, label))
    ]
    if not figures:
        told = "No run has validation losses in its logs: the curves are missing."
        return Section("Loss over training", [Text(told, "warning")])
    told = (
        "The line is the mean over seeds, the band reaches from the lowest to the highest seed. The "
        "first part of training is cut off above. Evaluations during training may be on a part of the "
        "validation set (evaluate.max_rows). Wall time has evaluation and compiling in it."
    )
    return Section("Loss over training", [Text(told), Figures(figures)])


def sizes(evidence: Evidence) -> Section | None:
    """Loss against parameters; None where the campaign has one size."""
    study = evidence.study
    if len(study.sizes) < 2:
        return None
    ranked = {row["arm"]: row["test"]["loss"] for row in evidence.found["ranking"]}
    lines = []
    for variant in evidence.found["variants"]:
        arms = [a for a in study.arms if a.variant == variant and ranked[a.name]]
        arms = [arm for arm in arms if arm.shape.get("active_params")]
        if arms:
            losses = [ranked[arm.name] for arm in arms]
            x = [float(arm.shape["active_params"]) for arm in arms]
            low = [loss["mean"] - (loss["half_width"] or 0) for loss in losses]
            high = [loss["mean"] + (loss["half_width"] or 0) for loss in losses]
            y = [loss["mean"] for loss in losses]
            lines.append(Line(variant, arms[0].style, x, y, low, high, marks=True))
    if not lines:
        return Section("Loss against parameters", [Text("No test loss is there.", "warning")])
    figure = line_plot(
        "loss-parameters",
        "Test loss against active parameters",
        "Mean over seeds, the band is its 95% confidence interval. Sizes differ in their tokens only "
        "where the campaign says so.",
        lines,
        (Axis("active parameters", log=True), Axis("test loss (nats per token)")),
    )
    return Section("Loss against parameters", [Figures([figure])])


def step_figures(
    evidence: Evidence, name: str, title: str, told: str, key: str, label: str
) -> list[Figure]:
    """A logged figure of every arm against tokens, its y axis logarithmic; one plot for each size."""
    figures = []
    for size in evidence.study.sizes:
        lines = [
            Line(arm, evidence.study.arm(arm).style, c.x, c.mean, c.low, c.high)
            for arm, c in _curves(evidence, key, "tokens", size).items()
            if min(c.low) > 0
        ]
        if lines:
            axes = (Axis("tokens seen"), Axis(label, log=True))
            file = of_size(name, size, "-")
            figures.append(line_plot(file, of_size(title, size), told, lines, axes))
    return figures


# ---------------------------------------------------------------- inside


def _ranked_row(row: dict[str, Any]) -> list[str]:
    test, valid = row["test"], row["valid"]
    is_baseline = row["against_baseline"] is None
    return [
        row["arm"],
        str(row["rank"]) if test["loss"] else MISSING,
        str(len(row["seeds"])),
        plus_minus(test["loss"], 4),
        plus_minus(test["perplexity"], 2),
        plus_minus(test["bits_per_byte"], 4),
        plus_minus(test["bits_per_word"], 3),
        plus_minus(test["word_perplexity"], 1),
        plus_minus(valid["loss"], 4),
        "–" if is_baseline else plus_minus(row["against_baseline"], 4, sign=True),
    ]


def _by_source(ranked: list[dict[str, Any]]) -> Table | None:
    """Test losses of each source of the test set; None where it has one."""
    names = sorted({name for row in ranked for name in row["test"]["by_source"]})
    if not names:
        return None
    rows = [
        [row["arm"], *(plus_minus(row["test"]["by_source"].get(name), 4) for name in names)]
        for row in ranked
    ]
    return Table(
        "Test loss of each source, mean over seeds ± 95% interval.", ["variant", *names], rows
    )


def _noise(found: dict[str, Any]) -> str:
    noise = found["seed_noise"]
    if noise is None:
        return (
            "No variant has two seeds: how much the loss varies by chance is not known, and the order "
            "below may be chance."
        )
    return (
        f"Seed noise: the test loss of one variant varies between seeds with a standard deviation of "
        f"{noise['sd']:.4f} nats (pooled over variants, {noise['df']} degrees of freedom)."
    )


def _verdict(row: dict[str, Any]) -> str:
    word = row["verdict"]
    return f"{word}, beyond seed noise" if word in ("better", "worse") else word


def _bar(interval: dict[str, Any]) -> dict[str, Any]:
    return {"value": interval["mean"], "half_width": interval["half_width"]}


def _curves(evidence: Evidence, key: str, by: str, size: str) -> dict[str, Curve]:
    """Of each arm of a size that has the figure."""
    arms = [arm.name for arm in evidence.study.arms if arm.size == size]
    found = {arm: curve(evidence.rows[arm], key, by) for arm in arms}
    return {arm: c for arm, c in found.items() if c is not None}


def _loss_figure(evidence: Evidence, by: str, size: str, name: str, label: str) -> Figure | None:
    found = _curves(evidence, "val_loss", by, size)
    if not found:
        return None
    lines = [
        Line(arm, evidence.study.arm(arm).style, c.x, c.mean, c.low, c.high)
        for arm, c in found.items()
    ]
    settled = [
        value for c in found.values() for x, value in zip(c.x, c.high) if x >= _SETTLED * max(c.x)
    ]
    low = min(min(c.low) for c in found.values())
    high = max(settled) if settled else None
    room = 0.06 * (high - low) if high is not None and high > low else 0.1
    axis = Axis(
        "validation loss (nats per token)",
        low=low - room,
        high=None if high is None else high + room,
    )
    words = {"tokens": "tokens", "wall_s": "wall time"}[by]
    return line_plot(
        of_size(name, size, "-"),
        of_size(f"Validation loss against {words}", size),
        f"At the end: {', '.join(f'{arm} {c.mean[-1]:.4f}' for arm, c in found.items())}.",
        lines,
        (Axis(label), axis),
    )
