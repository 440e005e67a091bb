"""A campaign file: what it says, and how its errors teach."""

from __future__ import annotations

from pathlib import Path

import pytest

from mule.config.campaign import CampaignFile, load_campaign
from mule.config.presets import campaign_file, presets
from mule.errors import ConfigError

CAMPAIGN = """\
name: small
budget: {active_params: 6m}
variants:
  mha:
  gqa: {attention: gqa, num_kv_heads: 2}
seeds: [0, 1]
tokenizer: {vocab_size: 512}
data: {train: [text.txt], format: text, max_seq_length: 32, valid_share: 0.1, test_share: 0.2}
train: {steps: 8, step_rows: 4}
"""


def _problems(tmp_path: Path, text: str, *words: str) -> str:
    file = tmp_path / "campaign.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_campaign(file, list(words))
    assert "docs/campaigns.md" in caught.value.hint
    return caught.value.message.replace(str(file), "campaign.yaml")


def test_a_campaign_is_its_own_keys_and_the_sections_of_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CAMPAIGN)
    campaign = load_campaign(file, ["train.steps=9", "seeds=3", "data.test_share=0.1"])
    assert list(campaign.plan.variants) == ["mha", "gqa"]
    assert campaign.baseline == "mha" and campaign.name == "small"
    assert campaign.plan.seeds == [3] and campaign.plan.data.test_share == 0.1
    assert campaign.shared.train.steps == 9 and campaign.shared.data.train == ["text.txt"]


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("seeds:", "seedz:", "campaign.yaml:6: seedz: no such key; did you mean `seeds`?"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "campaign.yaml:6: seeds: one is listed twice"),
        ("seeds: [0, 1]", "seeds: [0, x]", "campaign.yaml:6: seeds: expected a whole number"),
        ("num_kv_heads", "num_kv_head", "campaign.yaml:5: variants.gqa.num_kv_head: no such key; "),
        ("num_kv_heads: 2", "num_kv_heads: two", "variants.gqa.num_kv_heads: expected a whole"),
        (
            "attention: gqa,",
            "attention: mqa,",
            "campaign.yaml:5: variants.gqa.num_kv_heads: cannot",
        ),
        (
            "  mha:\n",
            "  mha:\n  Gqa!: {}\n",
            "campaign.yaml:5: variants.Gqa!: expected names of lower",
        ),
        ("steps: 8", "stepz: 8", "campaign.yaml:9: train.stepz: no such key"),
        ("steps: 8", "steps: 8, seed: 3", "campaign.yaml:9: train.seed: the seeds of the runs are"),
        ("steps: 8", "steps: 8, freeze: [a]", "train.freeze: a campaign trains every weight"),
        ("name: small", "model: {size: 10m}", "campaign.yaml:1: model: a variant says what its"),
        (
            "name: small",
            "adapter: {kind: lora}",
            "adapter: a campaign trains new models; remove it",
        ),
        ("name: small", "export: {}", "export: a campaign exports nothing"),
        ("name: small", "extends: x", "extends: a campaign is one file"),
        ("name: small", "baseline: gpt", "baseline: no variant is called gpt; there are mha, gqa"),
        ("name: small", "evaluate: {patience: 3}", "evaluate.patience: runs that end early have"),
        ("name: small", "search: {learning_rates: [0.1]}", "one rate is no search"),
        ("name: small", "search: {tokens: 9}", "search.tokens: cannot take effect without"),
        (
            "name: small",
            "search: {learning_rates: [0.1, 0.1]}",
            "rates: one is listed twice; remove",
        ),
        (
            "name: small",
            "search: {trials: 1}",
            "search.trials: expected a whole number of at least 2",
        ),
        ("name: small", "search: {trials: 5}", "search.trials: cannot take effect without a range"),
        (
            "name: small",
            "search: {trials: 5, learning_rates: [0.1, 0.2]}",
            "search.trials: cannot take effect beside search.learning_rates; remove one of the two",
        ),
        (
            "name: small",
            "search: {learning_rate: [0.1, 0.2]}",
            "search.learning_rate: cannot take effect without search.trials; add how many, such as",
        ),
        (
            "name: small",
            "search: {trials: 5, weight_decay: [0.3, 0.3]}",
            "search.weight_decay: 0.3 is not below 0.3; a range is two numbers, the lower one first",
        ),
        (
            "name: small",
            "search: {trials: 5, learning_rate: [1e-4]}",
            "a range is two numbers, the lower one first, such as [1e-4, 1e-2]; here are 1",
        ),
        (
            "name: small",
            "search: {trials: 5, learning_rate: 0.1}",
            "search.learning_rate: expected two numbers, the lower one first, such as [1e-4, 1e-2], fo",
        ),
        (
            "name: small",
            "search: {trials: 5, learning_rate: [0, 0.1]}",
            "search.learning_rate: expected a number above 0 and at most 1, found 0",
        ),
        ("name: small", "compile_table: 3", "compile_table: expected true or false, found 3"),
        (", valid_share: 0.1", "", "a campaign is judged on fixed validation files"),
        (", test_share: 0.2", "", "data.test is missing: the files of the test set"),
        (
            ", test_share: 0.2",
            ", test_share: 0.2, test: [t]",
            "data.test_share: cannot take effect",
        ),
        (", valid_share: 0.1", ", valid: [v]", "data.test_share goes with data.valid_share"),
        (", test_share: 0.2", ", test: [t]", "data.test goes with data.valid, "),
        ("train: [text.txt], ", "", "data.train is missing: the files to train on"),
        ("budget: {active_params: 6m}\n", "", "budget is missing"),
        ("active_params: 6m", "active_params: 6q", "budget.active_params: "),
    ],
)
def test_every_problem_has_its_place_and_remedy(
    tmp_path: Path, was: str, now: str, said: str
) -> None:
    assert was in CAMPAIGN
    assert said in _problems(tmp_path, CAMPAIGN.replace(was, now, 1))


def test_all_problems_are_told_at_once_by_line(tmp_path: Path) -> None:
    text = CAMPAIGN.replace("seeds: [0, 1]", "seeds: []").replace("steps: 8", "steps: 0")
    lines = _problems(tmp_path, text).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["campaign.yaml:6", "campaign.yaml:9"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("seeds=x", "command line: seeds=x: expected a whole number"),
        ("variants.gqa.num_kv_heads=two", "command line: variants.gqa.num_kv_heads=two: expected"),
        ("model.size=10m", "command line: model.size=10m: a variant says what its model is"),
        ("train.seed=3", "command line: train.seed=3: the seeds of the runs are in `seeds`"),
        ("train.stepz=3", "command line: train.stepz=3: no such key"),
        ("seeds", "command line: seeds: not of the form section.key=value"),
    ],
)
def test_overrides_are_checked_alike(tmp_path: Path, word: str, said: str) -> None:
    assert said in _problems(tmp_path, CAMPAIGN, word)


@pytest.mark.parametrize(
    ("search", "optim", "said"),
    [
        (
            "learning_rates: [0.1, 0.2]",
            "learning_rate: 0.1",
            "optim.learning_rate: cannot take effect",
        ),
        (
            "trials: 5, learning_rate: [0.01, 0.1]",
            "learning_rate: 0.1",
            "optim.learning_rate: cannot take effect beside search, which finds it for each variant",
        ),
        (
            "trials: 5, weight_decay: [0.01, 0.1]",
            "weight_decay: 0.1",
            "optim.weight_decay: cannot take effect beside search",
        ),
        (
            "trials: 5, learning_rate: [1e-4, 0.1]",
            "min_learning_rate: 1e-3",
            "optim.min_learning_rate: 0.001 is above the lowest learning rate that search tries, 0.0001",
        ),
    ],
)
def test_a_search_takes_the_place_of_one_value(
    tmp_path: Path, search: str, optim: str, said: str
) -> None:
    text = CAMPAIGN + f"optim: {{{optim}}}\nsearch: {{{search}}}\n"
    assert f"campaign.yaml:10: {said}" in _problems(tmp_path, text)


def test_a_search_finds_what_it_has_a_range_or_a_list_for(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CAMPAIGN + "optim: {weight_decay: 0.2}\n")
    words = ["search.trials=4", "search.learning_rate=[1e-4, 1e-2]"]
    sampled = load_campaign(file, words).plan.search
    assert sampled.searched == ("optim.learning_rate",)
    assert sampled.ranges == {"optim.learning_rate": (1e-4, 1e-2)}
    listed = load_campaign(file, ["search.learning_rates=[1e-2, 1e-3]"]).plan.search
    assert listed.ranges == {"optim.learning_rate": (1e-3, 1e-2)}
    assert load_campaign(file).plan.search.searched == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("- a\n", "campaign.yaml:1: a campaign holds keys"),
        ("a: [1\n", "not valid YAML"),
        ("name: a\nname: b\n", "campaign.yaml:2: name: given twice (first on line 1)"),
    ],
)
def test_what_is_no_campaign_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in _problems(tmp_path, text)


def test_a_campaign_is_found_by_its_name_and_is_no_recipe(tmp_path: Path) -> None:
    assert campaign_file("lab/lab-10m") is not None
    assert load_campaign("lab/lab-10m").name == "lab-10m"
    assert "lab/lab-10m" not in presets()
    with pytest.raises(ConfigError, match="nowhere: no such campaign"):
        load_campaign("nowhere")
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    with pytest.raises(ConfigError, match="a folder, not a campaign") as caught:
        load_campaign(tmp_path)
    assert caught.value.hint == f"give the file: {tmp_path}/campaign.yaml"


def test_the_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs" / "campaigns.md").read_text()
    missing = [name for name in CampaignFile.model_fields if f"`{name}" not in page]
    assert not missing, f"docs/campaigns.md does not name {missing}"
