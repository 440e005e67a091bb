"""A campaign from its file to its results: in real processes, killed, stopped and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.commands import lab_run
from mule.errors import CheckFailed, UserError
from mule.run import Run
from tests.life.tiny_campaign import FILE, FOLDER, make_campaign
from tests.life.tiny_life import REPOSITORY, outcome, write_data

CAMPAIGN = """\
name: small
budget: {active_params: 300k, hidden_size: 64, head_dim: 32, tolerance: 0.2}
variants:
  mha:
  gqa: {attention: gqa, num_kv_heads: 1}
seeds: [0]
tokenizer: {vocab_size: 300}
data: {train: [text.txt], format: text, max_seq_length: 48, valid_share: 0.1, test_share: 0.1}
train: {steps: 6, step_rows: 4, micro_batch_rows: 2, threads: 1, compile: false, precision: bf16}
checkpoint: {every_steps: 2}
evaluate: {every_steps: 3, max_rows: 4}
decode: {enabled: false}
"""


def _result(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    return fsio.read_json(folder / "results" / f"{name}.json")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where a campaign was made, with its summary."""
    return make_campaign(tmp_path_factory.mktemp("campaign"), CAMPAIGN)


@pytest.fixture
def made(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(campaign)
    return campaign


def test_every_run_has_its_result(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    assert summary["runs"] == "2 of 2" and summary["next"] == "mule lab report campaigns/small"
    assert [row["variant"] for row in summary["variants"]] == ["mha", "gqa"]
    facts = fsio.read_json(FOLDER / "campaign.json")
    for name in ("mha-s0", "gqa-s0"):
        result = _result(name)
        assert result["steps"] == 6 and result["tokens"] == 6 * 4 * 48
        for part in ("valid", "test"):
            found = result[part]
            assert found["num_tokens"] == facts["data"][part]["tokens"] - 1  # none is dropped
            bits = found["loss"] * found["num_tokens"] / 0.6931471805599453
            texts = [
                json.loads(line)["text"]
                for line in (FOLDER / "data" / part / "text.jsonl").read_text().splitlines()
            ]
            words, size = (sum(map(f, texts)) for f in (lambda t: len(t.split()), len))
            assert found["bits_per_word"] == pytest.approx(bits / words)
            assert found["bits_per_byte"] == pytest.approx(bits / size)
        assert result["train"]["num_spikes"] == 0 and result["train"]["max_grad_norm"] > 0
    lineages = [Run.open(FOLDER / "runs" / name).read_lineage() for name in ("mha-s0", "gqa-s0")]
    assert lineages[0]["data"] == lineages[1]["data"] == facts["data"]["train"]["folder"]
    assert {row["variant"] for row in fsio.read_json(FOLDER / "shapes.json")} == {"mha", "gqa"}


def _lines_of(part: str) -> set[str]:
    rows = (FOLDER / "data" / part / "text.jsonl").read_text().splitlines()
    return {line for row in rows for line in json.loads(row)["text"].splitlines() if line}


def test_what_is_kept_apart_is_in_one_part_only(made: Path) -> None:
    train, valid, test = (_lines_of(part) for part in ("train", "valid", "test"))
    assert not train & valid and not train & test and not valid & test
    assert train | valid | test == set(Path("text.txt").read_text().splitlines())


def test_a_campaign_that_is_complete_makes_no_run(made: Path) -> None:
    before = (FOLDER / "results" / "gqa-s0.json").stat().st_mtime_ns
    again = lab_run.run(FILE, [])
    assert again["runs"] == "2 of 2"
    assert (FOLDER / "results" / "gqa-s0.json").stat().st_mtime_ns == before
    ahead = lab_run.run(FILE, ["seeds=[0, 5]"], dry_run=True)
    assert ahead["runs"] == 4 and ahead["runs_to_do"] == 2 and ahead["tokens_of_a_run"] == 1152
    assert all(row["measured"] for row in ahead["variants"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.weight_decay=0.2"], "was begun otherwise: optim.weight_decay (was None, is 0.2)"),
        (["data.test_share=0.2"], "data.test_share (was 0.1, is 0.2)"),
        (["variants.gqa.num_kv_heads=2"], "variants.gqa (was {"),
    ],
)
def test_what_the_runs_share_cannot_change(made: Path, words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        lab_run.run(FILE, words)
    assert said in caught.value.message
    assert caught.value.hint == "put it back, or begin another campaign: name=ANOTHER"


def test_tokens_that_were_expected_must_be_there(made: Path) -> None:
    with pytest.raises(CheckFailed, match=r"data\.valid has .* and expect_tokens.valid says 5"):
        lab_run.run(FILE, ["expect_tokens.valid=5"])


def test_an_unknown_variant_or_task_is_told(made: Path) -> None:
    with pytest.raises(UserError, match="--only gpt: no such variant"):
        lab_run.run(FILE, [], only="gpt")
    with pytest.raises(UserError, match="--task 2: the campaign has the runs 0 to 1"):
        lab_run.run(FILE, [], task=2)
    with pytest.raises(UserError, match="campaigns/new is not prepared") as caught:
        lab_run.run(FILE, ["name=new"], task=0)
    assert "mule lab run small.yaml name=new --slurm" in caught.value.hint


def test_an_array_has_a_task_for_each_run(made: Path) -> None:
    found = lab_run.run(FILE, ["name=array"], slurm=True)
    script = Path(found["script"]).read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert 'srun mule lab run small.yaml name=array --task "$SLURM_ARRAY_TASK_ID"' in script
    assert found["gather"].endswith("mule lab run small.yaml name=array")
    search = ["name=other", "search.learning_rates=[1e-3, 1e-2]"]
    with pytest.raises(UserError, match="cannot wait for the search, of which 4 of 4 tries"):
        lab_run.run(FILE, search, slurm=True)
    ahead = lab_run.run(FILE, search, dry_run=True)
    assert ahead["tries"] == ahead["tries_to_do"] == 4 and ahead["steps_of_a_try"] == 2
    assert ahead["tokens_in_all"] == (2 * 6 + 4 * 2) * 4 * 48


# ---------------------------------------------------------------- killed, stopped, searched

_LONGER = CAMPAIGN.replace("seeds: [0]", "seeds: [0, 1]").replace("steps: 6", "steps: 16")


@contextlib.contextmanager
def _started(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`mule lab run` in `folder`; killed at the end, if it has not ended."""
    command = [sys.executable, "-m", "mule.cli.main", "lab", "run", str(FILE)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(folder / "output.log", "ab") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _complete(folder: Path) -> None:
    with _started(folder) as process:
        assert process.wait() == 0, (folder / "output.log").read_text()


def _when(folder: Path, run: str, step: int, process: subprocess.Popen[bytes]) -> None:
    """Wait until the run has made so many updates."""
    metrics = folder / FOLDER / "runs" / run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, (folder / "output.log").read_text()
        time.sleep(0.02)


def _until_ended(folder: Path, run: str) -> None:
    """Wait for the run to be gone with its campaign."""
    deadline = time.monotonic() + 20
    while Run.open(folder / FOLDER / "runs" / run).state() == "running":
        assert time.monotonic() < deadline, "the run outlives its campaign"
        time.sleep(0.05)


def _all_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("mha-s0", "gqa-s0", "mha-s1", "gqa-s1"):
        result = _result(name, folder / FOLDER)
        kept = {part: result[part] for part in ("valid", "test", "tokens", "learning_rate")}
        found[name] = kept | {"run": outcome(folder / FOLDER / "runs" / name)}
    return found


@pytest.mark.slow
def test_a_killed_or_stopped_campaign_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_data(folder)
        (folder / FILE).write_text(_LONGER)
    _complete(whole)
    with _started(killed) as process:
        _when(killed, "gqa-s0", 5, process)
        process.kill()
    _until_ended(killed, "gqa-s0")
    with _started(killed) as process:
        _when(killed, "mha-s1", 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    said = (killed / "output.log").read_text()
    assert "stopped at the run mha-s1" in said and "go on with: mule lab run small.yaml" in said
    _complete(killed)
    assert _all_of(killed) == _all_of(whole)
    monkeypatch.chdir(killed)
    resolved = FOLDER / "runs" / "gqa-s1" / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("weight_decay: 0.1", "weight_decay: 0.3"))
    with pytest.raises(CheckFailed, match=r"optim\.weight_decay = 0\.3, and the campaign says 0.1"):
        lab_run.run(FILE, [])


@pytest.mark.slow
def test_a_search_chooses_a_rate_for_each_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    (tmp_path / FILE).write_text(CAMPAIGN + "search: {learning_rates: [1e-7, 1e-2], tokens: 768}\n")
    monkeypatch.chdir(tmp_path)
    found = lab_run.run(FILE, [])
    assert found["runs"] == "2 of 2" and found["tries"] == "4 of 4"
    for name in ("mha", "gqa"):
        table = fsio.read_json(FOLDER / "search" / f"{name}.json")
        assert table["chosen"] == {"learning_rate": 1e-2} and table["tokens"] == 768
        assert [row["learning_rate"] for row in table["rows"]] == [1e-7, 1e-2]
        assert _result(f"{name}-s0")["learning_rate"] == 1e-2
        tried = fsio.read_json(FOLDER / "runs" / f"search-{name}-lr0.01" / "held_out.json")
        assert "valid" in tried and "test" not in tried  # untouched until a run has ended


@pytest.mark.slow
def test_a_sampled_search_goes_on_with_the_same_tries(tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the extra search is not installed")
    text = CAMPAIGN.replace("  gqa: {attention: gqa, num_kv_heads: 1}\n", "")
    text += (
        "search: {trials: 5, learning_rate: [1e-4, 1e-1], weight_decay: [0.01, 1], tokens: 768}\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_data(folder)
        (folder / FILE).write_text(text)
    _complete(whole)
    with _started(killed) as process:
        _when(killed, "search-mha-try02", 2, process)
        process.kill()
    _until_ended(killed, "search-mha-try02")
    with _started(killed) as process:
        _when(killed, "search-mha-try05", 1, process)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
    _complete(killed)
    tables = [fsio.read_json(folder / FOLDER / "search" / "mha.json") for folder in (whole, killed)]
    assert tables[0] == tables[1] and len(tables[0]["rows"]) == 5
    results = [_result("mha-s0", folder / FOLDER) for folder in (whole, killed)]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["learning_rate"] == tables[0]["chosen"]["learning_rate"]
    assert results[0]["weight_decay"] == tables[0]["chosen"]["weight_decay"]


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    (tmp_path / FILE).write_text(CAMPAIGN)
    monkeypatch.chdir(tmp_path)
    blocked = FOLDER / "runs" / "mha-s0"
    blocked.mkdir(parents=True)
    (blocked / "something.txt").write_text("not a run")
    found = lab_run.run(FILE, [])
    assert found["ok"] is False and found["runs"] == "1 of 2"
    (failed,) = found["failed"]
    assert failed["run"] == "mha-s0" and "already exists" in failed["cause"]
    assert found["next"] == "mule lab run small.yaml"


@pytest.mark.slow
def test_decoding_and_compiling_are_measured_when_the_runs_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    (tmp_path / FILE).write_text(CAMPAIGN.replace("  gqa: {attention: gqa, num_kv_heads: 1}\n", ""))
    monkeypatch.chdir(tmp_path)
    assert lab_run.run(FILE, [])["runs"] == "1 of 1"
    assert not (FOLDER / "decode").exists() and not (FOLDER / "compile").exists()
    words = ["decode.enabled=true", "decode.context=[8, 16]", "decode.repetitions=1"]
    lab_run.run(FILE, [*words, "compile_table=true"])
    decoded = fsio.read_json(FOLDER / "decode" / "mha.json")
    assert {(row["batch"], row["context"]) for row in decoded["rows"]} == {(1, 8), (1, 16)}
    compiled = fsio.read_json(FOLDER / "compile" / "mha.json")
    assert compiled["graph_breaks"] == compiled["recompiles"] == 0 and compiled["gain"] > 0
    assert compiled["compile_s"] > 0 and compiled["faults"] == []


@pytest.mark.slow
def test_several_processes_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    text = CAMPAIGN.replace("  gqa: {attention: gqa, num_kv_heads: 1}\n", "")
    (tmp_path / FILE).write_text(text.replace("precision: bf16", "precision: fp32"))
    monkeypatch.chdir(tmp_path)
    lab_run.run(FILE, ["name=one", "train.device=cpu"])
    lab_run.run(FILE, ["name=two", "train.device=cpu", "processes=2", "train.threads=1"])
    one, two = (_result("mha-s0", Path("campaigns") / name) for name in ("one", "two"))
    assert two["test"]["loss"] == pytest.approx(one["test"]["loss"], abs=1e-4)
    events = Run.open("campaigns/two/runs/mha-s0").events()
    assert any(event.get("world_size") == 2 for event in events)
