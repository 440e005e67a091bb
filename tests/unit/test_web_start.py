"""The pages Start and Jobs without a browser: the form, what is refused, and what is started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mule import calibration, fsio, machine
from mule.commands.form import NOT_IN_A_FORM
from mule.config.knobs import knobs
from mule.run import Run
from mule.web.ids import id_of
from mule.web.jobs import Job, Jobs
from mule.web.site import Site
from tests.life.tiny_life import write_data
from tests.unit.test_form import TINY
from tests.unit.test_plan import KNOWN
from tests.web_case import RunningUi, ui_running


class NotedJobs(Jobs):
    """Jobs that are written down as ended and never run, since training takes seconds: all failed
    but a demo.
    """

    def start(self, kind: str, words: Any, about: str = "") -> Job:
        job = Job(f"{kind}-{len(self.all()):08x}", kind, tuple(words), about, 1.0)
        fsio.write_json(self.folder / job.id / "job.json", asdict(job))
        good = {"ok": True, "next": "mule chat demo"}
        error = {"ok": False, "error": "out of <memory>", "hint": "set data.max_seq_length=128"}
        fsio.write_text(
            self.folder / job.id / "stdout", json.dumps(good if kind == "demo" else error) + "\n"
        )
        fsio.write_text(self.folder / job.id / "stderr", "error: out of <memory>\n")
        fsio.write_text(self.folder / job.id / "exit", "0" if kind == "demo" else "1")
        return job


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder: tiny data, a recipe, a run; the machine was measured before."""
    place = tmp_path_factory.mktemp("start")
    folder = place / "work"
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(folder)
        known = {
            calibration._key(): asdict(KNOWN),
            f"disk {place.stat().st_dev}": {"bytes_per_second": 2e8, "flush_s": 0.01},
        }
        machine.write_cached(calibration._FILE, known, "what was measured")
        Run.create(Path("runs"), "Old-Run", (folder / "pretrain.yaml").read_text())
        yield folder


@pytest.fixture(scope="module")
def pages(work: Path) -> Iterator[RunningUi]:
    with ui_running(Site(jobs=NotedJobs())) as running:
        yield running


def text_of(pages: RunningUi, path: str, body: object = None) -> str:
    status, _, content = pages.ask(path, body)
    assert status == 200, content
    return content.decode()


def json_of(pages: RunningUi, path: str, body: object = None) -> dict[str, Any]:
    return json.loads(text_of(pages, path, body))


def refused(pages: RunningUi, path: str, body: object) -> tuple[int, dict[str, Any]]:
    status, _, content = pages.ask(path, body)
    assert status >= 400, content
    return status, json.loads(content)["error"]


def test_every_setting_is_a_labelled_field_with_its_help(pages: RunningUi) -> None:
    page = text_of(pages, "/start")
    keys = set(re.findall(r'data-key="([^"]+)"', page))
    assert keys == knobs().keys() - set(NOT_IN_A_FORM)
    for key in keys:
        assert f'for="field-{key}"' in page or f'<fieldset class="field" data-key="{key}"' in page
        assert f'id="help-{key}"' in page and f'id="wrong-{key}"' in page
    assert "a whole number of at least 2 and at most 1_048_576, in tokens" in page
    assert '<option value="">cosine (default)</option>' in page
    assert '<option value="pretrain.yaml">pretrain.yaml</option>' in page
    assert f'<option value="{id_of("Old-Run")}">Old-Run</option>' in page
    assert "start-nothing" not in page


def test_a_recipe_of_mule_is_chosen_by_model_and_machine(pages: RunningUi) -> None:
    page = text_of(pages, "/start/recipes")
    assert "Qwen/Qwen2.5-0.5B-Instruct" in page and "TFLOP/s at most" in page
    found = json_of(pages, f"/start/from/recipe/{id_of('qwen2.5-0.5b')}")
    assert found["values"]["adapter.kind"] == "lora"
    assert json_of(pages, "/start/from/own/pretrain.yaml")["name"] == "pretrain"
    assert json_of(pages, f"/start/from/run/{id_of('Old-Run')}")["name"] == "Old-Run-2"
    for path in ("/start/from/own/nothing.yaml", "/start/from/run/x", "/start/from/else/x"):
        status, _, content = pages.ask(path)
        assert status == 404 and b"here" in content


def test_fields_are_checked_and_planned(pages: RunningUi) -> None:
    found = json_of(pages, "/start/check", {"values": {**TINY, "train.steps": "-1"}})
    assert found["problems"] == [
        {"key": "train.steps", "message": "expected a whole number of at least 1, found -1"}
    ]
    found = json_of(pages, "/start/check", {"values": TINY, "assume": False})
    assert found["ok"] and found["command"] == "mule train recipes/run.yaml"
    assert "step_rows: 3" in found["recipe"]
    plan = text_of(pages, "/start/plan", {"values": TINY})
    assert '<span class="fit fit-fits">fits</span>' in plan and "train.device" in plan
    shape = {"model.hidden_size": "8192", "model.num_layers": "40", "model.num_heads": "64"}
    large = {**TINY, **shape, "model.size": "", "train.micro_batch_rows": "3"}
    plan = text_of(pages, "/start/plan", {"values": large})
    assert "fit-does-not-fit" in plan and 'data-values="{&#34;' in plan
    plan = text_of(pages, "/start/plan", {"values": {**TINY, "data.train": ["txt.txt"]}})
    assert "txt.txt: no such file or folder" in plan and "hint: did you mean text.txt?" in plan
    plan = text_of(pages, "/start/plan", {"values": TINY, "machine": "rtx4090"})
    assert "this machine was not measured" in plan


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/start/check", {}, "values must be an object of fields"),
        ("/start/check", {"values": {}, "more": 1}, "more"),
        ("/start/run", {"values": {}}, "model is missing"),
        ("/start/run", {"values": {**TINY, "data.train": ["../x"]}}, "outside of the folder"),
        ("/start/run", {"values": {**TINY, "name": "Old-Run"}}, "runs/Old-Run already exists"),
        ("/start/prepare", {}, "what is null; known: example, demo, machine"),
    ],
)
def test_what_is_refused(pages: RunningUi, path: str, body: object, said: str) -> None:
    status, error = refused(pages, path, body)
    assert status in (400, 422) and said in error["message"]
    assert not list(Path().glob("recipes/*"))


def test_a_start_saves_the_recipe_and_starts_it(pages: RunningUi, work: Path) -> None:
    started = json_of(pages, "/start/run", {"values": {**TINY, "name": "first"}})
    assert (work / "recipes/first.yaml").read_text() == started["recipe"]
    job = pages.ui.site.jobs.get(started["job"])
    assert job.words == ("train", "recipes/first.yaml", "--json") and job.about == "first"
    page = text_of(pages, f"/jobs/{job.id}")
    assert "mule train recipes/first.yaml</code>" in page and "ended with exit code 1" in page
    assert "out of &lt;memory&gt;" in page and "hint: set data.max_seq_length=128" in page
    assert "Resume" not in page  # there is no run yet
    resumed = json_of(pages, f"/start/resume/{id_of('Old-Run')}", {})
    assert resumed["command"] == "mule train runs/Old-Run/recipe.yaml --resume"
    page = text_of(pages, f"/jobs/{resumed['job']}")
    assert f'data-post="/start/resume/{id_of("Old-Run")}"' in page
    with Run(Path("runs/Old-Run")).lock():
        status, error = refused(pages, f"/start/resume/{id_of('Old-Run')}", {})
    assert status == 409 and error["message"] == "runs/Old-Run is running"
    status, error = refused(pages, f"/start/stop/{id_of('Old-Run')}", {})
    assert status == 422 and error["message"] == "runs/Old-Run is not running"
    listed = text_of(pages, "/jobs")
    assert listed.count("<tr>") == 3 and "Forget all that ended" in listed
    json_of(pages, f"/jobs/{job.id}/stop", {})  # it ended: nothing to do
    assert json_of(pages, f"/jobs/{job.id}/remove", {}) == {"removed": 1}
    assert pages.ask(f"/jobs/{job.id}")[0] == 404
    assert json_of(pages, "/jobs/remove/ended", {}) == {"removed": 1}
    assert "Nothing was started from these pages yet" in text_of(pages, "/jobs")


def test_who_has_nothing_is_offered_an_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with ui_running(Site(jobs=NotedJobs())) as pages:
        page = text_of(pages, "/start")
        assert "Nothing was trained in this folder yet." in page and "Run the demo" in page
        found = json_of(pages, "/start/prepare", {"what": "example", "model": "org/model"})
        values = json_of(pages, f"/start/from/own/{found['recipe']}")["values"]
        assert values["data.train"] == ["example/data/train.jsonl"]
        assert values["model.path"] == "org/model"
        status, error = refused(pages, "/start/prepare", {"what": "example"})
        assert status == 422 and "is already there, and is not overwritten" in error["message"]
        assert "Choose example/recipe.yaml above" in text_of(pages, "/start")
        found = json_of(pages, "/start/prepare", {"what": "demo"})
        assert pages.ui.site.jobs.get(found["job"]).words == ("demo", "--json")
        page = text_of(pages, f"/jobs/{found['job']}")
        assert "ended well" in page and "<code>mule chat demo</code>" in page
        assert '<a href="#/start">start a training of your own</a>' in page


def test_a_server_that_only_shows_hides_and_refuses_it_all(work: Path) -> None:
    with ui_running(Site(jobs=NotedJobs(), read_only=True)) as pages:
        page = text_of(pages, "/start")
        assert "it was started with --read-only" in page and "<form" not in page
        job = NotedJobs().start("train", ["train", "x.yaml"], "Old-Run")
        assert "data-post" not in text_of(pages, f"/jobs/{job.id}")
        assert "data-post" not in text_of(pages, "/jobs")
        name = id_of("Old-Run")
        for path in (
            *("/start/check", "/start/plan", "/start/run", "/start/prepare", "/jobs/remove/ended"),
            *(f"/start/resume/{name}", f"/start/stop/{name}"),
            *(f"/jobs/{job.id}/stop", f"/jobs/{job.id}/remove"),
        ):
            status, error = refused(pages, path, {"values": TINY})
            assert status == 403 and error["hint"] == "start it without: mule ui", path
