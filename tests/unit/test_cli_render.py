"""What the terminal and a log file show."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
from rich.console import Console

from mule import progress
from mule.cli import render
from mule.figures import duration, figure, figures_line, in_bytes, short


def plain_console() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=120, highlight=False), out


def clock(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """A clock that goes on by `step_s` each time it is read."""
    ticks = itertools.count(0.0, step_s)
    monkeypatch.setattr(render.time, "monotonic", lambda: next(ticks))


def test_plain_lines_come_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = plain_console()
    clock(monkeypatch, 2.0)
    with progress.using(render.PlainSink(console)), progress.task("Training", 10, "step") as bar:
        for step in range(1, 11):
            bar.advance(1, loss=4.0 / step, step=step)
    lines = out.getvalue().splitlines()
    assert lines[0] == "Training 3/10 step (30%) · 14 s left · loss 1.3333"
    assert len(lines) == 4
    assert lines[-1] == "Training: done in 22 s · loss 0.4000"


def test_a_resumed_task_counts_its_rate_from_where_it_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console, out = plain_console()
    clock(monkeypatch, 6.0)
    with progress.using(render.PlainSink(console)), progress.task("Training", 100, "step") as bar:
        bar.advance(90)
        bar.advance(1)
    assert "91/100 step (91%) · 54 s left" in out.getvalue()


def test_short_tasks_and_unknown_totals(monkeypatch: pytest.MonkeyPatch) -> None:
    console, out = plain_console()
    with progress.using(render.PlainSink(console)), progress.task("Quick") as bar:
        bar.advance()
    assert out.getvalue() == ""
    clock(monkeypatch, 6.0)
    with progress.using(render.PlainSink(console)), progress.task("Reading", unit="rows") as bar:
        bar.advance(1500)
    assert out.getvalue().splitlines()[0] == "Reading 1,500 rows"


def test_notes_say_their_level() -> None:
    console, out = plain_console()
    for sink in (render.PlainSink(console), render.LiveSink(console)):
        sink.note("a [bold] thing " + "x" * 200, "info")
        sink.note("careful", "warning")
    lines = out.getvalue().splitlines()
    assert lines[0] == "note: a [bold] thing " + "x" * 200
    assert lines[1] == "warning: careful"
    assert lines[2:] == lines[:2]


def test_live_bars_nest_and_leave_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None)
    clock(monkeypatch, 3.0)
    sink = render.LiveSink(console)
    with progress.using(sink), progress.task("Training", 3, "step") as bar:
        bar.advance(1, loss=2.5)
        with progress.task("Evaluating"):
            progress.note("halfway")
        bar.advance(2)
    assert sink._progress is None
    assert "note: halfway" in out.getvalue()
    assert "Training: done in " in out.getvalue()
    assert "loss 2.5000" in out.getvalue()


def test_tables_fit_their_columns() -> None:
    console, out = plain_console()
    render.print_table(console, "Runs", ["name", "loss"], [("a", 2.5), ("[b]", None)])
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines == ["Runs", "name  loss", "a      2.5", "[b]      -"]


def test_a_result_is_a_list_of_figures_then_tables() -> None:
    console, out = plain_console()
    result: dict[str, Any] = {
        "run": "runs/a",
        "peak_memory_bytes": 3 * 2**30,
        "val_loss": None,
        "files": [{"file": "a.gguf", "ok": True}, {"file": "b.gguf", "size_bytes": 2048}],
        "reasons": {"train.steps": {"value": "5", "reason": "why"}},
        "lineage": {"data": "abc", "machine": {"cores": 2}},
        "next": "not here",
    }
    render.print_result(console, result)
    text = out.getvalue()
    assert "run                runs/a\npeak memory bytes  3 GiB\n" in text
    assert "val loss" not in text and "not here" not in text
    assert "2 KiB" in text and "yes" in text
    assert "machine.cores  2" in text
    assert "train.steps" in text and "why" in text and "abc" in text


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.44, "0.4 s"),
        (12.3, "12 s"),
        (185, "3 min 05 s"),
        (59.7, "1 min 00 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_figures_know_their_units() -> None:
    assert figure("share_of_peak", 0.305) == "30.5%"
    assert figure("size_bytes", 1536) == "1.5 KiB"
    assert figure("ok", False) == "no"
    assert figure("tokens", 1234567) == "1,234,567"
    assert figure("tokens_per_second", 12662.86) == "12,663"
    assert figure("kl_mean", 0.000123456) == "0.0001235"
    assert figure("took_s", 61) == "1 min 01 s"
    assert (in_bytes(5), in_bytes(1023 * 2**20)) == ("5 bytes", "1,023 MiB")
    assert (short(950), short(12345), short(2.5e6)) == ("950", "12.3k", "2.5M")


def test_the_live_line_has_a_fixed_order_and_skips_what_it_does_not_know() -> None:
    fields = {"tokens_per_second": 12345.0, "loss": 2.5, "step": 3, "epoch": 0.5, "val_loss": None}
    assert figures_line(fields) == "epoch 0.50 · loss 2.5000 · 12.3k tok/s"
