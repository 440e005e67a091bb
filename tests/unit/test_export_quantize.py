"""The recipe of types, and the blocks: NumPy's against llama.cpp's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from mule.errors import ModelError
from mule.export.kquants import KQUANTS
from mule.export.mixtures import TYPES, Mixture, num_bytes
from mule.export.quantize import Quantizer

# The largest error of a code, as a share of the range of its group.
STEP = {T.Q4_K: 1 / 15, T.Q5_K: 1 / 31, T.Q6_K: 1 / 62}


def weights(seed: int = 0) -> np.ndarray:
    """Rows like a model's, and rows at the edges: zero, constant, one sign, tiny, large."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((40, 512)) * rng.gamma(1.0, 0.03, (40, 1))
    rows[3] = 0
    rows[5], rows[6] = np.abs(rows[5]), -np.abs(rows[6])
    rows[7, :256] = 0.5
    rows[8] *= 1e-7
    rows[9] *= 1e4
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def native() -> Iterator[Quantizer]:
    with Quantizer(native=True) as quantizer:
        yield quantizer


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K, T.Q6_K, T.Q5_0, T.Q5_1])
def test_numpy_makes_llama_cpps_blocks(native: Quantizer, kind: T) -> None:
    rows = weights()
    theirs = native.encode("w", rows, kind)
    with Quantizer(native=False) as quantizer:
        ours = quantizer.encode("w", rows, kind)
    assert ours.shape == theirs.shape == (40, num_bytes((512,), kind))
    usual = np.arange(40) != 8  # scales too small for float16 leave the codes undefined
    assert (ours != theirs)[usual].mean() < 0.005  # measured 0.001: sums in another order
    a, b = dequantize(ours, kind), dequantize(theirs, kind)
    error_ours, error_theirs = np.square(a - rows).mean(1), np.square(b - rows).mean(1)
    np.testing.assert_allclose(error_ours[usual], error_theirs[usual], rtol=0.02, atol=1e-14)


@pytest.mark.parametrize("kind", [T.Q8_0, T.BF16])
def test_the_plain_types_are_equal_everywhere(native: Quantizer, kind: T) -> None:
    rows = weights()
    np.testing.assert_array_equal(native.encode("w", rows, kind), quantize(rows, kind))


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K, T.Q6_K])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_error_is_within_a_step(kind: T, data: st.DataObject) -> None:
    scale = data.draw(st.floats(1e-3, 1e3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = (rng.standard_normal((2, 256)) * scale + data.draw(st.sampled_from([0, scale]))).astype(
        np.float32
    )
    if data.draw(st.booleans()):
        rows[0, : data.draw(st.integers(0, 256))] = 0
    error = np.abs(dequantize(KQUANTS[kind](rows), kind) - rows)
    reach = np.maximum(rows.max(), 0) - np.minimum(rows.min(), 0)
    assert error.max() <= 1.6 * STEP[kind] * reach  # scales have 6 or 8 bits of their own


def test_q6_k_is_finer_than_q5_k_than_q4_k() -> None:
    rows = weights()[:3]
    errors = [np.abs(dequantize(KQUANTS[k](rows), k) - rows).mean() for k in STEP]
    assert errors[0] > 1.8 * errors[1] > 3 * errors[2]


def test_zero_stays_zero() -> None:
    rows = np.zeros((1, 256), np.float32)
    for kind, encode in KQUANTS.items():
        np.testing.assert_array_equal(dequantize(encode(rows), kind), rows)


# ---------------------------------------------------------------- what is refused


def test_a_type_that_only_llama_cpp_makes_is_refused_without_it() -> None:
    with Quantizer(native=False) as quantizer:
        quantizer.require([T.Q4_K, T.Q5_0, T.F32])
        with pytest.raises(ModelError) as error:
            quantizer.require([T.IQ4_XS, T.Q4_K])
    assert error.value.message == (
        "only llama.cpp makes blocks of IQ4_XS, and it cannot run here: asked for"
    )
    assert "--types q4_k_m" in error.value.hint


def test_float16_overflow_is_refused_by_name() -> None:
    values = np.array([[1.0, -70_000.0]], np.float32)
    with Quantizer() as quantizer:
        with pytest.raises(ModelError) as error:
            quantizer.encode("model.norm.weight", values, T.F16)
        assert quantizer.encode("w", np.full((1, 2), 65504.0, np.float32), T.F16).max() == 65504
    assert error.value.message == "model.norm.weight holds 7e+04; float16 ends at 65504"
    assert "--type bf16" in error.value.hint


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", [T.F32, T.BF16, T.Q4_K])
def test_a_weight_that_is_no_number_is_refused(bad: float, kind: T) -> None:
    values = np.zeros((1, 256), np.float32)
    values[0, 17] = bad
    with (
        Quantizer() as quantizer,
        pytest.raises(ModelError, match=r"lm_head\.weight holds NaN or infinite"),
    ):
        quantizer.encode("lm_head.weight", values, kind)


# ---------------------------------------------------------------- the recipe


def types(type_name: str, name: str, *, tied: bool = False, grouped: int = 1) -> list[str]:
    """The types of one matrix in each of 16 layers, or of the one matrix outside the layers."""
    names = [name] if "." in name else [f"blk.{i}.{name}.weight" for i in range(16)]
    mixture = Mixture(type_name, 16, tied, grouped)
    return [mixture.tensor_type(n, (512, 256))[0].name for n in names]


def test_a_k_m_mixture_gives_more_bits_where_llama_cpp_does() -> None:
    more = [0, 1, 4, 7, 10, 13, 14, 15]  # i < 2, i >= 14, (i - 2) % 3 == 2
    for matrix in ("attn_v", "ffn_down"):
        found = types("q4_k_m", matrix)
        assert [i for i, kind in enumerate(found) if kind == "Q6_K"] == more
        assert set(found) == {"Q4_K", "Q6_K"}
    for matrix in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert set(types("q5_k_m", matrix)) == {"Q5_K"}
    assert set(types("q6_k", "ffn_down")) == {"Q6_K"}


@pytest.mark.parametrize(
    ("type_name", "matrix", "most", "others"),
    [
        ("q5_k_s", "attn_v", "Q5_K", {}),
        ("q4_k_s", "attn_v", "Q4_K", dict.fromkeys(range(4), "Q5_K")),
        ("q4_k_s", "ffn_down", "Q4_K", dict.fromkeys(range(2), "Q5_K")),
        ("iq4_xs", "attn_v", "IQ4_XS", {}),
        ("iq4_xs", "ffn_down", "IQ4_XS", dict.fromkeys(range(2), "Q5_K")),
        ("q3_k_m", "attn_q", "Q3_K", {}),
        ("q3_k_m", "attn_v", "Q4_K", dict.fromkeys(range(2), "Q5_K")),
        ("q3_k_m", "attn_qkv", "Q4_K", dict.fromkeys(range(2), "Q5_K")),
        ("q3_k_m", "ffn_down", "Q4_K", {0: "Q5_K"}),
        ("q3_k_m", "attn_output", "Q4_K", {}),
        ("q2_k", "ffn_gate", "Q2_K", {}),
        ("q2_k", "ffn_down", "Q3_K", {}),
        ("q2_k", "attn_v", "Q3_K", {}),
    ],
)
def test_the_other_mixtures_are_llama_cpps(
    type_name: str, matrix: str, most: str, others: dict[int, str]
) -> None:
    assert types(type_name, matrix) == [others.get(layer, most) for layer in range(16)]


def test_a_v_that_many_heads_share_gets_more_bits() -> None:
    assert set(types("q2_k", "attn_v", grouped=4)) == {"Q4_K"}
    assert set(types("iq4_xs", "attn_v", grouped=7)) == {"Q5_K"}


@pytest.mark.parametrize(
    ("type_name", "others"),
    [("q4_k_m", "Q5_K"), ("q5_k_m", "Q5_K"), ("q6_k", "Q6_K"), ("q2_k", "Q5_K"), ("q8_0", "Q8_0")],
)
def test_eight_experts_give_attention_more_bits(type_name: str, others: str) -> None:
    mixture = Mixture(type_name, 16, False, experts=8)
    found = {
        matrix: {mixture.tensor_type(f"blk.{i}.{matrix}.weight", (9, 256))[0].name for i in (0, 5)}
        for matrix in ("attn_v", "attn_k", "attn_output")
    }
    assert found == {"attn_v": {"Q8_0"}, "attn_k": {"Q8_0"}, "attn_output": {others}}


def test_experts_are_the_matrices_that_they_stand_for() -> None:
    mixture = Mixture("q4_k_m", 16, False, experts=6)
    for end, shape in (("", (9, 256)), ("_exps", (6, 9, 256)), ("_shexp", (9, 256))):
        kinds = [mixture.tensor_type(f"blk.{i}.ffn_down{end}.weight", shape)[0] for i in range(4)]
        assert [kind.name for kind in kinds] == ["Q6_K", "Q6_K", "Q4_K", "Q4_K"]


def test_the_v_of_a_hybrid_counts_layers_that_attend() -> None:
    hybrid = Mixture("q3_k_m", 9, False, attending=(2, 5, 8))
    kinds = [hybrid.tensor_type(f"blk.{i}.attn_v.weight", (9, 256))[0].name for i in (2, 5, 8)]
    assert kinds == ["Q5_K", "Q5_K", "Q4_K"]  # the first two of them, not of the layers


def test_the_head_gets_six_bits_tied_or_not() -> None:
    assert types("q4_k_m", "output.weight") == ["Q6_K"]
    assert types("q4_k_m", "token_embd.weight") == ["Q4_K"]
    assert types("q4_k_m", "token_embd.weight", tied=True) == ["Q6_K"]
    assert types("q8_0", "output.weight") == ["Q8_0"]


def test_norms_and_biases_stay_float32() -> None:
    for name, shape in (
        ("output_norm.weight", (256,)),
        ("blk.0.attn_q_norm.weight", (64,)),
        ("blk.0.attn_q.bias", (256,)),
        ("rope_freqs.weight", (32,)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("blk.0.ssm_conv1d.weight", (512, 4)),
        ("blk.0.ssm_norm.weight", (2, 256)),
        ("blk.0.ssm_a", (512, 16)),
        ("blk.0.ssm_d", (8, 1)),
    ):
        for type_name in TYPES:
            mixture = Mixture(type_name, 3, False, experts=8)
            assert mixture.tensor_type(name, shape) == (T.F32, T.F32)


def test_mxfp4_is_for_the_matrices_of_experts() -> None:
    mixture = Mixture("mxfp4", 3, False, experts=8)
    assert mixture.tensor_type("blk.0.ffn_up_exps.weight", (8, 96, 256))[1] == T.MXFP4
    for name in ("blk.0.attn_v.weight", "token_embd.weight", "output.weight"):
        assert mixture.tensor_type(name, (64, 256))[1] == T.Q8_0


@pytest.mark.parametrize(
    ("type_name", "row", "expected"),
    [
        *(("q4_k_m", 576, "Q5_0"), ("q5_k_m", 576, "Q5_1"), ("q6_k", 576, "Q8_0")),
        *(("q4_k_m", 300, "F16"), ("q8_0", 300, "F16"), ("q8_0", 576, "Q8_0")),
        *(("q3_k_m", 576, "Q4_0"), ("q2_k", 576, "Q4_0"), ("iq4_xs", 576, "IQ4_NL")),
        *(("f16", 300, "F16"), ("bf16", 300, "BF16"), ("q4_k_m", 768, "Q4_K")),
    ],
)
def test_odd_rows_fall_back_as_in_llama_cpp(type_name: str, row: int, expected: str) -> None:
    wanted, fitting = Mixture(type_name, 3, False).tensor_type("blk.0.attn_q.weight", (64, row))
    assert fitting.name == expected
    assert wanted == TYPES[type_name][0]
