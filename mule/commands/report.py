"""report.md: what became of a run, in words, figures and curves, and what comes next."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.run import Run

if TYPE_CHECKING:
    from mule.doctor.examine import Examination
    from mule.doctor.history import History

REPORT, CURVES = "report.md", "report.svg"
_SHOWN_ANSWERS, _ANSWER_CHARS = 3, 160
_DONE = {True: "x", False: " "}


def write_report(run: Run, *, curves: bool = True) -> Path:
    """Write report.md into the run's folder; its curves too, where matplotlib is installed."""
    from mule.commands.life import stages
    from mule.doctor.examine import examination
    from mule.doctor.history import read_history

    history = read_history(run)
    found = examination(history)
    picture = _draw(run, history) if curves else "asked"
    parts = [
        _head(history, found),
        _figures(history),
        _picture(picture, run),
        _findings(history, found),
        _answers(history),
        _life(stages(run, history)),
    ]
    file = run.folder / REPORT
    fsio.write_text(file, "\n".join(part for part in parts if part))
    return file


# ---------------------------------------------------------------- in words


def _head(history: History, found: Examination) -> str:
    from mule.commands.doctor import verdict

    epochs = history.series("epoch")
    passes = f", {epochs.values[-1]:.3g} passes over the data" if len(epochs) else ""
    what = {"pretrain": "a new model", "fine-tune": "all weights", "adapter": "an adapter"}
    base = history.recipe.model.path
    of = f" of `{base}`" if history.kind == "fine-tune" else f" on `{base}`" if base else ""
    return (
        f"# {history.name}\n\n**{verdict(found.findings).capitalize()}.** Trained: "
        f"{what[history.kind]}{of}; {history.step:,} of {history.num_steps:,} updates{passes}.\n\n"
        f"{interpretation(history)}\n"
    )


def interpretation(history: History) -> str:
    """What the losses say, in plain words."""
    from mule.doctor import signals
    from mule.doctor.phases import recent, start

    loss, valid = history.series("loss"), history.series("val_loss")
    if not len(loss):
        return "No update was made that could be measured."
    first = signals.median(start(loss, most=5).values)
    last = signals.median(recent(loss, 0.05).values)
    told = [f"The training loss went from {first:.3f} to {last:.3f} nats a token."]
    if len(valid):
        told.append(_validation(valid.steps, valid.values))
        end = min(valid.values)
    else:
        told.append("Nothing was held out, so nothing says how it does on rows it has not seen.")
        end = last
    told.append(
        f"At {end:.3f} it is, from token to token, as unsure as among {math.exp(end):.3g} words that "
        "are equally likely."
    )
    return " ".join(told)


def _validation(steps: Any, losses: Any) -> str:
    lowest = min(losses)
    best = steps[list(losses).index(lowest)]
    if len(losses) == 1:
        return f"On rows held out from training the loss is {losses[0]:.3f}."
    told = f"On rows held out from training it went from {losses[0]:.3f} to {losses[-1]:.3f}"
    if losses[-1] <= 1.002 * lowest:
        return f"{told}: what was learned holds for rows it has not seen."
    return f"{told}; it was lowest after update {best:,} ({lowest:.3f}): use that checkpoint."


# ---------------------------------------------------------------- figures


def _figures(history: History) -> str:
    from mule.doctor import signals

    rows = [
        _row("training loss", history, "loss", "{:.4f}"),
        _row("validation loss", history, "val_loss", "{:.4f}"),
        _row("learning rate", history, "learning_rate", "{:.2e}"),
        _row("gradient norm", history, "grad_norm", "{:.3g}"),
        _row("memory (GiB)", history, "memory_bytes", "{:.2f}", 2**30),
        _row("tokens a second", history, "tokens_per_second", "{:,.0f}"),
    ]
    targets = history.series("num_targets")
    refused = sum(event["kind"] == "update refused" for event in history.events)
    head = "| | first | lowest | highest | last |\n| --- | --: | --: | --: | --: |\n"
    told = f"{sum(targets.values):,.0f} tokens were trained on"
    if len(targets):
        told += f", about {signals.median(targets.values):,.0f} an update"
    if refused:
        told += f"; {refused} updates were refused"
    return f"## Figures\n\n{head}{''.join(rows)}\n{told}.\n"


def _row(title: str, history: History, name: str, form: str, unit: float = 1.0) -> str:
    values = [value / unit for value in history.series(name).values]
    if not values:
        return ""
    cells = (values[0], min(values), max(values), values[-1])
    return f"| {title} | {' | '.join(form.format(cell) for cell in cells)} |\n"


def _draw(run: Run, history: History) -> str:
    """Draw the curves; what stands in their way, or nothing."""
    if not len(history.series("loss")):
        return "empty"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return "missing"
    from mule.commands.plot import curve_of
    from mule.commands.report_curves import draw_curves

    draw_curves(history, curve_of(run, "steps"), run.folder / CURVES)
    return ""


def _picture(obstacle: str, run: Run) -> str:
    told = {
        "": f"![loss, learning rate, gradient norm and memory]({CURVES})\n",
        "empty": "",
        "asked": f"`mule doctor {run.folder} --report` draws the curves.\n",
        "missing": "The curves need matplotlib: `pip install matplotlib`, then "
        f"`mule doctor {run.folder} --report`.\n",
    }
    return told[obstacle]


# ---------------------------------------------------------------- findings, answers, life


def _findings(history: History, found: Examination) -> str:
    from mule.commands.doctor import explanation
    from mule.doctor.rules import all_rules

    rules = {rule.code: rule for rule in all_rules()}
    parts = ["## What the doctor says\n"]
    for finding in found.findings:
        said = finding.found
        why = explanation(rules[finding.code])[1].get("Why it matters", "")
        parts.append(
            f"- **{said.severity}: {finding.title}** ({finding.code}), since update {said.step:,}: "
            f"{said.what}. Try `{said.remedy}`. {why}"
        )
    if not found.findings:
        parts.append("Nothing was found.")
    looked = ", ".join(rule.code for rule in found.looked)
    parts.append(f"\nRules that looked: {looked}.")
    if found.unable:
        told = ", ".join(f"{rule.code} (lacks {', '.join(names)})" for rule, names in found.unable)
        parts.append(f"Rules that could not: {told}.")
    return "\n".join(parts) + "\n"


def _answers(history: History) -> str:
    if not history.samples:
        return ""
    first, last = history.samples[0]["answers"], history.samples[-1]["answers"]
    lines = ["## Answers\n"]
    for prompt in list(last)[:_SHOWN_ANSWERS]:
        lines.append(f"- {_one_line(prompt)}")
        if prompt in first and len(history.samples) > 1:
            lines.append(f"  - at first: {_one_line(first[prompt])}")
        lines.append(f"  - at the end: {_one_line(last[prompt])}")
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    line = " ".join(text.split()).replace("`", "'")
    return f"`{line[:_ANSWER_CHARS]}`" if line else "(nothing)"


def _life(found: list[dict[str, Any]]) -> str:
    lines = ["## From base to file\n"]
    for stage in found:
        following = f"; next: `{stage['next']}`" if stage["next"] else ""
        lines.append(f"- [{_DONE[stage['done']]}] **{stage['stage']}**: {stage['what']}{following}")
    return "\n".join(lines) + "\n"
