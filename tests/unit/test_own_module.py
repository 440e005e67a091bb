"""A campaign's variant that is a module of the user's: what is examined, refused and handed on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mule import fsio, progress
from mule.batch import IGNORE
from mule.cli import render_lab_shapes
from mule.commands import lab_report, lab_shapes
from mule.commands.lab_measure import measure_compiling
from mule.config.campaign import Campaign, load_campaign
from mule.config.dump import identity_values, to_yaml
from mule.config.lab import BudgetSection
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import ConfigError, ModelError, UserError
from mule.lab import own_module
from mule.lab._check_worker import examine as examine_here
from mule.lab.campaign import Folder, Job, Plan
from mule.lab.inspect_build import filled, load_class, own_files
from mule.lab.own_model import explained, maker_of, trained
from mule.lab.own_module import OwnModule, check_named, own_modules
from mule.models.loss import nll_of_logits, nll_of_targets, nll_sum, nll_sum_of_logits
from mule.models.own_model import OwnModel
from mule.plan.shape import new_model_config
from mule.train.optim import decays
from tests.lab_campaign import Plan as Planned
from tests.lab_campaign import write_campaign
from tests.tiny import random_batch

PLANTED = Path(__file__).resolve().parents[1] / "planted_modules"
CAMPAIGN = """\
name: small
budget: {active_params: 30k, tolerance: 0.05}
variants:
  mha: {attention: mha}
  own: {module: own.py:Drops, module_args: {num_layers: 1}}
tokenizer: {vocab_size: 500}
data: {train: [text.txt], format: text, max_seq_length: 32, valid_share: 0.1, test_share: 0.2}
train: {steps: 8, step_rows: 4}
"""


def _here(
    file: Path, name: str, settings: dict[str, Any], *, checks: tuple[str, ...], **more: Any
) -> dict[str, Any]:
    """The same checks in this process, which has torch already."""
    facts: dict[str, Any] = {}
    findings: list[dict[str, Any]] = []

    def tell(event: dict[str, Any]) -> None:
        facts.update(event.get("facts", {}))
        findings.extend({"check": event["check"], **one} for one in event.get("findings", []))

    request = {"file": str(file.resolve()), "name": name, "settings": settings, "checks": checks}
    examine_here(request | {"fits": more["fits"]}, tell)
    return {"facts": facts, "findings": findings}


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Campaign]:
    """Makes the campaign with some words changed, in a folder with the planted module as own.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(own_module, "examine", _here)
    shutil.copy(PLANTED / "drops_out.py", "own.py")

    def loaded(was: str = "", now: str = "", *words: str) -> Campaign:
        assert was in CAMPAIGN
        Path("small.yaml").write_text(CAMPAIGN.replace(was, now, 1))
        return load_campaign("small.yaml", list(words))

    return loaded


def _own(campaign: Campaign, known: dict[str, Any] | None = None, runs: str = "runs") -> OwnModule:
    found = own_modules(campaign, vocab_rows=512, known=known or {}, runs=Path(runs))
    return found["own"]


def _model(own: OwnModule, seed: int = 0) -> OwnModel:
    model = maker_of(own)(Recipe.model_validate({"train": {"seed": seed}}))
    assert isinstance(model, OwnModel)
    return model


def _weight(model: nn.Module) -> torch.Tensor:
    return dict(model.named_parameters())["mix.weight"]


# ---------------------------------------------------------------- the file's word is not enough


@pytest.mark.parametrize(
    ("named", "said", "hint"),
    [
        (
            [],
            "variants.own.module: own.py would be run, and a campaign may come from somebody else, so "
            "you have to name the file too",
            "look into it, then: mule lab run small.yaml --module own.py",
        ),
        (
            ["own.py", "other.py"],
            "--module other.py: no variant of the campaign is a module of this file",
            "name one of own.py",
        ),
    ],
)
def test_a_file_is_run_only_when_it_is_named(
    campaign: Callable[..., Campaign], named: list[str], said: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_named(campaign(), named, ["mule", "lab", "run", "small.yaml"])
    assert (caught.value.message, caught.value.hint) == (said, hint)
    check_named(campaign(), ["./own.py"], [])


def test_without_modules_none_may_be_named(campaign: Callable[..., Campaign]) -> None:
    plain = campaign("  own: {module: own.py:Drops, module_args: {num_layers: 1}}\n", "")
    check_named(plain, [], [])
    with pytest.raises(UserError, match="no variant of the campaign") as caught:
        check_named(plain, ["own.py"], [])
    assert caught.value.hint == "leave it away"


@pytest.mark.parametrize(
    ("module", "said", "hint"),
    [
        ("none.py:Drops", "none.py: no such Python file", "a class: module: model.py:GPT"),
        ("own.py", "own.py: which class? It defines Drops", "module: own.py:Drops"),
    ],
)
def test_a_module_is_a_file_and_a_class(
    campaign: Callable[..., Campaign], module: str, said: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_named(campaign("own.py:Drops", module), ["own.py"], [])
    assert caught.value.message == f"variants.own.module: {said}" and hint in caught.value.hint


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("{num_layers: 1}", "4", "module_args: expected entries of a name and a value, such as"),
        (
            "module_args: {",
            "mixer: mamba2, module_args: {",
            "variants.own.mixer: cannot take effect",
        ),
        (
            "module: own.py:Drops, ",
            "",
            "variants.own.module_args: cannot take effect without module",
        ),
    ],
)
def test_what_goes_beside_a_module(
    campaign: Callable[..., Campaign], was: str, now: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        campaign(was, now)
    assert said in caught.value.message


# ---------------------------------------------------------------- what makes it incomparable


@pytest.mark.parametrize(
    ("was", "now", "said", "hint"),
    [
        (
            "{active_params: 30k",
            "{mode: flops_per_token, active_params: 30k",
            "what a token",
            "mode=",
        ),
        (
            "tokenizer:",
            "sizes: [30k, 60k]\ntokenizer:",
            "its arguments make one size",
            "take sizes",
        ),
        ("  mha: {attention: mha}\n", "", "no variant is one of Mule's own", "add one beside it"),
        (
            "steps: 8",
            "steps: 8, dropout: 0.1",
            "train.dropout=0.1 acts inside",
            "own dropout is one",
        ),
        (
            "steps: 8",
            "steps: 8, activation_checkpointing: full",
            "train.activation_checkpointing=full acts inside Mule's own blocks",
            "torch.utils.checkpoint",
        ),
        (
            "steps: 8",
            "steps: 8, sharding: full",
            "train.sharding=full acts inside",
            "sharding=none",
        ),
        (
            "steps: 8",
            "steps: 8, precision: fp8",
            "train.precision=fp8 acts inside",
            "precision=bf16",
        ),
        ("tokenizer:", "optim: {kind: muon}\ntokenizer:", "optim.kind=muon acts", "kind=adamw"),
    ],
)
def test_what_acts_inside_mules_own_blocks_is_refused(
    campaign: Callable[..., Campaign], was: str, now: str, said: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        _own(campaign(was, now))
    assert caught.value.message.startswith(f"variants.own.module: {said}")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("args", "said", "hint"),
    [
        (
            "{num_layers: 8}",
            "own.py:Drops has 47,328 active parameters, 57.8% above the budget of 30,000; 5.0% are "
            "allowed",
            "lower width or num_layers in variants.own.module_args",
        ),
        (
            "{width: 32}",
            "own.py:Drops has 20,608 active parameters, 31.3% below the budget of 30,000; 5.0% are "
            "allowed",
            "raise width or num_layers in variants.own.module_args, or allow more: "
            "budget.tolerance=0.314",
        ),
        (
            "{widht: 32}",
            "own.py:Drops: widht is no argument of Drops nor of its config",
            "did you mean width=...?; all that there is to say of it: mule lab check own.py:Drops "
            "widht=32",
        ),
        (
            "{vocab_size: 99}",
            "its embedding has 99 rows, the campaign's vocabulary 512 tokens",
            "vocab_size is filled in where the class takes it",
        ),
        ("{block_size: 8}", "IndexError", "mend this line"),
    ],
)
def test_a_module_is_examined_before_any_run_begins(
    campaign: Callable[..., Campaign], args: str, said: str, hint: str
) -> None:
    loaded = campaign("{num_layers: 1}", args)
    with pytest.raises(UserError) as caught:
        _own(loaded)
    assert said in caught.value.message and hint in caught.value.hint
    assert caught.value.message.startswith("variants.own")


def test_what_is_missing_and_what_leaks_is_told(campaign: Callable[..., Campaign]) -> None:
    loaded = campaign()
    text = Path("own.py").read_text()
    Path("own.py").write_text(text.replace("width=48, num_layers=2", "width, num_layers"))
    with pytest.raises(UserError) as caught:
        _own(loaded)
    assert "Drops cannot be built without width" in caught.value.message
    assert "give them, for example: module_args: {width: 64}" in caught.value.hint
    Path("own.py").write_text(text.replace(".tril()", ""))
    with pytest.raises(
        UserError, match=r"variants\.own\.module: own\.py:Drops: not causal"
    ) as caught:
        _own(loaded)
    assert "mule lab check own.py:Drops num_layers=1" in caught.value.hint


# ---------------------------------------------------------------- what is known of it


def test_what_the_class_takes_of_the_campaign_is_filled_in(tmp_path: Path) -> None:
    fits = {"vocab_size": 512, "max_seq_length": 32}
    module, make = load_class(PLANTED / "plain_gpt.py", "GPT")
    assert filled(module, make, {"n_layer": 3}, fits) == {
        "n_layer": 3,
        "vocab_size": 512,
        "block_size": 32,
    }
    assert filled(module, make, {"block_size": 64}, fits)["block_size"] == 64
    (tmp_path / "mine.py").write_text("from beside import One\n")
    (tmp_path / "beside.py").write_text(
        "from torch import nn\n\n\nclass One(nn.Linear):\n    pass\n"
    )
    load_class(tmp_path / "mine.py", "One")
    found = own_files(tmp_path / "mine.py")
    assert found == {n: fsio.sha256_file(tmp_path / n) for n in ("beside.py", "mine.py")}


def test_its_sizes_are_counted_and_nothing_else_is_claimed(
    campaign: Callable[..., Campaign],
) -> None:
    loaded = campaign()
    own = _own(loaded)
    assert own.settings == {"num_layers": 1, "vocab_size": 512, "block_size": 32}
    assert own.keywords == {"targets": "targets"} and own.vocab_size == 512
    row = own.row("own", loaded.plan.budget, 32)
    mule = lab_shapes.shape_rows(
        loaded.plan.variants,
        BudgetSection(active_params="6m"),
        vocab_size=512,
        max_seq_length=32,
        context=32,
    )[0]
    assert mule.keys() - row.keys() == set() and row["flops_per_token"] is None
    assert row["active_params"] - row["active_params_without_embeddings"] == 512 * 48  # tied
    assert row["residual"] == pytest.approx(row["active_params"] / 30_000 - 1)
    told = own.across_documents("data.document_mask")
    assert "segment_ids; what it means there Mule does not guess" in told
    assert "data.document_mask=false makes them equal" in told


def test_a_changed_file_is_told_of_where_runs_were_made(campaign: Callable[..., Campaign]) -> None:
    loaded = campaign()
    own = _own(loaded)
    known = {"own": asdict(own)}
    assert _own(loaded, known) == own
    Path("own.py").write_text(Path("own.py").read_text() + "# changed\n")
    assert _own(loaded, known).files != own.files  # nothing was trained yet
    for other in ("own-small-s0", "search-own-small-try01"):  # a variant that is called alike
        Path("runs", other).mkdir(parents=True)
    assert _own(loaded, known).files != own.files
    search = Path("runs/search-own-lr1e-05")
    search.mkdir()
    with pytest.raises(UserError, match=r"own\.py changed since runs/search-own-lr1e-05 was begun"):
        _own(loaded, known)
    search.rmdir()
    Path("runs/own-s0").mkdir()
    with pytest.raises(UserError, match=r"own\.py changed since runs/own-s0 was begun") as caught:
        _own(loaded, known)
    assert caught.value.hint.startswith("bring the old one back, or begin another campaign")
    with pytest.raises(
        UserError, match=r"own\.py changed since the campaign began with own\.py:Drops"
    ):
        maker_of(own)(Recipe())


def test_the_recipe_of_a_run_says_what_is_trained(campaign: Callable[..., Campaign]) -> None:
    loaded = campaign()
    plan = Plan(loaded, Folder(Path("campaigns/small")), loaded.shared, vocab_rows=512)
    recipe = plan.recipe(Job("own", "", 0), {"train.steps": 8, "optim.learning_rate": 0.001})
    assert recipe.model.module == "own.py:Drops"
    assert recipe.model.module_args == ["num_layers=1", "vocab_size=512", "block_size=32"]
    Path("written.yaml").write_text(to_yaml(recipe))
    again = load_recipe(Path("written.yaml"), []).recipe
    assert identity_values(again) == identity_values(recipe)
    assert plan.active_params(Job("own", "", 0)) == plan.own["own"].active_params
    with pytest.raises(ConfigError, match="only a campaign trains a module of your own") as caught:
        new_model_config(recipe, 512)
    assert "mule lab run CAMPAIGN.yaml --module own.py" in caught.value.hint
    with pytest.raises(ConfigError, match=r"model\.module=own\.py:Drops brings its own"):
        load_recipe(None, ["model.module=own.py:Drops", "model.hidden_size=64"], complete=False)
    with pytest.raises(ConfigError, match=r"cannot take effect without model\.module"):
        load_recipe(None, ["model.module_args=[a=1]", "model.size=1m"], complete=False)


def test_what_is_shown_and_said_of_it(campaign: Callable[..., Campaign]) -> None:
    loaded = campaign()
    plan = Plan(loaded, Folder(Path("campaigns/small")), loaded.shared, vocab_rows=512)
    job, told = Job("own", "", 0), []

    class Listener(progress.Silence):
        def note(self, text: str, level: str) -> None:
            told.append(text)

    recipe = plan.recipe(job, {"train.steps": 8, "optim.learning_rate": 0.001})
    with progress.using(Listener()):
        measure_compiling({job: recipe}, plan.folder)
    assert told == [
        "own: compiling is not measured: a module of your own; its graph breaks: mule lab check "
        "own.py:Drops"
    ]
    row = plan.own["own"].row("own", loaded.plan.budget, 32)
    assert render_lab_shapes._dimensions(row) == ["own", "own.py:Drops", "-", "-", "-", "+2.88%"]
    assert render_lab_shapes._figures(row)[1:4] == ["30.9k", "6.29k", "30.9k"]
    assert set(render_lab_shapes._figures(row)[4:]) == {"not known"}
    with pytest.raises(UserError, match="--module goes with a campaign"):
        lab_shapes.run(None, [], active="6m", modules=["own.py"])
    with pytest.raises(UserError, match=r"own\.py would be run") as caught:
        lab_shapes.run(Path("small.yaml"), [])
    assert caught.value.hint.endswith("mule lab shapes small.yaml --module own.py")


# ---------------------------------------------------------------- the model of a run


def test_it_is_made_from_the_seed_and_gives_the_losses_of_its_logits(
    campaign: Callable[..., Campaign],
) -> None:
    own = _own(campaign())
    first, second = (_model(own, seed) for seed in (1, 2))
    names = [name for name, _ in first.named_parameters()]
    assert "wte.weight" in names and "lm_head.weight" not in names  # tied: once
    assert not torch.equal(_weight(first), _weight(second))
    named = dict(first.named_parameters())
    assert not decays("wte.weight", named["wte.weight"]) and decays(
        "h.0.weight", named["h.0.weight"]
    )
    batch = random_batch(3, 20, trained=0.7)
    first.eval()
    logits = first(batch.input_ids)
    expected = nll_of_targets(logits, torch.eye(512), batch.targets, None)
    torch.testing.assert_close(first.nll_of_targets(batch), expected)
    torch.testing.assert_close(first.nll_sum(batch), expected.sum())
    labels = (batch.targets % 2).long()
    parts = first.nll_by_label(batch, labels, [0, 1])
    torch.testing.assert_close(parts[0] + parts[1], expected.sum())
    with pytest.raises(ModelError, match="has no cache that Mule knows") as caught:
        first.new_cache(1, 8)
    assert "evaluate.prompts" in caught.value.hint


def test_errors_of_the_users_code_name_their_line(campaign: Callable[..., Campaign]) -> None:
    own = _own(campaign())
    model = _model(own)
    with pytest.raises(UserError, match=r"own\.py:\d+: \w+: ") as caught, explained(own):
        model(torch.zeros(1, 33, dtype=torch.int64))  # longer than it was made for
    assert "mend this line; mule lab check own.py:Drops" in caught.value.hint
    with pytest.raises(ZeroDivisionError), explained(own):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="out of memory"), explained(own):
        raise UserError("out of memory", "lower something")


def test_a_checkpoint_is_its_own_weights_and_no_model_of_mules(
    campaign: Callable[..., Campaign],
) -> None:
    from mule.adapters.source import find_source, load_source
    from mule.models.folder import load_model, weight_files

    own = _own(campaign())
    model = _model(own)
    dict(model.module.named_buffers())["seen"].add_(7)
    Path("saved").mkdir()
    model.write({name: one.detach() for name, one in model.named_parameters()}, Path("saved"))
    again = trained(own, Path("saved"), dtype=torch.bfloat16, device="cpu")
    buffers = dict(again.module.named_buffers())
    assert int(buffers["seen"]) == 7 and buffers["mask"].dtype == torch.float32
    assert torch.equal(_weight(again), _weight(model)) and again.autocast_dtype == torch.bfloat16
    about = fsio.read_json(Path("saved/module.json"))
    assert about["file"] == "own.py" and about["files"] == {"own.py": fsio.sha256_file("own.py")}
    for use in (load_model, lambda folder: load_source(find_source(str(folder)))):
        with pytest.raises(ModelError, match=r"the weights of a module of your own, own\.py:Drops"):
            use(Path("saved"))
    told = f"load_file('{weight_files('saved')[0]}') gives"
    with pytest.raises(ModelError) as caught:
        load_model("saved")
    assert told in caught.value.hint
    Path("own.py").write_text(Path("own.py").read_text() + "# changed\n")
    new = _model(_own(campaign()))
    with pytest.raises(
        UserError, match=r"saved: own\.py changed since this checkpoint was written"
    ):
        new.check_same(Path("saved"))


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_the_loss_of_logits_is_that_of_a_head(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    """Chunks of five tokens; the logits stay as they are."""
    from mule.models import loss

    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(*n, generator=generator) for n in ((3, 7, 11), (89, 11)))
    targets = torch.randint(0, 89, (3, 7), generator=generator)
    targets[0, 2:] = IGNORE
    hidden.requires_grad_()
    (expected,) = torch.autograd.grad(nll_sum(hidden, weight, targets, grad_scale=scale), hidden)
    logits = hidden @ weight.T
    before = logits.detach().clone()
    nll = nll_sum_of_logits(logits, targets, grad_scale=scale)
    assert torch.equal(logits, before)
    torch.testing.assert_close(nll, nll_of_logits(logits, targets).sum())
    (found,) = torch.autograd.grad(nll, hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(nll_sum_of_logits(logits, targets), nll.detach())


# ---------------------------------------------------------------- the report


def test_the_report_says_what_nobody_can_know(tmp_path: Path) -> None:
    folder = write_campaign(
        tmp_path, Planned(variants={"mha": {}, "own": {"module": "own.py:Drops"}})
    )
    shapes = fsio.read_json(folder / "shapes.json")
    unknown = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "flops_per_token")
    shapes[1] |= dict.fromkeys(unknown) | {"across_documents": True, "module": "own.py:Drops"}
    fsio.write_json(folder / "shapes.json", shapes)
    for file in (folder / "results").glob("own-*.json"):
        result = fsio.read_json(file)
        result["shape"] |= dict.fromkeys(("flops_per_token", "kv_bytes_per_token", "state_bytes"))
        result["train"]["share_of_peak"] = None
        result["test"]["loss"] -= 0.5
        fsio.write_json(file, result)
    for part in ("decode", "compile"):
        (folder / part / "own.json").unlink()
    for run in (folder / "runs").glob("own-*"):
        text = (run / "resolved.yaml").read_text()
        (run / "resolved.yaml").write_text(
            text.replace('"family": "qwen3", ', '"module": "own.py:D", ')
        )
    found = lab_report.run(folder)
    assert found["own_modules"] == ["own"] and found["next"].startswith("mule runs show ")
    assert "decoding: not measured for own (its own module)" in found["missing"]
    assert any(
        "own, a module of its own, is not told where documents" in w for w in found["warnings"]
    )
    report = (folder / "report.md").read_text()
    rows = [line for line in report.splitlines() if line.startswith("| own |")]
    assert any("a module of its own, own.py:Drops | not known | not known" in row for row in rows)
    assert not any("missing" in row for row in rows)
    assert "mha → own" in report


def test_the_best_variant_is_not_taken_for_a_module_by_its_name(tmp_path: Path) -> None:
    variants: dict[str, Any] = {"own": {"module": "own.py:Drops"}, "own-small": {}}
    folder = write_campaign(tmp_path, Planned(variants=variants))
    for file in (folder / "results").glob("own-small-*.json"):
        result = fsio.read_json(file)
        result["test"]["loss"] -= 0.5
        fsio.write_json(file, result)
    found = lab_report.run(folder)
    assert found["best_arm"] == "own-small" and found["next"].startswith("mule export ")
