"""`mule lab shapes`: the table of a campaign, or of a budget on the command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mule.commands import lab_shapes
from mule.config.lab import BudgetSection, VariantSection
from mule.errors import ConfigError, UserError
from mule.export.fallbacks import fallbacks
from mule.models import cost
from mule.models.solve import solve
from tests.conftest import Mule

CAMPAIGN = """\
name: small
budget: {active_params: 6m}
variants:
  mha: {}
  gqa: {attention: gqa, num_kv_heads: 2}
  experts: {num_experts: 4, capacity_factor: 1.0}
  windows: {num_experts: 4, sliding_window: 64}
  mamba2: {mixer: mamba2}
  hybrid: {mixer: hybrid, attention_every: 3}
sizes: [3m, 6m]
tokenizer: {vocab_size: 4096}
data: {train: [a.txt], max_seq_length: 256, valid_share: 0.01, test_share: 0.01}
train: {tokens: 300_000, step_tokens: 2048}
"""
RATE = 1e10


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(CAMPAIGN)
    return file


def test_a_row_for_each_variant_in_each_size(campaign: Path) -> None:
    result = lab_shapes.run(campaign, [], bandwidth=RATE)
    rows: list[dict[str, Any]] = result["rows"]
    assert [row["variant"] for row in rows] == 2 * [
        *("mha", "gqa", "experts", "windows", "mamba2", "hybrid")
    ]
    assert [row["size"] for row in rows[::6]] == ["3m", "6m"]
    assert result["vocab_size"] == 4096 and result["context"] == 256
    for row in rows:
        target = {"3m": 3e6, "6m": 6e6}[row["size"]]
        assert row["active_params"] == pytest.approx(target, rel=0.0151)
        assert row["residual"] == row["active_params"] / target - 1
        embedding = 4096 * row["hidden_size"]
        assert row["active_params"] - embedding == row["active_params_without_embeddings"]
        assert row["total_params"] - embedding == row["total_params_without_embeddings"]
        assert (row["total_params"] > row["active_params"]) is (row["moe"] is not None)
        moved = row["decode_bytes_per_token"]
        assert moved == 2 * row["active_params"] + row["cache_bytes"] + row["state_bytes"]
        assert row["decode_ceiling_tokens_per_second"] == RATE / moved
        assert bool(row["state_bytes"]) is (row["mamba"] is not None)
    by_name = {row["variant"]: row for row in rows[6:]}
    mha, gqa = by_name["mha"], by_name["gqa"]
    shared = mha["num_heads"] / 2
    assert mha["kv_bytes_per_token"] == shared * gqa["kv_bytes_per_token"]
    assert by_name["mamba2"]["kv_bytes_per_token"] == 0 < by_name["mamba2"]["null_layer_params"]
    assert by_name["experts"]["routing"] == {"capacity_factor": 1.0}
    assert by_name["hybrid"]["attention_layers"] == by_name["hybrid"]["num_layers"] // 3
    assert by_name["windows"]["cache_bytes"] < by_name["experts"]["cache_bytes"]


def test_settings_and_options_change_it(campaign: Path) -> None:
    result = lab_shapes.run(
        campaign,
        ["sizes=[]", "budget.active_params=8m"],
        context=512,
        vocab_size=1000,
        bandwidth=1.0,
    )
    assert len(result["rows"]) == 6 and "size" not in result["rows"][0]
    assert result["targets"] == [8e6] and result["vocab_size"] == 1000
    assert {row["context"] for row in result["rows"]} == {512}


def test_a_budget_alone() -> None:
    result = lab_shapes.run(None, ["num_layers=12"], active="125m", bandwidth=RATE)
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == ["mha", "gqa", "gqa-heads", "mqa", "moe", "mamba2", "hybrid"]
    assert rows["mha"]["hidden_size"] == 768 and result["vocab_size"] == 50_304
    assert rows["mha"]["kv_bytes_per_token"] == 12 * 2 * 768 * 2
    counted = lab_shapes.run(
        None, ["counted=without_embeddings", "tolerance=0.02"], active="85m", bandwidth=RATE
    )
    assert counted["quantity"] == "active parameters without embeddings"
    assert rows["mqa"]["intermediate_size"] > rows["gqa"]["intermediate_size"]


def test_the_bandwidth_is_measured_when_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab_shapes.machine, "read_bandwidth", lambda: 2e9)
    result = lab_shapes.run(None, [], active="125m")
    assert result["bandwidth_bytes_per_second"] == 2e9


@pytest.mark.parametrize(
    ("active", "words", "message"),
    [
        (None, [], "takes either a campaign file or --active"),
        ("125m", ["num_layers"], "num_layers is no setting"),
        ("125m", ["layers=3"], "layers: no such key"),
        ("big", [], "active_params"),
    ],
)
def test_errors_of_the_command_line(active: str | None, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        lab_shapes.run(None, words, active=active, bandwidth=RATE)
    assert caught.value.hint


def test_a_campaign_and_a_size_at_once(campaign: Path) -> None:
    with pytest.raises(UserError, match="either a campaign file or --active"):
        lab_shapes.run(campaign, [], active="10m")


def test_a_campaign_without_a_tokenizer(campaign: Path) -> None:
    campaign.write_text(CAMPAIGN.replace("tokenizer: {vocab_size: 4096}\n", ""))
    with pytest.raises((UserError, ConfigError), match="tokenizer"):
        lab_shapes.run(campaign, [], bandwidth=RATE)


# ---------------------------------------------------------------- K-quants


def test_what_k_quants_cannot_hold() -> None:
    """Rows of the down projections alone, as the exporter plans them; nothing at multiples of 256."""
    budget, lengths = BudgetSection(active_params="125m", num_layers=12), (50_304, 1024)
    sizes = {"vocab_size": lengths[0], "max_seq_length": lengths[1]}
    mha = solve(budget, VariantSection(), **sizes).config
    (found,) = fallbacks(mha)
    assert (found.matrix, found.row_length) == ("ffn_down", mha.intermediate_size)
    assert found.types == {"Q6_K": "Q8_0", "Q4_K": "Q5_0"} and found.more_bytes > 0
    told = found.in_words("Q4_K_M")
    assert re.fullmatch(
        r"Q4_K_M: ffn_down \(rows of 2,112\) in Q8_0 in place of Q6_K, Q5_0 in place of Q4_K, "
        r"\+\d\.\d\d MiB",
        told,
    )
    assert fallbacks(mha, "q8_0") == []
    assert fallbacks(replace(mha, intermediate_size=2048)) == []
    experts = solve(budget, VariantSection(num_experts=8), **sizes).config
    assert [fallback.matrix for fallback in fallbacks(experts)] == ["ffn_down_exps"]
    mamba1 = solve(budget, VariantSection(mixer="mamba1"), **sizes).config
    assert {"ffn_down", "ssm_dt"} >= {fallback.matrix for fallback in fallbacks(mamba1)}
    assert cost.total_params(mamba1) == pytest.approx(125e6, rel=0.01)


# ---------------------------------------------------------------- the command line


def test_the_table(campaign: Path, mule_cli: Mule) -> None:
    campaign.write_text(CAMPAIGN.replace("[3m, 6m]", "[6m]"))
    code, out, err = mule_cli("lab", "shapes", str(campaign), "--bandwidth", "10")
    assert code == 0, err
    assert "active parameters, width 256" in out
    words = " ".join(out.split())
    assert "mamba2 6m" in words and "2 of 4 x" in words and "7, 2 attend" in words
    assert "windows 6m: no GGUF file can hold it" in words
    assert "zeros more, an attention layer that other programs need" in words
    assert "4,096 tokens in the vocabulary (of tokenizer.vocab_size), rows of 256" in words
    assert "10.0 GB/s" in words


def test_json(campaign: Path, mule_cli: Mule) -> None:
    words = (str(campaign), "sizes=[]", "--bandwidth", "10", "--json")
    code, out, _ = mule_cli("lab", "shapes", *words)
    result = json.loads(out.strip().splitlines()[-1])
    assert code == 0 and len(result["rows"]) == 6
    code, _, err = mule_cli("lab", "shapes", "--active", "1m", "--bandwidth", "10")
    assert code == 2 and "too small for 50,304 tokens" in err and "hint: raise the budget" in err
