"""The lab's recipes: each is run, made small, by the commands in its own header."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from mule import fsio, progress
from mule.commands import lab_run
from mule.config.campaign import load_campaign
from mule.config.docs import DOCS
from mule.config.load import load_recipe
from mule.config.presets import campaign_file, preset_file, presets
from mule.config.reader import parse_yaml, plain
from mule.errors import CheckFailed
from mule.models import cost
from mule.models.solve import solve_all
from mule.plan.shape import new_model_config
from mule.run import Run
from mule.tokenizer import Tokenizer
from tests.life.test_recipes import ANY, SHORT, header_commands, write_sources
from tests.life.tiny_life import Forker

CAMPAIGN = "lab/wikitext103-125m"
BASE, MIXED, FAST = (
    f"lab/{name}" for name in ("pretrain-mamba-124m", "sft-mamba-124m", "sft-mamba-124m-fast")
)
SMALL = (
    *("model.hidden_size=64", "model.num_layers=2", "model.intermediate_size=64"),
    *("model.mamba.state_size=4", "model.max_position_embeddings=128"),
    *("tokenizer.vocab_size=320", "train.tokens=900", "train.step_tokens=480"),
    *("optim.warmup_steps=1", "data.valid_share=0.1"),
)
TINY = [
    *("seeds=[0]", "budget.active_params=200k", "budget.hidden_size=64", "budget.num_layers=2"),
    *("budget.head_dim=32", "budget.tolerance=0.3", "data.max_seq_length=48", "train.steps=2"),
    *("train.step_rows=4", "train.micro_batch_rows=2", "train.threads=1", "train.compile=false"),
    *("train.precision=fp32", "optim.warmup_steps=1", "evaluate.every_steps=2"),
    *("evaluate.max_rows=4", "decode.enabled=false", "compile_table=false"),
    *("variants.gqa-mlp.num_kv_heads=1", "variants.gqa-heads.num_kv_heads=1"),
    *("variants.gqa-moe.num_kv_heads=1", "variants.gqa-moe.num_experts=4"),
    *("variants.mamba2.state_size=8", "variants.hybrid.state_size=8"),
    *("variants.hybrid.attention_every=2", "variants.hybrid.num_kv_heads=1"),
]


class Listener(progress.Silence):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.notes.append(text)


# ---------------------------------------------------------------- WikiText-103


def _article(number: int) -> list[str]:
    """The lines of an article, as WikiText has them."""
    text = f"The {number} th king of the land saw {number * 7} @,@ 000 ships , and the sea ."
    return [f" = King {number} = \n", f" {text} \n", " = = Reign = = \n", f" {text} {text} \n"]


def _write_wikitext(folder: Path) -> dict[str, int]:
    """wikitext/ and gpt2/ as the header asks for them; tokens a part, counted row by row."""
    parts = {"train": range(40), "validation": range(40, 46), "test": range(46, 53)}
    rows = {name: [row for n in numbers for row in _article(n)] for name, numbers in parts.items()}
    (folder / "wikitext").mkdir()
    for name, lines in rows.items():
        (folder / "wikitext" / f"{name}.txt").write_text("".join(lines))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=319,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(rows["train"], trainer)
    (folder / "gpt2").mkdir()
    backend.model.save(str(folder / "gpt2"))  # vocab.json and merges.txt, as OpenAI published them
    tokenizer = Tokenizer.load(folder / "gpt2")
    found = {name: sum(map(len, tokenizer.encode_batch(lines))) for name, lines in rows.items()}
    return {"train": found["train"], "valid": found["validation"], "test": found["test"]}


@pytest.fixture
def wikitext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The settings that make the campaign small, in a folder with its data."""
    tokens = _write_wikitext(tmp_path)
    monkeypatch.chdir(tmp_path)
    return [*TINY, *(f"expect_tokens.{part}={count}" for part, count in tokens.items())]


def test_tokens_are_counted_as_the_published_counts_were(wikitext: list[str]) -> None:
    """Row by row, without ends of documents; here articles are documents, each with an end."""
    count = int(wikitext[-1].partition("=")[2])
    with pytest.raises(CheckFailed, match=f"data.test has {count:,} tokens, and .* {count + 7:,}"):
        lab_run.run(Path(CAMPAIGN), [*wikitext[:-1], f"expect_tokens.test={count + 7}"])


def test_other_files_are_told_before_anything_is_trained(wikitext: list[str]) -> None:
    Path("wikitext/train.txt").write_text("".join(_article(1)))
    with pytest.raises(CheckFailed, match=r"data\.train has .* tokens, and expect_tokens\.train"):
        lab_run.run(Path(CAMPAIGN), wikitext)
    assert not list(Path("campaigns").glob("*/results/*"))


@pytest.mark.slow
def test_every_variant_of_the_campaign_runs(wikitext: list[str]) -> None:
    summary = lab_run.run(Path(CAMPAIGN), wikitext)
    assert summary["runs"] == "6 of 6"
    folder = Path("campaigns/wikitext103-125m")
    names = ("mha", "gqa-mlp", "gqa-heads", "gqa-moe", "mamba2", "hybrid")
    for name in names:
        result = fsio.read_json(folder / "results" / f"{name}-s0.json")
        assert result["steps"] == 2 and result["tokens"] == 2 * 4 * 48
        words = sum(len(" ".join(_article(number)).split()) for number in range(46, 53))
        assert result["test"]["num_words"] == words
    assert fsio.read_json(folder / "campaign.json")["data"]["valid"]["documents"] == 6


def test_the_campaign_says_what_was_asked_for() -> None:
    campaign = load_campaign(CAMPAIGN)
    plan, shared = campaign.plan, campaign.shared
    assert plan.expect_tokens.model_dump() == {
        "train": 117_920_140,
        "valid": 247_289,
        "test": 283_287,
    }
    assert (shared.data.max_seq_length, shared.train.step_tokens) == (1024, 524_288)
    assert shared.train.precision == "bf16" and shared.optim.kind == "adamw"
    assert plan.seeds == [0, 1, 2] and campaign.baseline == "mha"
    spent = {name: variant.spend for name, variant in plan.variants.items() if variant.spend}
    assert spent == {"gqa-mlp": "mlp", "gqa-heads": "heads"}


def test_its_variants_have_125_million_active_parameters() -> None:
    plan = load_campaign(CAMPAIGN).plan
    solved = solve_all(plan.budget, plan.variants, vocab_size=50_304, max_seq_length=1024)
    mha, heads = solved["mha"].config, solved["gqa-heads"].config
    for name, one in solved.items():
        limit = 0.005 if name in ("mha", "gqa-mlp", "gqa-heads") else 0.015
        assert cost.active_params(one.config) == pytest.approx(125e6, rel=limit), name
        assert one.config.hidden_size == 768 and one.config.num_layers == 12
    assert heads.num_heads > mha.num_heads and heads.intermediate_size == mha.intermediate_size
    assert solved["gqa-mlp"].config.intermediate_size > mha.intermediate_size


def test_the_variants_of_the_page_can_be_solved() -> None:
    """What docs/lab.md shows of experts and Mamba, at ten million parameters."""
    page = (DOCS / "lab.md").read_text()
    budget = load_campaign("lab/lab-10m").plan.budget
    blocks = [part.partition("```")[0] for part in page.split("```yaml\n")[1:]]
    shown = [plain(parse_yaml(block))["variants"] for block in blocks]
    assert [list(variants) for variants in shown] == [
        ["dropless", "capacity", "rerouted", "by-bias", "shared"],
        ["mamba2", "hybrid", "mamba1"],
    ]
    for variants in shown:
        words = [f"variants={json.dumps(variants)}", f"baseline={next(iter(variants))}"]
        plan = load_campaign("lab/lab-10m", words).plan
        solve_all(budget, plan.variants, vocab_size=4096, max_seq_length=256)


@pytest.mark.usefixtures("wikitext")
def test_the_short_budget_of_its_header_is_told_to_starve() -> None:
    """One pass in updates of 524,288 tokens is 225 of them."""
    listener = Listener()
    with progress.using(listener):
        ahead = lab_run.run(Path(CAMPAIGN), ["train.tokens=117_900_000"], dry_run=True)
        (said,) = listener.notes
        assert ahead["steps"] == 225 and "try train.step_tokens=131072" in said
        assert "117,964,800 tokens in updates of 524,288 are 225 updates" in said
        assert lab_run.run(Path(CAMPAIGN), [], dry_run=True)["steps"] == 2249
        assert len(listener.notes) == 1  # as it is written nothing starves


# ---------------------------------------------------------------- Mamba


def _write_oasst(file: Path) -> None:
    """Trees of two answers each, as OpenAssistant has them."""
    trees = []
    for n in range(12):
        replies = [
            {"message_id": f"{n}{k}", "text": f"answer {n} {k} sea", "role": "assistant", "rank": k}
            for k in (0, 1)
        ]
        prompt = {"message_id": str(n), "text": f"what of {n}", "role": "prompter"}
        trees.append({"message_tree_id": str(n), "prompt": prompt | {"replies": replies}})
    file.write_text("".join(json.dumps(tree) + "\n" for tree in trees))


@pytest.mark.slow
def test_the_mamba_recipes_run(forker: Forker, tmp_path: Path) -> None:
    """All the commands of their headers, in order."""
    write_sources(tmp_path)
    _write_oasst(tmp_path / "oasst.jsonl")
    base, mix, mixed = header_commands(MIXED)
    assert base == header_commands(BASE)[0] == header_commands(FAST)[0]
    fast = header_commands(FAST)[1]
    for words in ((*base, *SMALL, *ANY), mix, (*mixed, *SHORT, *ANY), (*fast, *SHORT, *ANY)):
        code = forker.run(tmp_path, *words)
        assert code == 0, (tmp_path / "output.log").read_text()
    card = json.loads((tmp_path / "sft-mamba-mix" / "mix.json").read_text())
    assert [source["name"] for source in card["sources"]] == ["alpaca", "dolly", "oasst"]
    for name, rate in (("sft-mamba-124m", 5e-6), ("sft-mamba-124m-fast", 1e-5)):
        rows = Run.open(tmp_path / "runs" / name).metrics()
        assert rows[0]["learning_rate"] == pytest.approx(rate)
        assert [row["step"] for row in rows if "val_loss" in row] == [2, 3]


def test_the_mamba_recipes_say_what_was_asked_for() -> None:
    found = {}
    for name in (MIXED, FAST):
        file = preset_file(name)
        assert file is not None
        recipe = load_recipe(file, []).recipe
        optim, train = recipe.optim, recipe.train
        found[name] = (optim.learning_rate, train.step_examples, optim.warmup_steps, train.steps)
        assert (optim.max_grad_norm, optim.weight_decay) == (1.0, 0.05)
        assert recipe.data.max_seq_length == 1024
    assert found == {MIXED: (5e-6, 192, 1_000, 25_000), FAST: (1e-5, 256, 500, 12_000)}


def test_their_base_has_124_million_parameters_and_no_attention() -> None:
    file = preset_file(BASE)
    assert file is not None
    recipe = load_recipe(file, []).recipe
    config = new_model_config(recipe, recipe.tokenizer.vocab_size or 0)
    assert cost.total_params(config) == pytest.approx(124e6, rel=5e-3)
    assert config.mamba is not None and config.mamba.kind == "mamba1"
    assert config.attention_layers == ()


def test_a_campaign_is_no_recipe() -> None:
    assert CAMPAIGN not in presets() and preset_file(CAMPAIGN) is None
    assert campaign_file(CAMPAIGN) is not None and campaign_file(BASE) is None
