"""The recipe's sections of experts and state-space layers, and the shapes made of them."""

from __future__ import annotations

import pytest

from mule.config.dump import to_yaml
from mule.config.load import load_recipe
from mule.config.schema import Recipe
from mule.errors import ConfigError, ModelError
from mule.models.config import ModelConfig, Routing
from mule.models.families import family
from mule.plan.shape import check_routing, model_settings, new_model_config, routing_of

MOE = "model.family=qwen3_moe"
SHARED = "model.family=granitemoeshared"
HYBRID = "model.family=granitemoehybrid"
JAMBA = "model.family=jamba"
SHAPES = {
    "llama": ["model.family=llama", "model.rope_theta=5000"],
    "qwen3": ["model.sliding_window=64", "model.sliding_layers=[0,2]"],
    "experts": [MOE, "model.moe.num_experts=4", "model.sliding_window=64"],
    "one expert a token": [MOE, "model.moe.num_experts=2", "model.moe.experts_per_token=1"],
    "shared expert": [SHARED, "model.moe.capacity_factor=1.25", "model.moe.overflow=reroute"],
    "granite without shared": [SHARED, "model.moe.shared_intermediate_size=0"],
    "attention alone": [HYBRID, "model.mamba.kind=none"],
    "no positions": [HYBRID, "model.mamba.kind=none", "model.position_embedding=none"],
    "mamba2": [HYBRID, "model.mamba.state_size=64", "model.mamba.num_groups=2"],
    "hybrid": [HYBRID, "model.mamba.attention_every=4", "model.num_kv_heads=1"],
    "hybrid with rope": [
        *(HYBRID, "model.mamba.attention_every=4", "model.position_embedding=rope"),
        "model.rope_theta=20000",
    ],
    "hybrid with experts": [HYBRID, "model.mamba.attention_every=6", "model.moe.num_experts=4"],
    "mamba1": [JAMBA, "model.mamba.dt_rank=20"],
    "mamba1 hybrid": [JAMBA, "model.mamba.attention_every=3", "model.tie_embeddings=false"],
}


def recipe(*words: str) -> Recipe:
    return load_recipe(None, ["data.train=[a.txt]", "model.size=10m", *words]).recipe


def shape(*words: str) -> ModelConfig:
    return new_model_config(recipe(*words), 4000)


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", SHAPES)
def test_settings_files_and_shape_say_the_same(name: str) -> None:
    """A shape's settings make it again, its config.json too, and a recipe written down."""
    asked = recipe(*SHAPES[name])
    config = new_model_config(asked, 4000)
    settings = model_settings(config, asked.model.moe.routing())
    words = ["data.train=[a.txt]", *(f"{key}={value}" for key, value in settings.items())]
    again = load_recipe(None, words).recipe
    assert new_model_config(again, 4000) == config
    assert routing_of(again) == routing_of(asked)
    module = family(config.family)
    assert module.from_hf(module.to_hf(config)) == config


def test_a_written_recipe_loads_again(tmp_path) -> None:
    for words in SHAPES.values():
        asked = recipe(*words)
        file = tmp_path / "resolved.yaml"
        file.write_text(to_yaml(asked))
        assert load_recipe(file, []).recipe.model == asked.model


def test_what_a_family_has_when_nothing_is_said() -> None:
    """Experts as wide together as the layer they replace, Mamba twice as wide as the stream."""
    assert shape().moe is None
    experts = shape(MOE)
    assert experts.moe is not None and experts.qk_norm
    assert (experts.moe.num_experts, experts.moe.experts_per_token) == (8, 2)
    assert (experts.moe.intermediate_size, experts.moe.shared_intermediate_size) == (384, 0)
    shared = shape(SHARED)
    assert shared.moe is not None and shared.attention_scale == 64**-0.5
    assert (shared.moe.intermediate_size, shared.moe.shared_intermediate_size) == (256, 256)
    hybrid = shape(HYBRID, "model.mamba.attention_every=5")
    assert hybrid.mamba is not None and hybrid.moe is None
    assert hybrid.attention_layers == hybrid.nope_layers == (4, 9)
    assert (hybrid.mamba.num_heads, hybrid.mamba.head_dim, hybrid.mamba.state_size) == (8, 64, 128)
    jamba = shape(JAMBA).mamba
    assert jamba is not None and jamba.inner_norms
    assert (jamba.inner_size, jamba.state_size, jamba.dt_rank) == (512, 16, 16)
    assert shape("model.sliding_window=64").sliding_layers == tuple(range(12))


def test_pure_mamba_needs_no_heads() -> None:
    words = [HYBRID, "model.hidden_size=256", "model.num_layers=2", "data.train=[a.txt]"]
    config = new_model_config(load_recipe(None, words).recipe, 300)
    assert config.attention_layers == () and config.num_kv_heads == 1
    with pytest.raises(ConfigError, match=r"model\.num_heads missing: give them all"):
        load_recipe(None, [*words, "model.mamba.attention_every=2"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([HYBRID, "model.mamba.attention_every=13"], "but there are 12 blocks"),
        ([HYBRID, "model.mamba.num_heads=5"], "5 heads of 64 = 320 channels, which is no multiple"),
        ([HYBRID, "model.mamba.num_groups=3"], "num_groups = 3 does not divide 8 heads"),
        (["model.sliding_window=9", "model.sliding_layers=[3,12]"], "names block 12 of 12"),
    ],
)
def test_shapes_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message) as caught:
        shape(*words)
    assert caught.value.hint


# ---------------------------------------------------------------- settings without effect


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.moe.num_experts=4"], "model.family=qwen3 has no experts; use qwen3_moe or"),
        ([HYBRID, "model.moe.experts_per_token=1"], "has no experts; set model.moe.num_experts"),
        ([MOE, "model.intermediate_size=64"], "set model.moe.intermediate_size"),
        ([MOE, "model.moe.shared_intermediate_size=64"], "qwen3_moe has no shared expert"),
        ([MOE, "model.moe.bias_rate=0.1"], "with balance=aux; remove it, or use bias"),
        (
            [MOE, "model.moe.balance=bias", "model.moe.aux_loss=0.1"],
            "with balance=bias; remove it, or use aux",
        ),
        ([MOE, "model.moe.overflow=drop"], "without capacity_factor an expert takes every token"),
        ([MOE, "model.mamba.chunk_size=64"], "no block is one of Mamba; use granitemoehybrid"),
        ([HYBRID, "model.mamba.dt_rank=4"], "mamba2, of model.family=granitemoehybrid, has none"),
        ([JAMBA, "model.mamba.num_groups=1"], "mamba1, of model.family=jamba, has none"),
        (
            [HYBRID, "model.mamba.kind=none", "model.mamba.state_size=8"],
            "with model.mamba.kind=none no block is one of Mamba",
        ),
        ([HYBRID, "model.num_heads=4"], "no block attends; set model.mamba.attention_every"),
        ([JAMBA, "model.position_embedding=none"], "only granitemoehybrid, where it attends"),
        (["model.position_embedding=rope"], "only granitemoehybrid, where it attends"),
        (
            [HYBRID, "model.mamba.attention_every=4", "model.rope_theta=500"],
            "this model has no rotary positions",
        ),
        ([SHARED, "model.sliding_window=64"], "granitemoeshared sees all tokens; use qwen3"),
        (["model.sliding_layers=[1]"], "without model.sliding_window"),
        (
            [MOE, "model.sliding_window=64", "model.sliding_layers=[1]"],
            "the window of qwen3_moe is that of every block",
        ),
        # contradictions
        (
            [MOE, "model.moe.num_experts=4", "model.moe.experts_per_token=5"],
            "5 experts a token of 4",
        ),
        (
            [HYBRID, "model.mamba.kind=mamba1"],
            "mamba1, but model.family=granitemoehybrid has mamba2",
        ),
        (
            [HYBRID, "model.moe.num_experts=4", "model.moe.shared_intermediate_size=0"],
            "0, but every block of granitemoehybrid has a shared expert",
        ),
        (
            [HYBRID, "model.mamba.num_heads=8", "model.mamba.num_groups=3"],
            r"3 does not divide model\.mamba\.num_heads = 8",
        ),
    ],
)
def test_settings_without_effect_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(*words)


def test_beside_a_model_to_start_from() -> None:
    """Its shape is its own, how its router is trained is not; and it must have one."""
    words = ["data.train=[a.txt]", "model.path=runs/x"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, [*words, "model.moe.num_experts=4", "model.mamba.state_size=8"])
    assert len(caught.value.problems) == 2
    assert all("brings its own" in problem for problem in caught.value.problems)
    asked = load_recipe(None, [*words, "model.moe.balance=none"]).recipe
    assert routing_of(asked) == Routing(balance="none")
    check_routing(asked, shape(MOE))
    with pytest.raises(ConfigError, match=r"balance cannot take effect: model\.path=runs/x is a"):
        check_routing(asked, shape())


def test_a_later_family_takes_settings_away(tmp_path) -> None:
    """As with all settings: the command line goes before what the file says."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "data: {train: [a.txt]}\nmodel: {size: 10m, family: qwen3_moe, moe: {num_experts: 4}}\n"
    )
    assert load_recipe(file, []).recipe.model.moe.num_experts == 4
    assert load_recipe(file, ["model.family=llama"]).recipe.model.moe.num_experts is None
