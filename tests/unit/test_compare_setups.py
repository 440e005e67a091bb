"""A setup beside the published ones: how it is read, what is said of it, what to change."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mule.commands import compare
from mule.compare import advice, judge
from mule.compare.catalogue import catalogue
from mule.compare.nearest import distance, nearest
from mule.compare.normalise import from_recipe
from mule.compare.plausible import judged_loss, perplexity
from mule.compare.sourced import Setup
from mule.compare.verdict import Verdict
from mule.config.load import load_recipe
from mule.errors import UserError
from tests.compare_case import setup


def verdicts(yours: Setup) -> dict[str, Verdict]:
    return {found.key: found for found in judge.judged(yours, catalogue())}


def edits(yours: Setup) -> dict[str, advice.Edit]:
    found = advice.edits(yours, list(verdicts(yours).values()), catalogue())
    return {edit.setting.partition("=")[0]: edit for edit in found}


def words(yours: Setup) -> str:
    found = list(verdicts(yours).values())
    return advice.closing(yours, found, advice.edits(yours, found, catalogue()), catalogue())


# ---------------------------------------------------------------- the two described setups


def test_what_is_said_of_the_124m_model() -> None:
    mamba = catalogue()["mamba-124m-114k"]
    said = verdicts(mamba)
    assert said["learning_rate"].word == "unusual"
    assert "200 times less" in said["learning_rate"].reason
    assert (
        "SmolLM2 135M SFT" in said["learning_rate"].reason
    )  # not 7B models, whose rates are lower
    assert said["rate_ratio"].word == "unusual" and "Tulu 3 8B SFT" in said["rate_ratio"].reason
    assert said["epochs"].word == "unusual" and "14 times more" in said["epochs"].reason
    assert said["steps"].word == "unusual" and said["precision"].word == "behind"
    assert said["batch_rows"].word == said["warmup_share"].word == "near"
    first, last = said["initial_loss"], said["final_loss"]
    assert first.word == last.word == "unusual"
    assert "perplexity 3,294" in first.reason and "ln(32,000) = 10.4" in first.reason
    assert "perplexity 148" in last.reason and "7B to 13B model it is implausible" in last.reason


def test_what_to_change_of_the_124m_model() -> None:
    mamba = catalogue()["mamba-124m-114k"]
    change = edits(mamba)
    assert change["train.epochs"].setting == "train.epochs=3"
    assert "93% of the updates, 39.9 h of 43 h" in change["train.epochs"].saves
    assert "evaluate.patience=3" in change["train.epochs"].costs
    rate = change["optim.learning_rate"]
    assert rate.setting == "optim.learning_rate=1e-4"  # pretraining's 3e-4, 3 times below
    assert "now 60 times below, and 25,000 updates of it bring the loss from 8.1 to 5" in rate.why
    assert change["optim.warmup_steps"].setting == "optim.warmup_steps=53"  # of 1,781 updates
    assert change["train.precision"].setting == "train.precision=bf16"
    assert words(mamba).startswith("Nearest published: SmolLM2 135M SFT")


def test_what_is_said_of_the_112m_model() -> None:
    small = catalogue()["small-112m-75k"]
    said, change = verdicts(small), edits(small)
    assert said["steps"].word == "behind" and "6.25 times less" in said["steps"].reason
    assert "66% of the examples are never seen" in said["epochs"].reason
    assert said["batch_rows"].word == said["warmup_share"].word == "near"  # 256 rows; 10 of 100
    assert (
        said["decay_on"].word == "near" and "embeddings are left alone" in said["decay_on"].reason
    )
    assert change["train.epochs"].setting == "train.epochs=2"
    assert change["train.epochs"].costs == "5.86 times the updates"
    assert "Behind in updates, epochs." in words(small)
    assert "which is not known here" in said["learning_rate"].reason  # and so it is not changed
    assert set(change) == {"train.epochs"}


def test_a_rate_is_seen_beside_that_of_its_pretraining() -> None:
    mine = setup(parameters=112e6, rows=75_000, learning_rate=7e-5, pretraining_rate=6e-4)
    said = verdicts(mine)["learning_rate"]
    assert said.word == "near" and "8.57 times below its own pretraining" in said.reason
    assert "optim.learning_rate" not in edits(mine)
    far = edits(setup(parameters=124e6, rows=100_000, learning_rate=5e-6))["optim.learning_rate"]
    assert (
        far.setting == "optim.learning_rate=1e-4"
        and "a tenth of the median of 2 published" in far.why
    )
    high = edits(setup(parameters=7e9, learning_rate=1e-2))["optim.learning_rate"]
    assert high.setting == "optim.learning_rate=2e-5" and "what the base knows" in high.saves


def test_described_setups_are_no_reference() -> None:
    mine = setup(parameters=120e6, rows=100_000, learning_rate=5e-6)
    assert all(found.origin == "published" for found in nearest(mine, catalogue().values(), 30))
    assert "mamba" not in str(verdicts(mine)).lower()


def test_a_recipe_may_be_called_as_a_published_setup(tmp_path: Path) -> None:
    file = write_recipe(tmp_path).rename(tmp_path / "guanaco-7b.yaml")
    assert "guanaco-7b" in {
        found.name for found in nearest(from_recipe(file), catalogue().values())
    }
    itself = catalogue()["guanaco-7b"]
    assert itself not in nearest(itself, catalogue().values(), 30)


# ---------------------------------------------------------------- verdicts


def test_published_setups_are_near_each_other() -> None:
    """Of the published, one verdict in twenty is unusual beside the rest, and no length of a run is."""
    published = [own for own in catalogue().values() if own.origin == "published"]
    found = [(own.name, said) for own in published for said in verdicts(own).values()]
    odd = [(name, said.key) for name, said in found if said.word in ("unusual", "behind")]
    assert len(found) > 300 and len(odd) <= 0.055 * len(found), odd
    assert not {"steps", "warmup_share", "batch_rows"} & {key for _, key in odd}, odd


def test_rates_of_other_sizes_are_not_held_against_it() -> None:
    said = verdicts(setup("pretrain", parameters=5e6, learning_rate=1e-3))
    assert said["learning_rate"].word == "not comparable"
    assert "rates fall as models grow: 5M against 124M" in said["learning_rate"].reason
    assert said["parameters"].word == "not comparable"


def test_an_adapters_rate_is_held_against_adapters_of_any_size() -> None:
    for rate, word in ((2e-4, "near"), (1e-5, "unusual"), (5e-3, "unusual")):
        own = setup("adapter", parameters=0.5e9, learning_rate=rate)
        assert verdicts(own)["learning_rate"].word == word
    assert edits(setup("adapter", learning_rate=1e-5))["optim.learning_rate"].setting.endswith(
        "2e-4"
    )


def test_few_chats_are_judged_as_few() -> None:
    own = setup("adapter", parameters=0.5e9, rows=319, epochs=6, batch_rows=4, learning_rate=2e-4)
    said = verdicts(own)
    assert said["rows"].word == "behind" and "hardly knowledge" in said["rows"].reason
    assert said["batch_rows"].word == said["epochs"].word == "near"
    assert "80 updates an epoch" in said["batch_rows"].reason
    assert not edits(own)
    assert words(own).endswith("none of that is known to be better with another setting.")


def test_tokens_a_parameter_of_a_new_model() -> None:
    own = setup("pretrain", parameters=1e8, trained_tokens=2e8, max_seq_length=1024, batch_rows=64)
    said, change = verdicts(own), edits(own)
    assert said["tokens_per_parameter"].word == "behind" and "Chinchilla" in str(said)
    assert change["train.tokens"].setting == "train.tokens=2000000000"
    assert change["train.tokens"].costs == "10 times the updates"
    plenty = setup("pretrain", parameters=1e6, trained_tokens=1e12)
    assert verdicts(plenty)["tokens_per_parameter"].word == "ahead"
    assert verdicts(setup(tokens_per_parameter=3))["tokens_per_parameter"].word == "not comparable"


def test_settings_out_of_the_way_are_named_with_the_usual() -> None:
    own = setup(
        parameters=7e9, rows=50_000, epochs=3, batch_rows=128, learning_rate=2e-5, warmup_steps=600,
        max_grad_norm=20.0, weight_decay=1.0, schedule="triangle", max_seq_length=128,
    )  # fmt: skip
    said, change = verdicts(own), edits(own)
    for key in ("warmup_share", "max_grad_norm", "weight_decay", "schedule"):
        assert said[key].word == "unusual", key
    assert said["max_seq_length"].word == "behind"
    assert change["optim.max_grad_norm"].setting == "optim.max_grad_norm=1.0"
    assert change["optim.weight_decay"].setting == "optim.weight_decay=0.1"
    assert change["optim.warmup_steps"].setting == "optim.warmup_steps=35"


def test_unread_sources_are_cited_as_such() -> None:
    said = verdicts(setup(parameters=7e9, rows=900, epochs=10, learning_rate=2e-5))
    cited = " ".join(said["epochs"].sources)
    assert "LIMA 65B" in cited and "not read there, it rests on" in cited


def test_nothing_to_say_is_said() -> None:
    assert words(catalogue()["smollm2-135m-sft"]).endswith("Change nothing.")
    assert judge.judged(setup(), catalogue()) == []
    assert math.isinf(distance(setup(), catalogue()["alpaca-7b"]))


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("kind", "key", "loss", "word", "told"),
    [
        ("fine-tune", "initial_loss", 8.0, "unusual", "perplexity 2,981"),
        ("fine-tune", "initial_loss", 2.1, "near", "as a trained model may begin"),
        ("fine-tune", "final_loss", 5.0, "unusual", "perplexity 148"),
        ("fine-tune", "final_loss", 1.1, "near", "perplexity 3"),
        ("fine-tune", "final_loss", 0.01, "unusual", "known by heart"),
        ("pretrain", "initial_loss", 10.4, "near", "ln(32,000) = 10.4"),
        ("pretrain", "initial_loss", 40.0, "unusual", "first weights are too large"),
        ("pretrain", "initial_loss", 3.0, "unusual", "not new"),
        ("pretrain", "final_loss", 5.0, "behind", "little is learned yet"),
    ],
)
def test_losses_are_held_against_arithmetic(
    kind: str, key: str, loss: float, word: str, told: str
) -> None:
    own = setup(kind, parameters=7e9, vocab_size=32_000, **{key: loss})  # type: ignore[arg-type]
    said = judged_loss(own, key)
    assert said is not None and said.word == word and told in said.reason


def test_implausible_losses_of_a_large_model_are_called_so() -> None:
    said = judged_loss(setup(parameters=7e9, final_loss=5.0), "final_loss")
    assert said is not None and "said of this one it is implausible" in said.reason
    assert said.sources == ("GPT-2 124M: https://github.com/karpathy/nanoGPT, README.md",)
    assert perplexity(5.0) == "perplexity 148" and "beyond all bounds" in perplexity(100.0)


# ---------------------------------------------------------------- a recipe


def write_recipe(folder: Path, chats: int = 3, **lines: str) -> Path:
    (folder / "chats.jsonl").write_text('{"messages": []}\n' * chats)
    file = folder / "mine.yaml"
    text = {
        "model": "{path: Qwen/Qwen2.5-0.5B-Instruct}",
        "data": f"{{train: [{folder}/chats.jsonl], max_seq_length: 512}}",
        "adapter": "{kind: lora}",
    } | lines
    file.write_text("".join(f"{key}: {value}\n" for key, value in text.items()))
    return file


def test_a_recipe_is_read_as_training_would(tmp_path: Path) -> None:
    own = from_recipe(write_recipe(tmp_path, chats=1000))
    assert own.kind == "adapter" and own.origin == "recipe"
    assert own.get("rows") == 800 and "200 more are held out" in own.values["rows"].note
    assert own.get("parameters") == 494_032_768  # of the published shape
    assert own.get("learning_rate") == 2e-4 and "auto" in own.values["learning_rate"].note
    assert own.get("batch_rows") == 8 and own.get("epochs") == 3 and own.get("steps") == 300
    assert own.get("warmup_steps") == 15 and own.get("lora_scale") == 2
    assert own.get("decay_on") == "matrices" and own.get("precision") == "auto"
    assert "mine.yaml:2" in own.values["max_seq_length"].source


def test_settings_on_the_command_line_come_first(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, chats=1000)
    own = from_recipe(file, ["train.steps=50", "optim.learning_rate=1e-3", "train.step_rows=4"])
    assert own.get("steps") == 50 and own.get("learning_rate") == 1e-3
    assert own.get("packing") == "rows are filled" and own.get("batch_tokens") == 2048
    assert own.values["steps"].source.startswith("command line")


def test_a_new_models_size_is_computed(tmp_path: Path) -> None:
    lines = {"model": "{size: 2m}", "tokenizer": "{vocab_size: 4096}", "adapter": "{kind: none}"}
    own = from_recipe(write_recipe(tmp_path, **lines), ["data.format=text", "train.tokens=9000000"])
    assert own.kind == "pretrain" and own.get("rows") is None
    assert own.number("parameters") == pytest.approx(2.2e6, rel=0.2)
    assert own.get("batch_tokens") == 8192 and own.get("steps") == 1099
    assert own.number("tokens_per_parameter") == pytest.approx(
        9e6 / (own.number("parameters") or 1)
    )


def test_the_base_may_be_a_run_or_only_a_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "recipe.yaml").write_text("")
    (base / "resolved.yaml").write_text("optim: {learning_rate: 6e-4}\ndata: {train: [a]}\n"
                                        "model: {size: 2m}\n")  # fmt: skip
    plain = {"adapter": "{kind: none}", "model": f"{{path: {base}}}"}
    own = from_recipe(write_recipe(tmp_path, **plain), ["optim.learning_rate=2e-5"])
    assert own.get("rate_ratio") == pytest.approx(30)
    named = from_recipe(write_recipe(tmp_path, model="{path: someone/tiny-1.5B-chat}"))
    assert named.get("parameters") == 1.5e9 and named.shown("parameters") == "1.5B ?"
    unnamed = from_recipe(write_recipe(tmp_path, model="{path: someone/mistral}"))
    assert unnamed.get("parameters") is None


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("a.json", json.dumps([{}, {}, {}]), 3),
        ("a.json", '{"a": 1}\n\n{"a": 2}\n', 2),
        ("a.json", "[not json", None),
        ("a.parquet", "PAR1", None),
        ("a.jsonl", "{}\n{}\n\n", 2),
    ],
)
def test_examples_are_counted_where_that_is_quick(
    tmp_path: Path, name: str, text: str, count: int | None
) -> None:
    (tmp_path / name).write_text(text)
    data = f"{{train: [{tmp_path / name}], valid_share: 0}}"
    assert from_recipe(write_recipe(tmp_path, data=data)).get("rows") == count


def test_a_recipe_that_comes_with_mule_is_compared(tmp_path: Path) -> None:
    found = compare.run(["sft-112m-mix"], out=[tmp_path / "a.md", tmp_path / "b.html"])
    assert found["beside"][0]["name"] == "smollm2-135m-sft"
    assert found["next"].startswith("mule train sft-112m-mix train.epochs=")
    rows = {row["key"]: row for row in found["rows"]}
    assert rows["steps"]["verdict"] == "behind" and rows["learning_rate"]["sources"]
    text, page = (tmp_path / "a.md").read_text(), (tmp_path / "b.html").read_text()
    assert "| updates | 100 |" in text and "## Sources" in text
    for address in ("http://", "https://"):  # nothing is fetched: sources are text, not links
        assert f'src="{address}' not in page and f'href="{address}' not in page
    assert "Content-Security-Policy" in page and "<script" not in page
    json.dumps(found)


def test_named_setups_are_compared_in_their_order() -> None:
    found = compare.run(["small-112m-75k", "dolly-v2-12b", "alpaca-7b"])
    assert [row["name"] for row in found["beside"]] == ["dolly-v2-12b", "alpaca-7b"]
    said = {row["said"] for row in found["hearsay"]}
    assert said == {"10 epochs", "weight decay 1"}
    assert found["next"] == "mule compare --list"


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ([], "nothing to compare", "mule compare --list"),
        (["alpaca"], "`alpaca` is no recipe, no run, and not in the catalogue", "alpaca-7b"),
        (["alpaca-7b", "train.steps=3"], "train.steps=3 cannot take effect", "mule compare RECIPE"),
        (["nowhere.yaml"], "nowhere.yaml: no such file", "mule recipe list"),
    ],
)
def test_what_cannot_be_compared_is_said(words: list[str], message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        compare.run(words)
    assert message in caught.value.message and hint in caught.value.hint


def test_an_ending_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written as \.pdf") as caught:
        compare.run(["alpaca-7b"], out=[tmp_path / "a.pdf"])
    assert "a.html" in caught.value.hint


def test_every_edit_is_a_setting_that_a_recipe_takes(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, model="{path: base}", adapter="{kind: none}")
    for own in catalogue().values():
        changes = advice.edits(own, judge.judged(own, catalogue()), catalogue())
        load_recipe(file, [edit.setting for edit in changes])
