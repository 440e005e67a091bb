"""The page Export: what can be exported, what was, how it was verified, and jobs that do it."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from mule import fsio
from mule.commands import exports, models_here
from mule.config.schema import ExportType
from mule.errors import UserError
from mule.export.adapter_gguf import ADAPTER_TYPES
from mule.export.type_words import type_rows
from mule.web.ids import id_of
from mule.web.pages.export import _ADAPTER_TYPES, FORMS
from mule.web.site import Site
from tests.web_case import RunningUi, ui_running, write_run

GOOD: dict[str, Any] = {
    "ok": True,
    "verdict": "q8_0: same perplexity: fine",
    "kl_mean": 2.4e-4,
    "kl_p99": 4.5e-4,
    "top1": 0.968,
    "ppl": 12.01,
    "ppl_reference": 12.0,
    "tokens_equal": True,
    "template_equal": None,
    "num_prompts": 9,
    "num_greedy_equal": 7,
    "stops": True,
    "steps": {"structure": True, "weights": True},
}
BAD: dict[str, Any] = GOOD | {
    "ok": False,
    "verdict": "q2_k: too far from the model; use q3_k_m or --imatrix",
    "kl_mean": 0.9,
    "steps": {"structure": True, "weights": True, "distributions": False, "greedy": None},
}


def weights(folder: Path, name: str = "model.safetensors", size: int = 1000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(bytes(size))


def entry(file: str, kind: str, check: dict[str, Any] | None) -> dict[str, Any]:
    found = {"file": file, "type": kind, "size_bytes": 700, "bits_per_weight": 8.5, "notes": []}
    return found if check is None else found | {"check": check}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, an adapter of it, a merged folder, and an export of three files, two verified."""
    monkeypatch.chdir(tmp_path)
    weights(Path("base"), size=5000)
    fsio.write_json("base/config.json", {})
    tuned = write_run(Path("runs"), "tuned", num_steps=10)
    checkpoint = tuned.checkpoint_dir(10)
    weights(checkpoint, "adapter_model.safetensors", 40)
    fsio.write_json(checkpoint / "adapter_config.json", {})
    fsio.write_json(tuned.folder / "lineage.json", {"base": {"path": "base"}})
    write_run(Path("runs"), "empty", num_steps=10)
    folder = Path("exports/tuned")
    weights(folder / "merged", size=5000)
    fsio.write_json(folder / "merged/config.json", {})
    for name in ("tuned-F16.gguf", "tuned-Q8_0.gguf", "tuned-Q2_K.gguf", "imatrix.gguf"):
        (folder / name).write_bytes(bytes(700))
    (folder / "Modelfile").write_text("FROM ./tuned-Q2_K.gguf\n")
    files = [entry("tuned-Q8_0.gguf", "q8_0", GOOD), entry("tuned-Q2_K.gguf", "q2_k", BAD)]
    files.append(entry("../../base/model.safetensors", "f32", None))
    record = {"kind": "gguf", "name": "tuned", "command_name": "tuned", "num_ctx": 512}
    fsio.write_json(folder / "export.json", record | {"base": "<b>base</b>", "files": files})
    return tmp_path


@pytest.fixture
def running(place: Path) -> Iterator[RunningUi]:
    with ui_running(Site()) as found:
        yield found
        children = found.ui.site.jobs._children
        assert all(child.wait(60) is not None for child in children)


def text(running: RunningUi, path: str) -> str:
    status, _, body = running.ask(path)
    assert status == 200, body
    return body.decode()


def refused(running: RunningUi, path: str, body: dict[str, Any]) -> dict[str, Any]:
    status, _, content = running.ask(path, body)
    assert status >= 400
    return json.loads(content)["error"] | {"status": status}


# ---------------------------------------------------------------- what there is


def test_models_are_told_by_their_names_and_sizes(place: Path) -> None:
    rows = {row["name"]: row for row in models_here.list_models()["models"]}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "runs/tuned": "adapter",
        "exports/tuned/merged": "merged",
        "base": "folder",
        "exports/tuned/tuned-F16.gguf": "gguf",
        "exports/tuned/tuned-Q2_K.gguf": "gguf",
        "exports/tuned/tuned-Q8_0.gguf": "gguf",
    }
    adapter = rows["runs/tuned"]
    assert (adapter["size_bytes"], adapter["load_bytes"], adapter["base"]) == (40, 5040, "base")
    assert adapter["state"] == "finished"
    assert adapter["forms"] == list(FORMS)
    assert rows["exports/tuned/tuned-F16.gguf"]["forms"] == ["gguf"]
    assert rows["exports/tuned/tuned-Q8_0.gguf"]["forms"] == []


def test_what_the_demo_made_is_there_too(place: Path) -> None:
    tuned = write_run(Path("demo/runs"), "sft", num_steps=10)
    weights(tuned.checkpoint_dir(10))
    Path("demo/exports").mkdir()
    Path("demo/exports/atlas-Q8_0.gguf").write_bytes(b"0")
    rows = {row["name"]: row for row in models_here.list_models()["models"]}
    assert (rows["demo/runs/sft"]["kind"], rows["demo/runs/sft"]["title"]) == ("run", "demo sft")
    assert rows["runs/tuned"]["title"] == "tuned"
    fsio.write_json(
        "exports/tuned/merged/lineage.json", {"base": {"path": str(tuned.checkpoints()[-1][1])}}
    )
    assert list(rows) == [row["name"] for row in models_here.list_models()["models"]]
    assert list(rows)[-2:] == ["demo/runs/sft", "demo/exports/atlas-Q8_0.gguf"]
    assert rows["demo/exports/atlas-Q8_0.gguf"]["kind"] == "gguf"


def test_a_base_elsewhere_is_listed_once(place: Path, tmp_path: Path) -> None:
    away = tmp_path.parent / f"{tmp_path.name}-base"
    Path("base").rename(away)
    fsio.write_json("runs/tuned/lineage.json", {"base": {"path": str(away)}})
    found = [row for row in models_here.list_models()["models"] if row["kind"] == "base"]
    assert [row["name"] for row in found] == [str(away)]


def test_an_export_tells_of_its_files(place: Path) -> None:
    found = exports.show("exports/tuned")
    assert [file["file"] for file in found["files"]] == [
        "tuned-Q8_0.gguf",
        "tuned-Q2_K.gguf",
        "tuned-F16.gguf",  # in no account, and the way out of the folder is not followed
    ]
    assert found["state"] == "failed"
    assert [row["type"] for row in found["quality"]] == ["q8_0", "q2_k"]
    told = {line["program"]: line["command"] for line in reversed(found["commands"])}
    assert told["Ollama"] == "ollama create tuned -f exports/tuned/Modelfile"
    assert '"$PWD"/exports/tuned/tuned-Q8_0.gguf' in told["Docker Model Runner"]
    assert told["Mule"] == "mule chat exports/tuned/tuned-Q8_0.gguf"
    (row,) = exports.list_exports()["exports"]
    assert (row["export"], row["num_files"], row["size_bytes"]) == ("exports/tuned", 3, 2100)


def test_states_of_exports(place: Path) -> None:
    file = Path("exports/tuned/export.json")
    record = fsio.read_json(file)
    Path("exports/tuned/tuned-F16.gguf").unlink()
    fsio.write_json(file, record | {"files": record["files"][:1]})
    Path("exports/tuned/tuned-Q2_K.gguf").unlink()
    assert exports.show("exports/tuned")["state"] == "verified"
    assert exports.show("exports/tuned")["next"] == "mule push exports/tuned ORG/NAME"
    fsio.write_json(file, record | {"files": []})
    assert exports.show("exports/tuned")["next"] == "mule verify exports/tuned"
    file.write_text('{"files": 3}')
    (row,) = exports.list_exports()["exports"]
    assert "damaged" in row["problem"]["message"] and row["problem"]["hint"] == "export again"
    with pytest.raises(UserError, match="exports/other: no export there"):
        exports.show("exports/other")


def test_every_type_has_its_meaning() -> None:
    assert [row["type"] for row in type_rows()] == list(get_args(ExportType))
    assert {row["type"]: row["bits"] for row in type_rows()}["q8_0"] == 8.5
    assert list(_ADAPTER_TYPES) == list(ADAPTER_TYPES)


# ---------------------------------------------------------------- the page


def test_the_form_and_the_lists(running: RunningUi) -> None:
    form = text(running, "/export")
    assert f'value="{id_of("runs/tuned")}"' in form and "tuned-Q8_0" not in form
    assert all(row["means"] in form for row in type_rows())
    listed = text(running, "/exports")
    assert id_of("exports/tuned") in listed and "failed" in listed


def test_the_verification_table(running: RunningUi) -> None:
    path = f"/exports/{id_of('exports/tuned')}"
    page = text(running, path)
    assert "&lt;b&gt;base&lt;/b&gt;" in page and "<b>" not in page
    for shown in ("2.4e-04", "96.80%", "12.01", "7/9", "8.50", "FAILED", BAD["verdict"]):
        assert shown in page
    assert "distributions: FAILED, greedy: not checked" in page
    points = json.loads(text(running, f"{path}/quality"))
    assert points[0] == {
        "type": "q8_0",
        "size_bytes": 700,
        "kl_mean": 2.4e-4,
        "top1": 0.968,
        "ppl": 12.01,
        "ppl_reference": 12.0,
    }
    status, _, body = running.ask("/exports/nothing")
    assert status == 404 and "no export" in body.decode()


def test_the_command_of_a_form(running: RunningUi) -> None:
    def command(**asked: Any) -> str:
        status, _, body = running.ask("/export/command", {"model": id_of("runs/tuned"), **asked})
        assert status == 200, body
        return json.loads(body)["command"]

    types = ["q8_0", "q4_k_m"]
    assert command(form="gguf", types=types) == "mule export runs/tuned --types q8_0,q4_k_m"
    more = {"system": "Be brief.", "author": "me", "imatrix": True, "no_master": True}
    assert command(form="gguf", types=["q4_k_m"], **more) == (
        "mule export runs/tuned --types q4_k_m '--system=Be brief.' --author=me --imatrix "
        "--no-master"
    )
    assert command(form="adapter", types=["f16"]) == (
        "mule export runs/tuned --adapter-only --types f16"
    )
    assert command(form="hf") == "mule export runs/tuned --hf"
    assert command(form="merge") == "mule merge runs/tuned"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"form": "gguf", "types": []}, "no type is chosen"),
        ({"form": "gguf", "types": ["q9"]}, 'types has "q9"; known: f32, f16'),
        ({"form": "zip"}, 'form is "zip"; possible: gguf, adapter, hf, merge'),
        ({"form": "hf", "imatrix": True}, "imatrix has no effect on a folder for transformers"),
        ({"form": "hf", "system": "x"}, "system has no effect on a folder for transformers"),
        ({"form": "hf", "model": "none"}, 'no model "none" here'),
        ({"form": "hf", "more": 1}, '"more" is no field'),
    ],
)
def test_what_cannot_be_exported(running: RunningUi, asked: dict[str, Any], message: str) -> None:
    asked = {"model": id_of("runs/tuned"), **asked}
    for path in ("/export/command", "/export/start"):
        assert message in refused(running, path, asked)["message"]


def settled(running: RunningUi, path: str) -> str:
    """The page once its job has ended."""
    deadline = time.monotonic() + 60
    while "state-running" in (page := text(running, path)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return page


def test_a_job_that_fails_says_why_and_what_helps(running: RunningUi) -> None:
    path = f"/exports/{id_of('exports/tuned')}"
    jobs = running.ui.site.jobs  # a light command in place of one that loads a model
    job = jobs.start("verify", ["recipe", "show", "pretrain-25n", "--json"], "exports/tuned")
    page = settled(running, path)
    assert "state-failed" in page and "mule recipe show pretrain-25n" in page
    result = jobs.result(job)
    assert result is not None
    assert f"<p>hint: {result['hint']}</p>" in html.unescape(page)
    assert json.loads(running.ask(f"/export/stop/{job.id}", {})[2]) == {"stopping": job.id}
    assert refused(running, "/export/stop/none", {})["status"] == 404
    other = jobs.start("recipe", ["recipe", "list", "--json"])
    assert refused(running, f"/export/stop/{other.id}", {})["status"] == 404


@pytest.mark.slow
def test_a_verification_is_started_here(running: RunningUi) -> None:
    path = f"/exports/{id_of('exports/tuned')}"
    status, _, body = running.ask(f"{path}/verify", {})
    assert status == 200 and json.loads(body)["command"] == "mule verify exports/tuned"
    page = settled(running, path)
    assert "nothing says which model it was written from" in page
    assert "hint: name the model: mule verify FILE --against RUN_OR_FOLDER" in page


def test_a_server_that_only_shows(place: Path) -> None:
    with ui_running(Site(read_only=True)) as running:
        assert "export-form" not in text(running, "/export")
        path = f"/exports/{id_of('exports/tuned')}"
        assert "export-verify" not in text(running, path)
        for place_ in (f"{path}/verify", "/export/start", "/export/command", "/export/stop/x"):
            found = refused(running, place_, {})
            assert found["status"] == 403 and "--read-only" in found["message"]


def test_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ui_running(Site()) as running:
        assert "There is no model yet" in text(running, "/export")
        assert "Nothing was exported yet." in text(running, "/exports")
