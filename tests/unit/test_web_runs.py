"""The pages Runs and Run without a browser: what they answer, and that it keeps up with the files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from mule.web.jobs import Jobs
from mule.web.site import Site
from tests.web_case import RUN, RunningUi, ui_running, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "runs")
    return folder


@pytest.fixture(scope="module")
def ui(folder: Path) -> Iterator[RunningUi]:
    with ui_running(Site(runs=folder / "runs", jobs=Jobs(folder / "jobs"))) as running:
        yield running


def _text(ui: RunningUi, path: str) -> str:
    status, _, content = ui.ask(path)
    assert status == 200, content
    return content.decode()


def _json(ui: RunningUi, path: str) -> dict[str, Any]:
    return json.loads(_text(ui, path))


def _refused(ui: RunningUi, path: str) -> dict[str, Any]:
    status, _, content = ui.ask(path)
    assert status == 422, content
    return json.loads(content)["error"]


def test_no_runs_say_how_to_have_one(tmp_path: Path) -> None:
    with ui_running(Site(runs=tmp_path / "runs", jobs=Jobs(tmp_path / "jobs"))) as empty:
        shown = _text(empty, "/runs")
        assert "No runs yet." in shown
        assert "mule init my-tune" in shown
        assert _json(empty, "/runs/verdicts") == {"verdicts": {}, "more": False}
        write_run(tmp_path / "runs", "from-elsewhere", 5)  # as a terminal would
        assert 'href="#/run/from-elsewhere"' in _text(empty, "/runs")


def test_the_list_has_state_figures_and_verdict(ui: RunningUi) -> None:
    shown = _text(ui, "/runs")
    assert f'<tr data-run="{RUN}">' in shown
    assert "state-finished" in shown
    assert ">3.1<" in shown  # the last validation loss
    said = _json(ui, "/runs/verdicts")["verdicts"][RUN]
    assert said["verdict"]
    assert f'verdict-{said["worst"]}">{said["verdict"]}<' in _text(ui, "/runs")


def test_a_running_run_shows_its_progress(folder: Path, ui: RunningUi) -> None:
    run = Run.create(folder / "runs", "going", "model: {}\n")
    run.write_resolved("train:\n  steps: 80\n")
    with run.lock():
        run.start_attempt(from_step=0)
        row = {"loss": 2.0, "steps_per_second": 2.0, "num_targets": 9}
        run.log_metrics({"step": 20, **row})
        shown = _text(ui, "/runs")
        assert '<progress max="80" value="20"' in shown
        assert "30 s" in shown
        assert _text(ui, "/run/going").count('data-act="stop"') == 1
        (run.folder / "run.lock").write_text("1\n")
        assert "Another machine trains it" in _text(ui, "/run/going/head")
        run.log_metrics({"step": 40, **row})
        assert '<progress max="80" value="40"' in _text(ui, "/run/going/head")
    killed = _text(ui, "/run/going/head")
    assert "ended without a word after update 40" in killed
    assert 'data-act="resume"' in killed
    assert "mule train" in killed


def test_a_run_shows_its_head_and_the_next_command(ui: RunningUi, folder: Path) -> None:
    shown = _text(ui, f"/run/{RUN}")
    assert f"<h1>{RUN}</h1>" in shown
    assert f"mule chat {folder / 'runs' / RUN}" in shown
    assert "data-controls" in shown
    assert "data-act" not in shown  # it is finished


def test_a_run_without_updates_has_no_empty_charts(folder: Path, ui: RunningUi) -> None:
    Run.create(folder / "runs", "just-made", "model: {}\n")
    shown = _text(ui, "/run/just-made")
    assert "No update has been made yet." in shown
    assert "data-controls" not in shown
    assert "no update yet" in _text(ui, "/run/just-made/findings")
    assert _json(ui, "/run/just-made/curves")["charts"] == []
    assert _json(ui, "/run/just-made/marks") == {"findings": [], "events": []}
    assert _json(ui, "/run/just-made/forecast")["lines"] == {}


def test_curves_of_a_range_on_an_axis(ui: RunningUi) -> None:
    found = _json(ui, f"/run/{RUN}/curves?x=steps&from=10&to=20&smooth=4")
    assert (found["window"], found["whole"]) == (4, [1, 40])
    loss = next(chart for chart in found["charts"] if chart["name"] == "loss")
    raw, mean, valid = loss["traces"]
    assert raw["x"] == list(range(9, 22))
    assert mean["kind"] == "mean"
    assert valid["x"] == [10, 20, 30]
    assert (
        max(len(t["x"]) for t in _json(ui, f"/run/{RUN}/curves?points=8")["charts"][0]["traces"])
        <= 8
    )


@pytest.mark.parametrize(
    ("query", "message", "hint"),
    [
        ("x=miles", "there is no axis `miles`", "one of steps, tokens, seconds, hours"),
        ("from=here", 'from is "here", not a number', None),
        ("points=nan", 'points is "nan", not a number', None),
        ("smooth=1e999", 'smooth is "1e999", not a number', None),
    ],
)
def test_odd_ranges_are_refused(ui: RunningUi, query: str, message: str, hint: str | None) -> None:
    error = _refused(ui, f"/run/{RUN}/curves?{query}")
    assert error["message"] == message
    assert error.get("hint") == hint


def test_findings_come_with_their_reasons_and_places(ui: RunningUi) -> None:
    shown = _text(ui, f"/run/{RUN}/findings")
    assert "What the doctor says" in shown
    found = _json(ui, f"/run/{RUN}/marks?x=steps")
    for pin in found["findings"]:
        assert f'id="rule-{pin["code"]}"' in shown
        assert pin["x"] == pin["step"]


def test_samples_are_text_and_nothing_else(ui: RunningUi) -> None:
    shown = _text(ui, f"/run/{RUN}/samples")
    assert "<h3>the cat</h3>" in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; sat" in shown
    assert "<script" not in shown


def test_recipe_files_and_lineage_are_shown(ui: RunningUi) -> None:
    shown = _text(ui, f"/run/{RUN}/about")
    for word in ("metrics.jsonl", "As it was typed", "size: 1m", "mule doctor"):
        assert word in shown


@pytest.mark.parametrize("part", ["", "/head", "/curves", "/marks", "/forecast", "/about"])
def test_a_run_that_is_not_there_is_not_found(ui: RunningUi, part: str) -> None:
    status, _, content = ui.ask(f"/run/no-such-run{part}")
    assert status == 404
    assert "no run" in json.loads(content)["error"]["message"]


def test_a_job_that_failed_says_so_on_its_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs", "poor", 5)
    jobs = Jobs(tmp_path / "jobs")
    with ui_running(Site(runs=tmp_path / "runs", jobs=jobs)) as ui:
        job = jobs.start("train", ["runs", "show", "nowhere"], run.name)
        while jobs.state(job)["state"] == "running":
            subprocess.run([sys.executable, "-c", ""], check=True)
        shown = _text(ui, "/run/poor/head")
        assert "The command did not end well: mule runs show nowhere" in shown
        assert "no run called `nowhere`" in shown
    for child in jobs._children:  # it ends a moment after it has written how the job ended
        child.wait(20)


def test_read_only_offers_nothing_to_do(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs", "going", "model: {}\n")
    with ui_running(Site(runs=tmp_path / "runs", read_only=True)) as ui, run.lock():
        run.start_attempt(from_step=0)
        assert "data-act" not in _text(ui, "/run/going")
