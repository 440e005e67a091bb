"""`mule runs watch`: in a real terminal, as lines, as rows, while another process writes the run."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, ConsoleDimensions

from mule.cli import watch_view
from mule.cli.text_plot import Line, text_plot
from mule.commands.watch import Watched, find
from mule.errors import UserError
from mule.run import Run
from tests.doctor_case import history, run_folder
from tests.terminal_case import Terminal


class Trainer:
    """Writes a run as a training does, an update each 50 ms, until it is told to end."""

    def __init__(self, root: Path) -> None:
        self.run = Run.create(root, "pizza", "model: {}\n")
        self.run.write_resolved("train:\n  steps: 1000\n")
        self._over = threading.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        assert self._begun.wait(10)

    def finish(self) -> None:
        self._over.set()
        self._thread.join(10)

    def _work(self) -> None:
        step = 0
        with self.run.lock():
            self.run.start_attempt(from_step=0)
            while not self._over.wait(0.05):
                step += 1
                row = {"step": step, "loss": 3 + 1 / step, "grad_norm": 0.5, "num_targets": 9}
                self.run.log_metrics({**row, "tokens_per_second": 900.0, "steps_per_second": 20.0})
                self._begun.set()
            self.run.log_event("finished", step=step)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path / "runs")
    yield trainer
    trainer.finish()


def _plain(shown: str) -> str:
    """Without what moves the cursor and sets colours."""
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown)


def _watching(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mule.cli.main", "runs", "watch", *words]
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_it_is_live_in_a_terminal_and_a_key_quits(
    trainer: Trainer, tmp_path: Path, key: str
) -> None:
    terminal = Terminal(tmp_path, "runs", "watch", "pizza", "--every", "0.2", kind="xterm-256color")
    seen = _plain(terminal.until("q quits; the run goes on"))
    assert "pizza  running" in seen
    first = re.search(r"(\d+)/1,000 \(", seen)
    assert first is not None
    assert "left" in seen
    assert "gradient norm" in seen
    deadline = time.monotonic() + 20
    while int(first[1]) >= int(
        re.findall(r"(\d+)/1,000 \(", _plain(terminal.until("q quits")))[-1]
    ):
        assert time.monotonic() < deadline, "it stands still"
    terminal.type(key)
    left = terminal.until("mule runs watch pizza")
    assert "\x1b[?1049l" in left  # the screen of before is back
    assert "pizza: running" in left
    assert terminal.end() == 0
    assert trainer.run.state() == "running"


def test_it_ends_with_the_run(trainer: Trainer, tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "runs", "watch", "--every", "0.2", kind="xterm-256color")
    terminal.until("q quits")
    trainer.finish()
    assert "pizza: finished" in terminal.until("mule chat runs/pizza")
    assert terminal.end() == 0


def test_rows_are_streamed_as_json(trainer: Trainer, tmp_path: Path) -> None:
    watching = _watching(tmp_path, "pizza", "--json", "--every", "0.1")
    assert watching.stdout is not None
    rows = [json.loads(watching.stdout.readline()) for _ in range(5)]
    trainer.finish()
    out, _ = watching.communicate(timeout=60)
    rows += [json.loads(line) for line in out.splitlines()]
    end = rows.pop()
    steps = [row["step"] for row in rows]
    assert steps == list(range(steps[0], steps[0] + len(steps)))
    assert (end["run"], end["state"], end["steps"]) == ("pizza", "finished", steps[-1])
    assert end["next"].startswith("mule chat")
    assert watching.returncode == 0


def test_without_a_terminal_it_prints_lines(trainer: Trainer, tmp_path: Path) -> None:
    watching = _watching(tmp_path, "pizza", "--every", "0.1")
    assert watching.stdout is not None
    line = watching.stdout.readline()
    assert re.match(r"pizza: running · \d+/1,000 \(\d+%\) · .* left · loss 3\.\d+", line)
    trainer.finish()
    out, err = watching.communicate(timeout=60)
    assert "pizza: finished" in out
    assert (watching.returncode, err) == (0, "")


def test_the_newest_running_run_is_meant_where_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run in .* to watch") as error:
        find(None, tmp_path)
    assert error.value.hint == "start one: mule train RECIPE"
    for name in ("a", "b"):
        Run.create(tmp_path, name, "model: {}\n")
    with Run(tmp_path / "a").lock():
        assert find(None, tmp_path).name == "a"
    assert find("b", tmp_path).name == "b"


def _screen(now: dict[str, Any], width: int, height: int) -> list[str]:
    console = Console(width=width, height=height, record=True, file=io.StringIO())
    console.print(watch_view.view(now, ConsoleDimensions(width, height)))
    return console.export_text().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 12), (200, 60)])
def test_the_view_fits_the_terminal(tmp_path: Path, width: int, height: int) -> None:
    norm = history(num_steps=200, norm=lambda step: 60.0, settings=["optim.max_grad_norm=0.01"])
    watched = Watched(run_folder(tmp_path, norm))
    result = watched.result()
    assert any(row["code"] == "D203" for row in result["findings"])
    lines = _screen(watched.now(2 * width), width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for word in ("case  finished", "200/200", "D203", "q quits"):
        assert word in text
    assert ("gradient norm" in text) is (height >= 24)


def test_a_run_without_updates_is_told_in_words(tmp_path: Path) -> None:
    watched = Watched(Run.create(tmp_path, "pizza", "model: {}\n"))
    now = watched.now(100)
    text = "\n".join(_screen(now, 80, 24))
    assert "the curves begin with the first update" in text
    assert watch_view.line(now) == "pizza: new · no update yet"
    assert watched.new_rows() == []
    assert watched.result()["next"].endswith("--resume")


def test_a_plot_has_the_size_and_the_scale_that_are_asked() -> None:
    points = [(float(x), 1000.0 * x) for x in range(1, 101)]
    rows = text_plot([Line("*", "speed", points)], width=20, height=4, label="{:.0f}".format)
    assert len(rows) == 4 + 2
    assert rows[0].startswith("98000 |")
    assert max(map(len, rows[:4])) <= len("98000 |") + 20
    assert rows[-1].strip() == "* speed"
