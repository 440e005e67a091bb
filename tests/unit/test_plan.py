"""`mule plan`: what it estimates, how it says it, and that it needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pytest

from mule import calibration, machine
from mule.calibration import Calibration
from mule.commands import plan, plan_check
from mule.config.load import load_recipe
from mule.config.schema import ExportType, Recipe
from mule.errors import ConfigError, UserError
from mule.models.config import ModelConfig
from mule.plan import estimate, machines
from mule.plan.data_rows import data_rows
from mule.plan.estimate import MARGIN, checkpoint_bytes, kept_checkpoints, verdict
from mule.plan.fitted import fitted
from mule.plan.peak import Peak, Process, peak_memory
from mule.plan.remedies import remedies
from mule.plan.resolve import Facts, resolve
from mule.plan.subject import base_model
from mule.plan.work import Speed, evaluation_work, update_work
from tests.conftest import Mule
from tests.life.tiny_life import write_data

SPEED = Speed(1e11, 5e10, 2e10, 1e-5)
PROCESS = Process(300e6, 80e6, 1000)
FACTS = Facts(
    num_rows=1000,
    row_length=256,
    targets_per_row=256,
    examples_per_row=1,
    cpu_cores=2,
    fast_bf16=False,
    cpp_compiler=True,
    available_bytes=16 * 2**30,
    matmul_peak_flops=1e11,
    num_valid_rows=8,
    host_bytes=16 * 2**30,
    disk_bytes=100 * 2**30,
)
SHAPE = ModelConfig("llama", 4096, 256, 4, 4, 2, 64, 768)
WORDS = ("data.train=[a.txt]", "model.size=5m", "train.steps=10", "train.step_rows=8")
KNOWN = Calibration(
    device="cpu",
    device_name="a processor",
    device_bytes=0,
    capability=(0, 0),
    precision="fp32",
    matmul_flops={"fp32": 1e11, "bf16": 5e10},
    read_bytes_per_second=2e10,
    operation_s=1e-5,
    import_bytes=300_000_000,
    compiler_bytes=80_000_000,
    import_s=3.0,
)


def recipe(*overrides: str) -> Recipe:
    given = {word.partition("=")[0] for word in overrides}
    words = [word for word in WORDS if word.partition("=")[0] not in given]
    return load_recipe(None, [*words, *overrides]).recipe


def peak(*overrides: str, facts: Facts = FACTS, config: ModelConfig = SHAPE) -> Peak:
    resolved = resolve(recipe(*overrides), config, facts).recipe
    return peak_memory(config, resolved, facts, PROCESS, fitted())


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tiny data, and a machine that was measured before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    write_data(tmp_path)
    place = f"disk {tmp_path.stat().st_dev}"
    known = {
        calibration._key(): asdict(KNOWN),
        place: {"bytes_per_second": 2e8, "flush_s": 0.01},
    }
    machine.write_cached(calibration._FILE, known, "what was measured")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_disk_knows_every_type_of_an_export() -> None:
    assert set(estimate._EXPORT_BITS) == set(get_args(ExportType))


# ---------------------------------------------------------------- memory and time


def test_the_parts_of_memory_add_up_to_the_phase_that_needs_most() -> None:
    found = peak("train.micro_batch_rows=4", "train.compile=false")
    assert sum(found.parts.values()) == found.total
    assert abs(found.phases[found.phase] - found.total) <= len(found.parts)
    assert found.phases[found.phase] == max(found.phases.values())
    assert found.parts["libraries"] > PROCESS.imports
    assert "compiler" in peak("train.compile=true").parts
    assert "compiler" not in found.parts


def test_more_rows_take_more_memory_and_checkpointing_less() -> None:
    sizes = [peak(f"train.micro_batch_rows={rows}").total for rows in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    kinds = ("none", "selective", "full")
    key = "train.activation_checkpointing"
    by_kind = [peak(f"{key}={kind}", "train.micro_batch_rows=8").total for kind in kinds]
    assert by_kind == sorted(by_kind, reverse=True)


def test_state_is_divided_among_processes_where_it_is_sharded() -> None:
    several = replace(FACTS, cuda=True, num_processes=4, processes_per_machine=4)
    whole = peak("train.sharding=none", facts=several)
    shared = peak("train.sharding=full", facts=several)
    assert shared.parts["optimizer"] == pytest.approx(whole.parts["optimizer"] / 4, rel=0.01)
    assert shared.total < whole.total


def test_work_grows_with_tokens_and_a_kept_trunk_saves_it() -> None:
    def work(*overrides: str, kept: bool = False) -> dict[str, float]:
        resolved = resolve(recipe(*overrides), SHAPE, FACTS).recipe
        return update_work(SHAPE, resolved, FACTS, SPEED, trunk_kept=kept)

    small = work("train.step_rows=4", "train.micro_batch_rows=4")
    large = work("train.step_rows=8", "train.micro_batch_rows=4")
    assert large["products"] == pytest.approx(2 * small["products"])
    (attention,) = (name for name in large if name.startswith("attention"))  # in C++ or torch's
    assert large[attention] == pytest.approx(2 * small[attention])
    again = work("train.activation_checkpointing=full")
    once = work("train.activation_checkpointing=none")
    assert again["products"] > 1.1 * once["products"]
    muon = work("optim.kind=muon")
    assert muon["orthogonal"] > 0 and "orthogonal" not in once
    lora = ("adapter.kind=lora", "model.path=base", "adapter.lora.last_layers=1")
    words = [word for word in WORDS if not word.startswith("model.size")]
    adapted = load_recipe(None, [*words, *lora]).recipe
    settled = resolve(adapted, SHAPE, FACTS).recipe
    first = update_work(SHAPE, settled, FACTS, SPEED)
    later = update_work(SHAPE, settled, FACTS, SPEED, trunk_kept=True)
    assert later["products"] < 0.8 * first["products"] < once["products"]
    resolved = resolve(recipe(), SHAPE, FACTS).recipe
    evaluation = evaluation_work(SHAPE, resolved, FACTS, SPEED)
    assert 0 < evaluation["products"] < once["products"]
    assert not evaluation_work(SHAPE, resolved, replace(FACTS, num_valid_rows=0), SPEED)


def test_a_verdict_leaves_room_for_its_own_error() -> None:
    assert verdict(100, 100 * (1 + MARGIN)) == "fits"
    assert verdict(100, 110) == "tight"
    assert verdict(100, 99) == "does not fit"


def test_checkpoints_on_the_disk() -> None:
    resolved = resolve(recipe("checkpoint.keep=2"), SHAPE, FACTS).recipe
    assert kept_checkpoints(resolved, 10) == 4  # two, the best, and the one being written
    assert kept_checkpoints(resolved, 1) == 1
    params = checkpoint_bytes(SHAPE, resolved) / 12
    assert params == pytest.approx(SHAPE.vocab_size * 256 + 4 * 790_000, rel=0.2)


# ---------------------------------------------------------------- what to change


def test_changes_come_by_harm_with_the_memory_they_need() -> None:
    facts = replace(FACTS, available_bytes=400 * 2**20, row_length=1024, targets_per_row=1024)
    wide = {"hidden_size": 1024, "num_layers": 8, "num_heads": 16, "intermediate_size": 4096}
    config = replace(SHAPE, vocab_size=512, **wide)
    settled = resolve(recipe("train.micro_batch_rows=8"), config, facts).recipe
    settled = settled.model_copy(
        update={"train": settled.train.model_copy(update={"activation_checkpointing": "none"})}
    )
    needed = peak_memory(config, settled, facts, PROCESS, fitted()).total
    found = remedies(config, settled, facts, PROCESS, fitted(), free_bytes=round(0.9 * needed))
    assert [row.words[0] for row in found[:5]] == [
        "train.micro_batch_rows=1",
        "train.activation_checkpointing=selective",
        "train.activation_checkpointing=full",
        "optim.kind=adamw8bit",
        "data.max_seq_length=512",
    ]
    assert found[5].words == ("model.size=2m",)
    assert all(row.needed_bytes < needed for row in found)
    assert "same result" in found[0].harm and "learns less" in found[5].harm


def test_of_a_trained_model_adapters_and_a_smaller_one_are_named() -> None:
    words = [word for word in WORDS if not word.startswith("model.size")]
    asked = load_recipe(None, [*words, "model.path=base"]).recipe
    settled = resolve(asked, SHAPE, FACTS).recipe
    large = replace(SHAPE, hidden_size=2048, num_layers=20, num_heads=32, intermediate_size=8192)
    found = remedies(large, settled, FACTS, PROCESS, fitted(), free_bytes=2**30)
    told = [row.words for row in found]
    assert ("adapter.kind=lora",) in told and ("adapter.kind=qlora",) in told
    assert any(words[0].startswith("model.path=") for words in told)
    by_words = {row.words[0]: row.needed_bytes for row in found}
    assert by_words["adapter.kind=qlora"] < by_words["adapter.kind=lora"]
    together = found[-1].words
    assert together == (
        "train.micro_batch_rows=1",
        "train.activation_checkpointing=full",
        "optim.kind=adamw8bit",
    )


# ---------------------------------------------------------------- machines


def test_every_machine_has_its_figures_and_their_source() -> None:
    for name in machines.names():
        found = machines.named_machine(name)
        assert found.memory_bytes > 2**32 and found.source
        assert found.speed("bf16").matmul_flops >= 1e11
        assert found.read_bytes_per_second > 1e10
    six = machines.named_machine("RTX4090x6")
    assert six.count == 6 and six.watts == 6 * 450
    assert machines.named_machine("m4-24gb").memory_bytes == 24 * 2**30
    assert machines.named_machine("a100-40gb").memory_bytes == 40 * 2**30


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("rtx4091", "did you mean rtx4090? known: rtx3060"),
        ("m4-23gb", "known: m4-16gb, m4-24gb, m4-32gb"),
        ("m4x2", "plan for one: --machine m4"),
    ],
)
def test_an_unknown_machine_is_told_with_those_known(text: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        machines.named_machine(text)
    assert hint in caught.value.hint and text in caught.value.message


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_rows_are_those_that_preparing_makes(kind: str, tmp_path: Path) -> None:
    """Counted, and found again when they were prepared."""
    from mule.data.recipe_rows import prepared_rows
    from mule.tokenizer import Tokenizer

    write_data(tmp_path)
    file = tmp_path / ("text.txt" if kind == "text" else "chats.jsonl")
    tokenizer = Tokenizer.train((tmp_path / "text.txt").read_text().splitlines(), 300)
    words = [f"data.train=[{file}]", f"data.format={kind}", "data.max_seq_length=64"]
    asked = load_recipe(None, [*words, "data.valid_share=0.1", "model.size=1m"]).recipe
    runs = tmp_path / "runs"
    counted = data_rows(asked, tokenizer, runs, is_own=True)
    train, valid = prepared_rows(asked.data, asked.train.seed, tokenizer, runs)
    assert counted.is_exact and not counted.is_prepared
    assert counted.row_length == train.row_length and counted.kind == train.kind
    assert counted.num_rows == pytest.approx(train.num_rows, rel=0.1)
    assert counted.targets_per_row == pytest.approx(train.num_targets / train.num_rows, rel=0.1)
    found = data_rows(asked, tokenizer, runs, is_own=True)
    assert valid is not None and found.is_prepared
    assert (found.num_rows, found.num_valid_rows) == (train.num_rows, valid.num_rows)
    assert found.how.startswith("prepared before, in ")
    other = asked.model_copy(update={"train": asked.train.model_copy(update={"seed": 7})})
    assert not data_rows(other, tokenizer, runs, is_own=True).is_prepared


# ---------------------------------------------------------------- the command


def test_a_plan_from_the_command_line(measured: Path, mule_cli: Mule) -> None:
    code, out, _ = mule_cli("plan", "pretrain.yaml", "--price", "1.20/h", "--watts", "50")
    assert code == 0 and out.startswith("fits  ")
    assert "free on a processor" in out and "to spare" in out
    for label in ("memory", "disk", "time", "length", "settings", "bill"):
        assert f"\n{label}" in out, label
    assert "30 updates of 6 rows of 48 tokens" in out
    assert "the tokenizer is trained on a sample" in out
    assert "\nloss      cannot be told: no finished run is here to compare with\n" in out
    assert out.rstrip().endswith("next: mule train pretrain.yaml")
    code, out, _ = mule_cli("plan", "pretrain.yaml", "--json")
    found = json.loads(out.splitlines()[-1])
    assert found["verdict"] == "fits" and found["calibrated"] and found["cost"] is None
    assert found["counts"]["updates"] == 30 and found["seconds_total"] > 0
    assert sum(found["memory"].values()) == found["memory_bytes"]


def test_a_plan_for_another_machine_says_that_it_is_not_calibrated(
    measured: Path, mule_cli: Mule
) -> None:
    code, out, _ = mule_cli("plan", "pretrain.yaml", "--machine", "rtx4090x6")
    assert code == 0 and "free on rtx4090 x 6" in out
    assert "not calibrated. NVIDIA Ada" in out and "Shares of these rates are assumed" in out


def test_what_does_not_fit_names_what_to_change(
    measured: Path, mule_cli: Mule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_bytes", lambda: 250 * 2**20)
    code, out, _ = mule_cli("plan", "pretrain.yaml")
    assert code == 1 and out.startswith("does not fit  ") and "are missing" in out
    assert "no setting of this recipe makes it noticeably smaller" in out
    monkeypatch.setattr(machine, "available_bytes", lambda: 500 * 2**20)
    large = ("model.num_layers=60", "model.intermediate_size=2048", "train.micro_batch_rows=6")
    code, out, _ = mule_cli("plan", "pretrain.yaml", *large, "model.hidden_size=512")
    assert "To make it fit, the least harm first" in out
    assert "optim.kind=adamw8bit" in out and "the moments are rounded" in out


def test_a_campaign_gets_its_dry_run(
    measured: Path, mule_cli: Mule, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("lab_run", "run", lambda file, words, dry_run: {"runs": 6, "file": str(file)})
    code, out, _ = mule_cli("plan", "lab-10m" if _has_lab() else "lab/lab-10m")
    assert code == 0 and "runs" in out and "6" in out
    code, _, err = mule_cli("plan", "lab/lab-10m", "--machine", "l4")
    assert code == 2 and "--machine cannot be combined with a campaign" in err


def _has_lab() -> bool:
    from mule.config.presets import campaign_file

    return campaign_file("lab-10m") is not None


@pytest.mark.parametrize(
    ("words", "told", "hint"),
    [
        (("pretrain.yaml", "--price", "much"), "not a price of an hour", "--price 1.20/h"),
        (
            ("pretrain.yaml", "--machine", "l4", "--check"),
            "--machine l4 is another machine",
            "leave one of the two out",
        ),
        (
            (
                "model.path=hf://Qwen/Qwen2.5-0.5B-Instruct",
                "data.train=[chats.jsonl]",
                "data.max_seq_length=40000",
            ),
            "exceeds the model's context of 32768 tokens",
            "set data.max_seq_length to 32768 or less",
        ),
    ],
)
def test_what_cannot_be_planned_is_told(
    words: tuple[str, ...], told: str, hint: str, measured: Path, mule_cli: Mule
) -> None:
    code, _, err = mule_cli("plan", *words)
    assert code == 2 and hint in err and told in err


def test_a_hub_model_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = [word for word in WORDS if not word.startswith("model.size")]
    asked = load_recipe(None, [*words, "model.path=hf://nobody/unknown-7b"]).recipe
    with pytest.raises(UserError, match=r"its config\.json and tokenizer are missing") as caught:
        base_model(asked)
    assert "hf download nobody/unknown-7b config.json" in caught.value.hint
    known = load_recipe(None, [*words, "model.path=hf://Qwen/Qwen2.5-0.5B-Instruct"]).recipe
    found = base_model(known)
    assert found is not None and found.config.hidden_size == 896 and found.download_bytes > 9e8
    alone = load_recipe(None, [*WORDS], complete=False).recipe
    adapter = alone.adapter.model_copy(update={"kind": "lora"})
    with pytest.raises(ConfigError, match="needs a model to adapt"):
        base_model(alone.model_copy(update={"adapter": adapter}))


def test_a_check_of_a_campaign_is_refused() -> None:
    with pytest.raises(UserError, match="a campaign is many"):
        plan_check.run(Path("c.yaml"), [], {"runs": 3})


def test_a_plan_imports_no_torch_once_the_machine_is_known(measured: Path) -> None:
    code = (
        "import sys; sys.argv = ['mule', 'plan', 'pretrain.yaml', '--json']\n"
        "from mule.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ)
    )
    assert ran.returncode == 0, ran.stderr


# ---------------------------------------------------------------- measuring


def test_a_machine_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibration, "_CHILD", "raise SystemExit('no torch here')")
    with pytest.raises(UserError, match="could not be measured: no torch here") as caught:
        calibration.calibration()
    assert "--machine rtx4090" in caught.value.hint


def test_the_best_that_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = replace(KNOWN, matmul_flops={"fp32": 1e10, "bf16": 9e10}, operation_s=1.0)
    best = calibration._better(slower, KNOWN)
    assert best.matmul_flops == {"fp32": 1e11, "bf16": 9e10} and best.operation_s == 1e-5
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = calibration.disk(tmp_path / "runs")
    assert first.bytes_per_second > 1e5 and calibration.disk(tmp_path) == first


def test_prices() -> None:
    assert plan._price("2") == 2.0 and plan._price("1.20/h") == 1.2 and plan._price(None) is None
