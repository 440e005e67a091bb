"""The page of `mule plan`: the verdict, memory, disk and time by part, and what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.figures import duration, in_bytes, short

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}
_LABEL = 10


def show_plan(console: Console, result: dict[str, Any]) -> None:
    """The whole page; of a campaign, its figures as they are."""
    if "verdict" not in result:
        render.print_result(console, result)
        return
    _verdict(console, result)
    _parts(console, "memory", result["memory"], in_bytes)
    _line(console, "", f"the most is held in: {result['peak_in']}")
    _parts(console, "disk", result["disk"], in_bytes, total=in_bytes(result["disk_bytes"]))
    _parts(console, "time", result["seconds"], duration, total=duration(result["seconds_total"]))
    _line(console, "", _speed(result))
    _line(console, "length", _length(result["counts"]))
    _line(console, "settings", ", ".join(f"{k}={v}" for k, v in result["settings"].items()))
    _line(console, "loss", _forecast(result["forecast"]))
    if (bill := _bill(result)) is not None:
        _line(console, "bill", bill)
    if result["remedies"]:
        _remedies(console, result["remedies"])
    for text in result["notes"]:
        _line(console, "note", text)
    if not result["calibrated"]:
        _line(console, "basis", f"not calibrated. {result['basis']}")
    if "rehearsed" in result:
        _line(console, "tried", result["rehearsed"])


def _verdict(console: Console, result: dict[str, Any]) -> None:
    from rich.text import Text

    needed, free = result["memory_bytes"], result["free_bytes"]
    left = free - needed
    told = f"{in_bytes(left)} to spare" if left >= 0 else f"{in_bytes(-left)} are missing"
    text = f"  {in_bytes(needed)} of {in_bytes(free)} free on {result['machine']}: {told}"
    console.print(Text.assemble((result["verdict"], _STYLES[result["verdict"]]), text))
    if not result["disk_fits"]:
        size, there = in_bytes(result["disk_bytes"]), in_bytes(result["free_disk_bytes"])
        _line(
            console, "disk", f"does not fit: {size} needed, {there} free; checkpoint.keep=1 helps"
        )


def _parts(
    console: Console, name: str, parts: dict[str, float], show: Any, total: str | None = None
) -> None:
    told = " · ".join(f"{part} {show(size)}" for part, size in parts.items())
    _line(console, name, f"{total} = {told}" if total else told)


def _speed(result: dict[str, Any]) -> str:
    per_update = duration(result["update_s"])
    rate = f"{short(result['tokens_per_second'])} tokens/s"
    return f"{per_update} an update, {rate}, {result['share_of_peak']:.0%} of peak"


def _length(counts: dict[str, float]) -> str:
    updates, epochs = counts["updates"], counts["epochs"]
    size = f"{counts['rows_an_update']:,} rows of {counts['row_length']:,} tokens"
    return (
        f"{updates:,} updates of {size} = {epochs:.3g} epochs of {counts['rows']:,} rows; "
        f"{short(counts['tokens'])} tokens, {short(counts['trained_tokens'])} of them trained; "
        f"{counts['evaluations']:,} evaluations, {counts['checkpoints']:,} checkpoints"
    )


def _forecast(found: dict[str, Any]) -> str:
    """The validation loss at milestones, or why it cannot be told."""
    if not found["milestones"]:
        return str(found["cannot"])
    told = [
        f"update {row['step']:,} {row['val_loss']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        for row in found["milestones"]
    ]
    count = len(found["runs"])
    return f"validation, 80% intervals, from {count} finished runs: {' · '.join(told)}"


def _bill(result: dict[str, Any]) -> str | None:
    told = []
    if result["cost"] is not None:
        told.append(f"cost {result['cost']:,.2f}")
    if result["energy_kwh"] is not None:
        told.append(f"energy {result['energy_kwh']:,.3g} kWh at the most")
    return ", ".join(told) or None


def _remedies(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ["change", "harm", "memory", "then it"]
    cells = [
        [row["set"], row["harm"], in_bytes(row["memory_bytes"]), _then(row["verdict"])]
        for row in rows
    ]
    render.print_table(console, "\nTo make it fit, the least harm first", columns, cells)
    render.print_line(console, "")


def _then(verdict: str) -> str:
    return {"tight": "is tight"}.get(verdict, verdict)


def _line(console: Console, label: str, text: str) -> None:
    render.print_line(console, f"{label:<{_LABEL}}{text}")
