"""docs/accuracy.md: how right plan, doctor and forecast are, from what their benches measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands.docs_table import table

PAGE = "accuracy.md"
_TEXT = """\
# How right is what Mule says?

<!-- Generated from bench/results by `make docs`. -->

Mule says whether a run will fit and how long it will take ([plan](plan.md)), whether it is healthy
([doctor](is-my-run-healthy.md)) and where it will end ([forecast](forecast.md)). Each was held
against what then came, on runs that played no part in making it. What `mule verify` catches is in
[verify](verify.md).

"""
_FORECASTS = {
    "loss": "training loss at the end",
    "val_loss": "validation loss at the end",
    "best_val_loss": "lowest validation loss",
    "doubled": "lowest with twice the updates or data",
    "before": "validation loss, before the start",
}
_JUDGED, _JUDGED_OTHERS = (0.25, 0.5, 0.75), (0.0, 0.5, 1.0)
_MIB = 2**20


def accuracy_markdown(results: Path) -> str:
    """The whole page."""
    parts = (
        ("Plan", "plan", plan_markdown, "make bench-plan"),
        ("Doctor", "doctor", doctor_markdown, "python -m bench.doctor run part=held-out"),
        ("Forecast", "forecast", forecast_markdown, "python -m bench.forecast run"),
    )
    page = _TEXT
    for title, name, markdown, command in parts:
        file = results / f"{name}.json"
        text = f"Not measured yet: `{command}`, then `make docs`."
        if file.is_file() and is_whole(found := fsio.read_json(file)):
            text = markdown(found)
        page += f"## {title}\n\n{text}\n\n"
    return page.rstrip() + "\n"


def is_whole(found: dict[str, Any]) -> bool:
    """Whether a bench that keeps each run as it ends has come to its end."""
    return all("error" in row for row in found.get("cases", []))


# ---------------------------------------------------------------- plan


def plan_markdown(found: dict[str, Any]) -> str:
    """The errors, then a row for each run."""
    lines = [_plan_summary(found), ""]
    columns = "run", "constants", "memory, predicted", "measured", "error"
    columns += "update, predicted", "measured", "error"
    rows = [_plan_row(row) for row in found["cases"]]
    return "\n".join([*lines, table(columns, rows, num_words=2).rstrip()])


def _plan_summary(found: dict[str, Any]) -> str:
    told = []
    for name, figures in found["summary"].items():
        errors = [
            f"{what} {figures[what]['median_error']:.1%} (95% of runs within "
            f"{figures[what]['p95_error']:.0%})"
            for what in ("memory", "time")
            if what in figures
        ]
        missed = len(figures["fits_that_did_not"])
        told.append(
            f"- **{name}**, {figures['runs']} runs: median error of {', of '.join(errors)}; "
            f"{missed} would have been said to fit that did not"
        )
    machine = found["machine"]
    return (
        "Peak memory of the process and seconds of an update, predicted and measured. The constants "
        "were fitted on one half of the runs; the half held out is what counts.\n\n"
        + "\n".join(told)
        + f"\n\n`{found['command']}`, {found['date']}, {machine['cpu']}, {machine['cores']} cores."
    )


def _plan_row(row: dict[str, Any]) -> tuple[str, ...]:
    predicted, measured, error = row["predicted"], row["measured"], row["error"]
    seconds = f"{measured['update_s']:.3f} s" if "update_s" in error else "-"
    return (
        row["name"],
        "fitted" if row["fits"] else "held out",
        f"{predicted['peak_bytes'] / _MIB:,.0f} MiB",
        f"{measured['peak_bytes'] / _MIB:,.0f} MiB",
        f"{error['peak_bytes']:+.0%}",
        f"{predicted['update_s']:.3f} s",
        seconds,
        f"{error['update_s']:+.0%}" if "update_s" in error else "-",
    )


# ---------------------------------------------------------------- doctor


def doctor_markdown(found: dict[str, Any]) -> str:
    """Recall, false alarms and time of the part held out; a row for each kind of fault."""
    held_out, seen = found["held-out"], found.get("development")
    lines = [
        f"Really trained small models with a planted fault, and healthy ones. {_doctor_words(held_out)} "
        "Models, data and seeds of these runs were kept from those who wrote the rules."
    ]
    lines += _on_repeating_data(held_out)
    if seen:
        lines += ["", f"On the runs that the rules were made with: {_doctor_words(seen)}"]
    rows = [_fault_row(row) for row in held_out["faults"]]
    columns = "planted", "found", "95% interval", "by", "known after"
    alarms = [
        f"- {row['setting']}: {', '.join(row['codes'])}" for row in held_out["healthy"]["which"]
    ]
    lines += ["", table(columns, rows, num_words=1).rstrip()]
    if alarms:
        lines += ["", "False alarms:", "", *alarms]
    commands = ", ".join(f"`{command}`" for command in found["commands"])
    return "\n".join([*lines, "", f"{commands}, {found['date']}."])


def _on_repeating_data(part: dict[str, Any]) -> list[str]:
    """Of runs that were set out as healthy on data that was not."""
    found, healthy = part["repeating"], part["healthy"]
    if not found["runs"]:
        return []
    others = f"; it also says {', '.join(found['other_codes'])}" if found["other_codes"] else ""
    runs, alarms = healthy["runs"] + found["runs"], healthy["false_alarms"] + found["told"]
    return [
        "",
        f"{found['runs']} more runs were set out as healthy, on published chats of which "
        f"{found['least_share']:.0%} or more are equal to one before, as comparing the lines of the "
        f"file shows. The doctor says so (D501) of {found['told']} of them{others}. They count neither "
        f"way here; counted as first set out, it would be {alarms} of {runs}.",
    ]


def _doctor_words(part: dict[str, Any]) -> str:
    recall, healthy = part["recall"], part["healthy"]
    found = (
        f"**{recall['found']} of {recall['runs']} faults found** ({_between(recall['interval'])})"
    )
    if recall["median_share"] is not None:
        found += f", known after {recall['median_share']:.0%} of the run (median)"
    return (
        f"{found}; **{healthy['false_alarms']} of {healthy['runs']} healthy runs with a warning** "
        f"({_between(healthy['interval'])})."
    )


def _fault_row(row: dict[str, Any]) -> tuple[str, ...]:
    after = "-" if row["median_share"] is None else f"{row['median_share']:.0%} of the run"
    return (
        row["title"],
        f"{row['found']} of {row['runs']}",
        _between(row["interval"]),
        ", ".join(row["expected"]),
        after,
    )


# ---------------------------------------------------------------- forecast


def forecast_markdown(found: dict[str, Any]) -> str:
    """How often the interval held, and how far off the forecast and two naive ones were."""
    columns = "forecast of", "at", "runs", "80% interval held", "band", "median error"
    columns += "last value", "straight line"
    rows = [
        _forecast_row(title, row)
        for figure, title in _FORECASTS.items()
        for row in found["rows"]
        if row["figure"] == figure and row["kind"] == "all" and _is_judged(row)
    ]
    return "\n".join(
        [
            table(columns, rows, num_words=1).rstrip(),
            "",
            f"{found['num_runs']} finished runs on {found['num_data_sets']} data sets, each tried with "
            "the errors on the other data sets alone; the method itself was made with many of these "
            "runs at hand. *Band*: where the share lies in 95% of cases when the interval is right and "
            "the runs are independent. Errors in nats a token; of the forecast before the start, the "
            "last two are the mean of the comparable runs and the nearest of them in length. "
            f"{_rises(found['verdicts'])} `{found['command']}`, {found['date']}.",
        ]
    )


def _rises(said: dict[str, int]) -> str:
    right, total = said["said and came"] + said["neither"], sum(said.values())
    return (
        "Whether the validation loss would rise by the end was told right at half of the run in "
        f"{right} of {total} runs: {said['said and came']} rises foreseen, {said['came unsaid']} not, "
        f"{said['said, did not come']} false."
    )


def _is_judged(row: dict[str, Any]) -> bool:
    ends = row["figure"] in ("loss", "val_loss", "best_val_loss")
    return row["share"] in (_JUDGED if ends else _JUDGED_OTHERS)


def _forecast_row(title: str, row: dict[str, Any]) -> tuple[str, ...]:
    held = f"{row['covered']:.0%}" + ("" if row["inside_band"] else " (outside)")
    return (
        title,
        f"{row['share']:.0%}" if row["share"] else "start",
        str(row["num_runs"]),
        held,
        _between(row["band"]),
        f"{row['median_error']:.3f}",
        f"{row['median_error_last_value']:.3f}",
        f"{row['median_error_straight_line']:.3f}",
    )


# ---------------------------------------------------------------- words


def _between(interval: Iterable[float]) -> str:
    low, high = interval
    return f"{low:.0%} to {high:.0%}"
