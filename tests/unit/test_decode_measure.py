"""Decoding as it is measured: both ways compute the same, and the figures fit each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from mule.errors import CheckFailed, UserError
from mule.lab import decode, decode_ways
from mule.lab.decode import measure_decode
from mule.lab.decode_figures import gains, step_figures, step_weight_bytes
from mule.lab.decode_ways import Clock, ModuleWay, NativeWay, Way, fastest_way
from mule.models import cost
from mule.models.config import MambaConfig, MoEConfig
from mule.models.decoder import Decoder
from tests.tiny import TINY, tiny_model


@pytest.fixture(params=["native", "modules"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "modules":
        monkeypatch.setattr(decode_ways, "can_be_native", lambda model: False)
    return request.param


def measured(model: Decoder, **settings: Any) -> dict[str, Any]:
    settings = {"batches": [1, 2], "contexts": [64, 16], "precision": "fp32"} | settings
    return measure_decode(model, new_tokens=6, bandwidth=1e9, repetitions=2, **settings)


def test_rows_are_measured_with_a_cache_and_without(engine: str) -> None:
    found = measured(tiny_model())
    assert found["engine"] == {"native": "C++", "modules": "torch modules"}[engine]
    assert found["not_measured"] == [] and found["same_text"] is True
    assert 0 <= found["max_error"] < 1e-4
    places = [(row["context"], row["batch"], row["cached"]) for row in found["rows"]]
    assert places == [(c, b, k) for c in (16, 64) for b in (1, 2) for k in (True, False)]
    for row in found["rows"]:
        assert row["repetitions"] == 2 and row["new_tokens"] == 6
        for name in ("prefill_tokens_per_second", "time_to_first_token_s", "tpot_s"):
            assert row[name] > 0
        share = row["batch"] / row["tpot_s"] / row["ceiling_tokens_per_second"]
        assert row["share_of_bandwidth"] == pytest.approx(share)
        if row["cached"]:
            assert row["cache_bytes"] == row["cache_formula_bytes"] > 0


def test_speed_is_that_of_median_steps() -> None:
    found = step_figures([[0.5, 9.0, 0.1], [0.25, 0.25]], 2)
    assert found["decode_tokens_per_second"] == pytest.approx(6)  # of 4 and 8
    assert found["decode_std"] == pytest.approx(8**0.5) and found["tpot_s"] == 0.375
    assert step_figures([[0.5]], 1)["decode_std"] == 0.0


OTHERS = {
    "experts": dataclasses.replace(TINY, moe=MoEConfig(4, 2, 16)),
    "hybrid": dataclasses.replace(
        TINY,
        mamba=MambaConfig("mamba2", state_size=8, num_heads=6, head_dim=8, chunk_size=16),
        mamba_layers=(0, 2),
    ),
    "windows": dataclasses.replace(TINY, sliding_window=11, sliding_layers=(0, 2)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "windows":
        monkeypatch.setattr(decode_ways, "can_be_native", lambda model: False)
    config = OTHERS[kind]
    found = measured(tiny_model(config), batches=[2], contexts=[64])
    assert found["engine"] == "torch modules" and found["same_text"] is True
    assert found["max_error"] < 1e-4
    (cached, _) = found["rows"]
    assert cached["cache_bytes"] == cached["cache_formula_bytes"]
    assert cached["cache_bytes"] == 2 * cost.cache_bytes(config, 64, 4)
    assert found["card"]["state_bytes"] == cost.state_bytes(config, 4)


def test_a_step_reads_the_experts_that_are_chosen() -> None:
    model = tiny_model(OTHERS["experts"])
    experts = TINY.num_layers * 4 * 3 * TINY.hidden_size * 16 * 4  # bytes of all
    others = step_weight_bytes(model, 1) - experts / 2  # two of four for one row
    assert step_weight_bytes(model, 2) == pytest.approx(others + experts * 3 / 4)
    assert step_weight_bytes(model, 99) == pytest.approx(others + experts)


def test_a_step_reads_all_weights_and_the_cache() -> None:
    model = tiny_model()
    (row,) = measured(model, batches=[3], contexts=[32], cached=[True])["rows"]
    per_token = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    assert row["step_bytes"] == 4 * cost.total_params(TINY) + 3 * 32 * per_token
    card = measured(model, batches=[1], contexts=[16], cached=[True])["card"]
    assert card["weight_bytes"] == 4 * cost.total_params(TINY)
    assert card["kv_bytes_per_token"] == per_token
    untied = tiny_model(dataclasses.replace(TINY, tie_embeddings=False))
    assert step_weight_bytes(untied, 1) == step_weight_bytes(model, 1)  # rows are looked up


def test_both_ways_compute_the_same_texts(engine: str) -> None:
    model = tiny_model().eval()
    ids = torch.randint(0, TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))
    way: Way = fastest_way(model, 2, 40)
    assert isinstance(way, NativeWay if engine == "native" else ModuleWay)
    with torch.no_grad():
        expected = model(ids)
        for length in (1, 7, 33, 40):
            torch.testing.assert_close(way.whole(ids, length), expected[:, length - 1])
        way.start()
        way.append(ids[:, :30])
        for place in range(30, 40):
            torch.testing.assert_close(way.append(ids[:, place, None]), expected[:, place])


def test_a_time_limit_leaves_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(tiny_model(), time_limit_s=0.0)
    first, *_ = found["rows"]
    assert (first["context"], first["cached"], first["repetitions"]) == (16, True, 1)
    whys = [row["why"] for row in found["not_measured"]]
    assert any("0.0 s were left for the row" in why for why in whys)
    assert any("0 s are left" in why for why in whys)
    assert len(found["rows"]) + len(whys) == 8
    monkeypatch.setattr(decode, "_free_bytes", lambda device: 0)
    found = measured(tiny_model(), contexts=[16, 4096])
    assert found["rows"] == [] and found["same_text"] is None and found["max_error"] is None
    whys = {row["context"]: row["why"] for row in found["not_measured"]}
    assert "GiB of memory" in whys[16]
    assert whys[4096] == "the model's context holds 128 tokens"


def test_a_cache_that_gives_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ModuleWay.whole
    monkeypatch.setattr(decode_ways, "can_be_native", lambda model: False)
    monkeypatch.setattr(ModuleWay, "whole", lambda *given: whole(*given) * 1.1)
    with pytest.raises(CheckFailed, match="gives other logits than the whole text") as caught:
        measured(tiny_model())
    assert "measure in fp32" in caught.value.hint


def test_what_cannot_be_measured_is_told() -> None:
    model = tiny_model()
    for settings, message in (
        ({"precision": "int3"}, "'int3' is no precision that is measured"),
        ({"batches": []}, r"batches is \[\]; each must be 1 or more"),
        ({"contexts": [2]}, r"contexts is \[2\]; each must be 4 or more"),
    ):
        with pytest.raises(UserError, match=message):
            measured(model, **settings)
    with pytest.raises(UserError, match="1 new tokens, 5 repetitions: too few to time"):
        measure_decode(model, batches=[1], contexts=[16], precision="fp32", new_tokens=1)


def test_a_gain_is_predicted_from_the_forward_pass_and_memory() -> None:
    cached = {"batch": 2, "context": 1001, "cached": True, "tpot_s": 0.02}
    cached |= {"prefill_tokens_per_second": 500.0, "ceiling_tokens_per_second": 125.0}
    rows = [cached, {"batch": 2, "context": 1001, "cached": False, "tpot_s": 3.0}]
    (gain,) = gains(rows)  # 2 x 1000 tokens at 500 a second, a step in 2 / 125 s
    assert gain["predicted"] == pytest.approx(4.0 / 0.016)
    assert gain["gain"] == pytest.approx(150) and gain["share"] == pytest.approx(0.6)
    slow = cached | {"prefill_tokens_per_second": 50.0}  # arithmetic takes longer: 2 / 50 s
    (gain,) = gains([slow, rows[1]])
    assert gain["predicted"] == pytest.approx(40.0 / 0.04)
    assert gains(rows[:1]) == []


def test_other_precisions_leave_the_model_as_it_is() -> None:
    model = tiny_model()
    found = measured(model, precision="bf16", batches=[1], contexts=[16])
    assert model.lm_head.weight.dtype == torch.float32 and found["precision"] == "bf16"
    assert found["card"]["weight_bytes"] == 2 * cost.total_params(TINY)


def test_a_clock_gives_the_time_between_marks() -> None:
    clock = Clock(torch.device("cpu"))
    assert clock.seconds() == []
    for _ in range(3):
        clock.mark()
    assert len(clock.seconds()) == 2 and min(clock.seconds()) >= 0
