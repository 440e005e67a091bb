"""Dimensions for a budget: within the tolerance, equal where they must be, and errors that teach."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from mule.config.lab import BudgetSection, VariantSection, amount
from mule.config.load import load_recipe
from mule.config.section import Conflict
from mule.errors import ModelError
from mule.models import cost
from mule.models.families import family
from mule.models.solve import Solved, solve, solve_all
from mule.plan.shape import model_settings, new_model_config

GPT2_ROWS, OURS = 50_304, 4096
GQA: dict[str, Any] = {"attention": "gqa", "num_kv_heads": 4}
ALL: dict[str, dict[str, Any]] = {
    "mha": {},
    "llama": {"family": "llama"},
    "gqa": GQA,
    "gqa-heads": {**GQA, "spend": "heads"},
    "gqa-layers": {**GQA, "spend": "layers"},
    "mqa": {"attention": "mqa"},
    "window": {"sliding_window": 64},
    "no-positions": {"position_embedding": "none"},
    "experts": {**GQA, "num_experts": 8},
    "shared": {**GQA, "num_experts": 8, "shared_expert": True, "balance": "bias"},
    "mamba2": {"mixer": "mamba2"},
    "mamba1": {"mixer": "mamba1"},
    "mamba1-hybrid": {"mixer": "mamba1", "attention_every": 4, **GQA},
    "hybrid": {"mixer": "hybrid", **GQA},
    "hybrid-experts": {"mixer": "hybrid", "num_experts": 4, "shared_expert": True},
}


def variants(*names: str) -> dict[str, VariantSection]:
    return {name: VariantSection(**ALL[name]) for name in names or ALL}


def solved(
    names: tuple[str, ...] = (), rows: int = GPT2_ROWS, length: int = 1024, **budget: Any
) -> dict[str, Solved]:
    return solve_all(
        BudgetSection(**budget), variants(*names), vocab_size=rows, max_seq_length=length
    )


def test_125m_as_the_arithmetic_has_it() -> None:
    """12 blocks of width 768 of 12 x 768^2 parameters, beside an embedding that all share.

    Full attention leaves 2048 for the feed-forward layer, 4 key/value heads 2389, two experts of
    eight about 1195 each, a Mamba-2 layer of 3.765M about 1438; widths are multiples of 32, and a
    block's norms take the place of a few.
    """
    target = 12 * 12 * 768**2 + GPT2_ROWS * 768
    found = solved(
        ("mha", "gqa", "experts", "mamba2"),
        active_params=target,
        num_layers=12,
        hidden_size=768,
    )
    widths = {name: one.config.intermediate_size for name, one in found.items()}
    assert widths["mha"] == pytest.approx(2048, abs=16)
    assert widths["gqa"] == pytest.approx(2389, abs=16)
    assert widths["experts"] == pytest.approx(1195, abs=16)
    assert widths["mamba2"] == pytest.approx(1438, abs=16)
    mamba = found["mamba2"].config
    beside = 3 * 768 * mamba.intermediate_size + 2 * 768
    assert cost.layer_params(mamba, 0) - beside == pytest.approx(3.765e6, rel=2e-4)
    assert all(width % 32 == 0 for width in widths.values())
    assert all(abs(one.residual) < 0.005 for one in found.values())


@pytest.mark.parametrize(
    ("budget", "rows"),
    [
        ({"active_params": "125m"}, GPT2_ROWS),
        ({"active_params": "350m"}, GPT2_ROWS),
        ({"active_params": "25m", "counted": "without_embeddings"}, OURS),
        ({"active_params": "10m", "head_dim": 32}, OURS),
        ({"active_params": "125m", "mode": "flops_per_token"}, GPT2_ROWS),
        ({"flops_per_token": "700m", "mode": "flops_per_token"}, GPT2_ROWS),
    ],
)
def test_all_agree(budget: dict[str, Any], rows: int) -> None:
    """Within 0.5% where they are dense and large, else 1.5%; of one width, and fit for GGUF types."""
    asked = BudgetSection(**budget)
    found = solve_all(asked, variants(), vocab_size=rows, max_seq_length=1024)
    assert len({one.config.hidden_size for one in found.values()}) == 1
    for name, one in found.items():
        c, variant = one.config, VariantSection(**ALL[name])
        without = asked.counted == "without_embeddings"
        measured = cost.active_params(c) - (cost.embedding_params(c) if without else 0)
        if asked.mode == "flops_per_token":
            measured = cost.train_flops_per_token(c, 1024)
        assert one.found == measured and one.active_params == cost.active_params(c)
        is_dense = variant.mixer == "attention" and variant.num_experts is None
        large = one.target >= 100e6 * (6 if asked.mode == "flops_per_token" else 1)
        assert abs(measured / one.target - 1) <= (0.005 if is_dense and large else 0.015)
        assert one.residual == measured / one.target - 1
        assert c.hidden_size % 256 == c.num_heads * c.head_dim % 256 == 0
        assert c.intermediate_size % 32 == 0
        assert c.moe is None or c.moe.shared_intermediate_size % 32 == 0
        plain = [other for other in found if not other.endswith("-layers")]
        assert c.num_layers == found["mha"].config.num_layers or name not in plain


def test_a_shape_is_that_of_its_settings_and_files() -> None:
    """What is solved is what a run with these settings trains, and what its config.json says."""
    for name, one in solved(active_params="125m").items():
        variant = VariantSection(**ALL[name])
        settings = model_settings(one.config, variant.routing())
        words = [f"{key}={value}" for key, value in settings.items()]
        words += ["data.train=[a.txt]", "data.max_seq_length=1024"]
        assert new_model_config(load_recipe(None, words).recipe, GPT2_ROWS) == one.config
        module = family(one.config.family)
        assert module.from_hf(module.to_hf(one.config)) == one.config


def test_what_is_saved_goes_where_one_says() -> None:
    """More heads or more blocks at the plain width, or a wider feed-forward layer."""
    found = solved(("mha", "gqa", "gqa-heads", "gqa-layers"), active_params="125m", num_layers=12)
    mha, wide, heads, deep = (one.config for one in found.values())
    assert (mha.num_heads, mha.num_kv_heads) == (12, 12)
    assert (wide.num_heads, wide.num_kv_heads, wide.num_layers) == (12, 4, 12)
    assert wide.intermediate_size == pytest.approx(mha.intermediate_size + 768 * 4 / 9, abs=32)
    assert (heads.num_heads, heads.num_kv_heads, heads.num_layers) == (20, 4, 12)
    assert (deep.num_heads, deep.num_kv_heads) == (12, 4) and deep.num_layers > 12
    for spent in (heads, deep):
        assert spent.intermediate_size == pytest.approx(mha.intermediate_size, rel=0.06)


def test_heads_and_widths_suit_the_size() -> None:
    assert solved(("mha",), OURS, active_params="6m")["mha"].config.head_dim == 32
    assert solved(("mha",), OURS, active_params="10m")["mha"].config.head_dim == 64
    mha = solved(("mha",), active_params="125m", head_dim=128)["mha"].config
    assert (mha.num_heads, mha.hidden_size) == (6, 768)
    default = solve(
        BudgetSection(active_params="125m"),
        VariantSection(attention="gqa"),
        vocab_size=GPT2_ROWS,
        max_seq_length=1024,
    )
    assert default.config.num_kv_heads == 3
    pinned = solved(("mha",), 512, active_params="1m", hidden_size=96, head_dim=32)["mha"]
    assert pinned.config.hidden_size == 96


def test_experts_keep_to_their_steps_by_another_depth() -> None:
    """Two of eight experts in steps of 32 are coarse at 10M: the common depth makes them fit."""
    names = ("mha", "mqa", "experts", "mamba2")
    small = {
        name: ALL[name] | ({"num_kv_heads": 2} if "num_kv_heads" in ALL[name] else {})
        for name in names
    }
    chosen = {name: VariantSection(**one) for name, one in small.items()}
    found = solve_all(
        BudgetSection(active_params="10m"), chosen, vocab_size=OURS, max_seq_length=256
    )
    assert len({one.config.num_layers for one in found.values()}) == 1
    assert all(abs(one.residual) <= 0.015 for one in found.values())
    experts = found["experts"].config
    assert cost.total_params(experts) > 2 * cost.active_params(experts)


@pytest.mark.parametrize(
    ("budget", "variant", "message", "hint"),
    [
        (
            {"active_params": "10m"},
            {},
            r"too small for 50,304 tokens: at width 256 two blocks take 14,.*embedding.*12,878,",
            "train a smaller tokenizer, or set budget.counted=without_embeddings",
        ),
        (
            {"active_params": "125m", "num_layers": 12, "tolerance": 0.0001},
            {},
            r"variant x: no dimensions come within 0\.01% of 125,000,000 active parameters",
            r"set budget\.tolerance=0\.00",
        ),
        (
            {"active_params": "125m", "num_layers": 24, "hidden_size": 768},
            {"mixer": "mamba2"},
            r"narrower than half of hidden_size = 768",
            r"lower budget\.num_layers",
        ),
        (
            {"active_params": "125m"},
            {"attention": "gqa", "num_kv_heads": 5},
            r"variant x: 12 query heads cannot share num_kv_heads = 5",
            "among 1, 2, 3, 4, 6$",
        ),
        (
            {"active_params": "125m", "num_layers": 20, "hidden_size": 768},
            {"attention": "gqa", "num_kv_heads": 6, "spend": "heads"},
            r"variant x: what gqa saves of 12 heads does not pay for more heads",
            "spend: mlp",
        ),
        (
            {"active_params": "125m", "hidden_size": 100},
            {},
            r"budget\.hidden_size = 100 is no multiple of 64",
            "a multiple of 256",
        ),
        (
            {"active_params": "125m"},
            {"module": "mine.py:Net"},
            "variant x is a module of your own",
            "mule lab check mine.py:Net",
        ),
    ],
)
def test_errors_say_why(
    budget: dict[str, Any], variant: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        solve_all(
            BudgetSection(**budget),
            {"x": VariantSection(**variant)},
            vocab_size=GPT2_ROWS,
            max_seq_length=1024,
        )
    assert re.search(hint, caught.value.hint)


# ---------------------------------------------------------------- the sections


def test_amounts() -> None:
    assert [amount(value) for value in (7, "124.5m", "2k", "1b", "3g")] == [
        *(7, 124_500_000, 2000, 10**9, 3 * 10**9)
    ]


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (BudgetSection, {}, "active_params: missing"),
        (BudgetSection, {"active_params": 1, "flops_per_token": 2}, "keep one of the two"),
        (BudgetSection, {"flops_per_token": 2}, "mode=active_params; add"),
        (
            BudgetSection,
            {"flops_per_token": 2, "mode": "flops_per_token", "counted": "all"},
            "counted: cannot take effect without active_params",
        ),
        (VariantSection, {"num_kv_heads": 2}, "with attention=mha; remove it, or use gqa"),
        (VariantSection, {"attention": "mqa", "num_kv_heads": 2}, "with attention=mqa"),
        (VariantSection, {"spend": "mlp"}, "spend: cannot take effect with attention=mha"),
        (VariantSection, {"capacity_factor": 1.0}, "without num_experts; set it"),
        (VariantSection, {"num_experts": 4, "overflow": "drop"}, "without capacity_factor"),
        (VariantSection, {"num_experts": 4, "experts_per_token": 5}, "5 experts a token of 4"),
        (VariantSection, {"num_experts": 4, "family": "llama"}, "num_experts says the family"),
        (
            VariantSection,
            {"position_embedding": "none", "family": "llama"},
            "position_embedding says the family",
        ),
        (
            VariantSection,
            {"num_experts": 4, "mixer": "mamba1"},
            "no family has Mamba-1 and experts",
        ),
        (VariantSection, {"num_experts": 4, "mixer": "hybrid"}, "set shared_expert"),
        (
            VariantSection,
            {"num_experts": 4, "position_embedding": "none"},
            "only a family with a shared expert has it",
        ),
        (
            VariantSection,
            {"num_experts": 4, "shared_expert": True, "sliding_window": 8},
            "no family has it beside shared_expert",
        ),
        (VariantSection, {"mixer": "mamba2", "attention": "gqa"}, "no block attends"),
        (VariantSection, {"mixer": "mamba2", "attention_every": 2}, "remove it, or use hybrid"),
        (VariantSection, {"mixer": "hybrid", "sliding_window": 8}, "with mixer=hybrid"),
        (
            VariantSection,
            {"mixer": "mamba1", "attention_every": 2, "position_embedding": "rope"},
            "have no rotary positions",
        ),
        (VariantSection, {"state_size": 8}, "with mixer=attention; remove it, or set mixer"),
        (VariantSection, {"module": "a.py:B", "mixer": "mamba2"}, "brings its own; remove one"),
    ],
)
def test_settings_without_effect_are_refused(
    kind: type[BudgetSection | VariantSection], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind(**values)
    causes = [detail.get("ctx", {}).get("error") for detail in caught.value.errors()]
    assert any(isinstance(cause, Conflict) and message in str(cause) for cause in causes), causes
