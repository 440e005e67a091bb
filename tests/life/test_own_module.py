"""A module of the user's beside Mule's own variants, from the file to the report; and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mule import fsio
from mule.commands import export, lab_report, lab_run, train
from mule.errors import ConfigError, ModelError, UserError
from mule.lab.inspect_build import load_class, own_files
from mule.lab.own_model import maker_of
from mule.lab.own_module import OwnModule
from mule.models.own_model import OwnModel
from mule.run import Run
from mule.train.model import Maker
from tests.docs_pages import parts
from tests.life.tiny_campaign import FILE, FOLDER, make_campaign
from tests.life.tiny_life import outcome, write_data

pytestmark = pytest.mark.slow  # half a minute of processor time

CAMPAIGN = """\
name: small
budget: {active_params: 300k, hidden_size: 64, head_dim: 32, tolerance: 0.05}
variants:
  mha:
  own: {module: own.py:GPT, module_args: {n_layer: 4, n_head: 2, n_embd: 64, ff: 410}}
seeds: [0]
tokenizer: {vocab_size: 300}
data: {train: [text.txt], format: text, max_seq_length: 48, valid_share: 0.1, test_share: 0.1,
  document_mask: true}
train: {steps: 6, step_rows: 4, micro_batch_rows: 2, threads: 1, compile: false, precision: bf16}
checkpoint: {every_steps: 2}
evaluate: {every_steps: 3, max_rows: 4}
compile_table: true
"""
PLANTED = Path(__file__).resolve().parents[1] / "planted_modules"


def _documented() -> str:
    """The example of the page."""
    (block,) = (b for b in parts("docs/campaigns.md")[1] if b.language == "python")
    return block.text


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where a campaign with the page's module was made, with its summary."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(_documented())
    text = CAMPAIGN.replace("compile_table: true\n", "decode: {enabled: false}\n")
    return make_campaign(folder, text, modules=["own.py"])


@pytest.fixture
def made(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(campaign)
    return campaign


def test_it_is_trained_and_measured_as_the_others(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    assert summary["runs"] == "2 of 2"
    mine, other = (fsio.read_json(FOLDER / "results" / f"{n}-s0.json") for n in ("own", "mha"))
    assert mine["tokens"] == other["tokens"] and mine["steps"] == other["steps"] == 6
    for part in ("valid", "test"):
        assert mine[part]["num_tokens"] == other[part]["num_tokens"]
        assert 0 < mine[part]["loss"] < 7 and mine[part]["bits_per_byte"] > 0
    assert mine["shape"]["active_params"] == 300_160
    assert mine["shape"]["flops_per_token"] is None and mine["train"]["share_of_peak"] is None
    assert mine["train"]["tokens_per_second"] > 0
    runs = [Run.open(FOLDER / "runs" / f"{name}-s0") for name in ("own", "mha")]
    assert runs[0].read_lineage()["data"] == runs[1].read_lineage()["data"]
    kept = fsio.read_json(FOLDER / "campaign.json")["modules"]["own"]
    assert kept["settings"]["vocab_size"] == 320 and kept["settings"]["block_size"] == 48
    assert kept["files"] == {"own.py": fsio.sha256_file("own.py")}


def test_its_checkpoint_is_loaded_by_its_own_class(made: Path) -> None:
    newest = Run.open(FOLDER / "runs" / "own-s0").latest_checkpoint()
    assert newest is not None
    weights = load_file(newest[1] / "model.safetensors")
    assert "tokens.weight" in weights and "head.weight" not in weights
    about = fsio.read_json(newest[1] / "module.json")
    _, make = load_class(Path("own.py").resolve(), about["name"])
    model = make(**about["settings"])
    model.load_state_dict(weights, strict=False)
    assert torch.equal(model.state_dict()["head.weight"], weights["tokens.weight"])


def test_the_report_has_it(made: Path) -> None:
    found = lab_report.run(FOLDER)
    assert found["own_modules"] == ["own"] and {r["arm"] for r in found["ranking"]} == {
        "own",
        "mha",
    }
    assert any("is not told where documents begin" in told for told in found["warnings"])
    report = (FOLDER / "report.md").read_text()
    assert "a module of its own, own.py:GPT" in report and "not known" in report


def test_mules_other_commands_say_that_they_cannot(made: Path) -> None:
    run = FOLDER / "runs" / "own-s0"
    with pytest.raises(ModelError, match=r"the weights of a module of your own, own\.py:GPT"):
        export.run(str(run))
    with pytest.raises(ConfigError, match="only a campaign trains a module of your own"):
        train.run(run / "recipe.yaml", [], resume=True)


def test_what_is_there_stays_and_what_cannot_be_measured_is_said(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"own\.py would be run"):
        lab_run.run(FILE, [])
    with pytest.raises(UserError) as caught:
        lab_run.run(FILE, [], dry_run=True)
    assert caught.value.hint.endswith("mule lab run small.yaml --dry-run --module own.py")
    found = lab_run.run(FILE, [], dry_run=True, modules=["own.py"])
    assert found["runs_to_do"] == 0
    (row,) = (row for row in found["variants"] if row["variant"] == "own")
    assert row["flops_per_token"] is None and row["measured"] and row["residual"] == "+0.05%"
    array = lab_run.run(FILE, [], slurm=True, modules=["own.py"])
    assert "--module own.py --task" in Path(array["script"]).read_text()
    text = Path("own.py").read_text()
    Path("own.py").write_text(text + "# changed\n")
    try:
        with pytest.raises(UserError, match=r"own\.py changed since campaigns/small/runs/own-s0"):
            lab_run.run(FILE, [], modules=["own.py"])
    finally:
        Path("own.py").write_text(text)


# ---------------------------------------------------------------- stopped and resumed


RECIPE = """\
model: {module: "own.py:Drops", module_args: ["vocab_size=320"]}
tokenizer: {vocab_size: 300}
data: {train: [text.txt], format: text, max_seq_length: 48}
train: {seed: 3, steps: 8, step_rows: 6, micro_batch_rows: 3, threads: 1, compile: false,
  precision: bf16, sharding: none, activation_checkpointing: none}
optim: {learning_rate: 0.01}
checkpoint: {every_steps: 2}
evaluate: {every_steps: 3, max_rows: 4}
"""


class _Crash(Exception):
    pass


def _own() -> OwnModule:
    return OwnModule(
        file="own.py",
        name="Drops",
        settings={"vocab_size": 320, "block_size": 48},
        files=own_files(Path("own.py").resolve()),
        takes=[],
        arguments=["targets"],
        keywords={"targets": "targets"},
        sizes={},
        vocab_size=320,
        max_seq_length=48,
        key="",
    )


def _crashing(own: OwnModule, at_call: int) -> Maker:
    """A maker whose model dies in training, as a process does."""

    def make(recipe: Any) -> OwnModel:
        model = maker_of(own)(recipe)
        assert isinstance(model, OwnModel)
        calls, call = 0, model._call

        def die(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += module.training
            if calls == at_call:
                raise _Crash
            return call(module, ids)

        model._call = die
        return model

    return make


@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_goes_on_to_the_same_bits(
    compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and buffers of the module's own; 2 passes an update, 1 of the rehearsal."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    shutil.copy(PLANTED / "drops_out.py", "own.py")
    recipe = Path("recipe.yaml")
    recipe.write_text(RECIPE.replace("compile: false", f"compile: {str(compiled).lower()}"))
    own = _own()
    train.run(recipe, [], name="whole", maker=maker_of(own))
    with pytest.raises(_Crash):
        train.run(recipe, [], name="killed", maker=_crashing(own, 11))
    assert Run.open("killed").checkpoints()[-1][0] == 4
    train.run(recipe, [], name="killed", resume=True, maker=maker_of(own))
    whole, killed = (outcome(Path("runs") / name) for name in ("whole", "killed"))
    assert whole == killed and whole["step"] == 8
    newest = Run.open("whole").latest_checkpoint()
    assert newest is not None
    assert int(load_file(newest[1] / "model.safetensors")["seen"]) == 2 * 8
    Path("own.py").write_text(Path("own.py").read_text() + "# changed\n")
    changed = replace(own, files=own_files(Path("own.py").resolve()))
    with pytest.raises(UserError, match=r"own\.py changed since this checkpoint was written"):
        train.run(recipe, [], name="whole", resume=True, maker=maker_of(changed))


# ---------------------------------------------------------------- several processes


def _newest(name: str) -> dict[str, torch.Tensor]:
    """The weights and buffers that the campaign's run of the module ended with."""
    newest = Run.open(Path("campaigns") / name / "runs" / "own-s0").latest_checkpoint()
    assert newest is not None and newest[0] == 6
    return load_file(newest[1] / "model.safetensors")


TOTALS = """

import atexit, os


class Totals(Drops):
    def __init__(self, vocab_size, block_size, width, dropout):
        super().__init__(vocab_size, block_size, width, dropout=dropout)
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))
        file = "total-" + os.environ.get("RANK", "alone")
        atexit.register(lambda: open(file, "w").write(str(int(self.total))))

    def forward(self, ids, targets=None):
        if self.training:
            self.total += ids.sum()
        return super().forward(ids, targets)
"""


@pytest.mark.timeout(300)
def test_several_processes_train_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers are the first process's: it passes one of the two micro-batches of each update."""
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    Path("own.py").write_text((PLANTED / "drops_out.py").read_text() + TOTALS)
    text = CAMPAIGN.replace("own.py:GPT", "own.py:Totals")
    text = text.replace("n_layer: 4, n_head: 2, n_embd: 64, ff: 410", "width: 260, dropout: 0.0")
    text = text.replace("precision: bf16", "precision: fp32, device: cpu")
    FILE.write_text(text.replace("compile_table: true\n", "decode: {enabled: false}\n"))
    for name, processes in {"one": 1, "two": 2}.items():
        words = [f"name={name}", f"processes={processes}"]
        assert lab_run.run(FILE, words, modules=["own.py"])["runs"] == "2 of 2"
    one, two = _newest("one"), _newest("two")
    assert int(one.pop("seen")) == 12 and int(two.pop("seen")) == 6
    total = int(two.pop("total"))
    assert 0 < total < int(one.pop("total"))
    assert [int(Path(f"total-{rank}").read_text()) for rank in (0, 1)] == [total, total]
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
