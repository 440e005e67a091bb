"""Importance matrices: what is measured, the file of llama.cpp, and what they do to blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType as T
from gguf.quants import dequantize

from mule.errors import ModelError, UserError
from mule.export.gguf import write_gguf
from mule.export.imatrix import importance_of, measure
from mule.export.imatrix_file import ImportanceMatrix, read_imatrix, write_imatrix
from mule.export.kquants import KQUANTS
from mule.export.mixtures import Mixture
from mule.export.origin import Original
from mule.export.quantize import Quantizer
from mule.export.series import check_types
from mule.models.decoder import empty_decoder
from mule.models.families import family
from mule.models.folder import load_model, model_state, save_model
from mule.tokenizer import Tokenizer
from tests.tiny import TINY, tiny_model

WORDS = "the a cat dog fish bird sat ran on mat hill near red blue old young king river saw lost"
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LLAMA = PHI3 | {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512}
EXPERTS = LLAMA | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
}


def folder_of(folder: Path, raw: dict[str, Any]) -> Path:
    tokenizer = Tokenizer.train([WORDS] * 20, 300)
    raw = raw | {"vocab_size": tokenizer.vocab_size}
    config = family(raw["model_type"]).from_hf(raw)
    model = empty_decoder(config, torch.float32)
    model.init_weights(1)
    folder.mkdir()
    tokenizer.save(folder)
    save_model(model_state(model), config, folder, extra={"eos_token_id": tokenizer.stop_ids[0]})
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("imatrix") / "llama", LLAMA)


@pytest.fixture(scope="module")
def matrix(llama: Path) -> ImportanceMatrix:
    return importance_of(llama, [WORDS] * 40, "words", special=False)


# ---------------------------------------------------------------- measuring


def test_the_sums_are_those_of_every_input() -> None:
    model = tiny_model().eval()
    chunks = [[1, 2, 3, 4, 5], [6, 7, 8]]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def keep(_: Any, args: Any, name: str = name) -> None:
                seen.setdefault(f"model.{name}.weight", []).append(args[0][0])

            module.register_forward_pre_hook(keep)
    measured = measure(model, chunks)
    found = measured.sums
    assert found.keys() == seen.keys() == measured.tokens.keys()
    assert len(found) == TINY.num_layers * 7
    for name, sums in found.items():
        rows = torch.cat(seen[name])
        assert rows.shape[0] == 8, "every token once, nothing padded"
        torch.testing.assert_close(sums, rows.double().square().sum(0))


def test_two_measurements_are_equal_to_the_last_bit(llama: Path, matrix: ImportanceMatrix) -> None:
    again = importance_of(llama, [WORDS] * 40, "words", special=False)
    assert again.dataset == matrix.dataset and "sha256 " in matrix.dataset
    for name, sums in matrix.squares.items():
        np.testing.assert_array_equal(sums, again.squares[name])


def test_every_matrix_of_a_block_has_its_columns(llama: Path, matrix: ImportanceMatrix) -> None:
    names = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    assert set(matrix.squares) == {f"blk.{i}.{name}.weight" for i in (0, 1) for name in names}
    columns = matrix.columns()
    assert columns["blk.0.ffn_down.weight"].shape == (512,)
    assert columns["blk.0.attn_q.weight"].dtype == np.float32
    assert all((values > 0).all() for values in columns.values())


def test_fused_projections_share_what_enters(tmp_path: Path) -> None:
    found = importance_of(folder_of(tmp_path / "phi3", PHI3), [WORDS] * 40, "w", special=False)
    names = {name.split(".")[2] for name in found.squares}
    assert names == {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}


def test_each_expert_has_columns_of_its_own(tmp_path: Path) -> None:
    """Weighed by the tokens that were sent to it; in the file, and in the blocks of its rows."""
    folder = folder_of(tmp_path / "experts", EXPERTS)
    found = importance_of(folder, [WORDS] * 40, "w", special=False)
    name = "blk.1.ffn_up_exps.weight"
    counts = found.counts[name]
    assert isinstance(counts, tuple) and sum(counts) == 2 * found.num_tokens
    assert found.squares[name].shape == (4, 256)
    assert found.counts["blk.1.attn_q.weight"] == found.num_tokens
    write_imatrix(tmp_path / "imatrix.gguf", found)
    again = read_imatrix(tmp_path / "imatrix.gguf")
    assert again.counts == found.counts
    np.testing.assert_array_equal(again.squares[name], found.squares[name])
    write_gguf(folder, tmp_path / "m.gguf", "q4_k_m", importance=again)
    (tensor,) = [t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == name]
    weights = Original(folder).values(name)
    with Quantizer() as quantizer:
        for expert, columns in enumerate(found.columns()[name]):
            blocks = quantizer.encode("w", weights[expert], T.Q4_K, columns)
            np.testing.assert_array_equal(np.asarray(tensor.data)[expert], blocks)


def test_an_expert_that_saw_no_token_is_not_weighed() -> None:
    matrix = ImportanceMatrix({"w": np.zeros((2, 3), np.float32)}, {"w": (0, 4)}, "words", 512)
    assert matrix.columns()["w"].tolist() == [[1.0] * 3, [0.0] * 3] and matrix.num_tokens == 4


def test_too_few_tokens_are_refused(llama: Path) -> None:
    with pytest.raises(
        ModelError, match=r"an importance matrix of \d+ tokens says nothing"
    ) as error:
        importance_of(llama, ["the cat"], "few", special=False)
    assert "--imatrix FILE.jsonl" in error.value.hint


def test_a_model_of_nan_is_refused(llama: Path) -> None:
    model = load_model(llama).eval()
    torch.nn.init.constant_(model.model.layers[0].mlp.gate_proj.weight, float("nan"))
    with pytest.raises(ModelError, match="is multiplied with is NaN or infinite"):
        measure(model, [[1, 2, 3]])


# ---------------------------------------------------------------- the file


def test_the_file_is_llama_imatrix_s(tmp_path: Path, matrix: ImportanceMatrix) -> None:
    file = tmp_path / "imatrix.gguf"
    write_imatrix(file, matrix)
    reader = GGUFReader(file)
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("general.architecture") is None
    assert reader.get_field("imatrix.datasets").contents() == [matrix.dataset]
    assert reader.get_field("imatrix.chunk_size").contents() == matrix.chunk_tokens
    assert reader.get_field("imatrix.chunk_count").contents() == matrix.num_chunks
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.1.ffn_down.weight.in_sum2"].shape.tolist() == [512]
    assert tensors["blk.1.ffn_down.weight.counts"].data.tolist() == [matrix.num_tokens]
    again = read_imatrix(file)
    assert (again.counts, again.dataset, again.chunk_tokens) == (
        matrix.counts,
        matrix.dataset,
        matrix.chunk_tokens,
    )
    for name, sums in matrix.squares.items():
        np.testing.assert_array_equal(sums, again.squares[name])


def other_file(file: Path, kind: str, **tensors: Any) -> Path:
    writer = GGUFWriter(None, "")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", "."), np.asarray(values))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("kind", "tensors", "error"),
    [
        ("model", {"w__in_sum2": np.ones(4, np.float32)}, "is no importance matrix"),
        ("imatrix", {"w__other": np.ones(4, np.float32)}, "without entries"),
        ("imatrix", {"w__in_sum2": np.ones(4, np.float32)}, "w has no usable sums and count"),
        ("imatrix", {"w__in_sum2": np.ones(4, np.float16)}, "is of type F16, not F32"),
        (
            "imatrix",
            {"w__in_sum2": np.array([1, np.nan], np.float32), "w__counts": np.ones(1, np.float32)},
            "w has no usable sums and count",
        ),
    ],
)
def test_another_file_is_refused(
    tmp_path: Path, kind: str, tensors: dict[str, Any], error: str
) -> None:
    with pytest.raises(ModelError, match=error) as found:
        read_imatrix(other_file(tmp_path / "x.gguf", kind, **tensors))
    assert found.value.hint


def test_the_matrix_of_another_model_is_refused(
    tmp_path: Path, llama: Path, matrix: ImportanceMatrix
) -> None:
    short = {name: sums[:128] for name, sums in matrix.squares.items()}
    for squares, error in (
        (short, "has 128 columns for blk.0.attn_q.weight, the model 256"),
        (
            {"blk.9.attn_q.weight": short["blk.0.attn_q.weight"]},
            "has blk.9.attn_q.weight, the model",
        ),
    ):
        wrong = ImportanceMatrix(squares, matrix.counts, "words", 512)
        with pytest.raises(ModelError, match=error):
            write_gguf(llama, tmp_path / "m.gguf", "q4_k_m", importance=wrong)
    assert not (tmp_path / "m.gguf").exists()


# ---------------------------------------------------------------- the blocks


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Weights, and an importance that differs by orders of magnitude between columns."""
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((24, 512)) * 0.05).astype(np.float32)
    return values, rng.gamma(0.3, 1.0, 512).astype(np.float32)


def weighed_error(blocks: np.ndarray, kind: T, rows: tuple[np.ndarray, np.ndarray]) -> float:
    values, importance = rows
    return float((importance * np.square(dequantize(blocks, kind) - values)).sum())


@pytest.mark.parametrize(
    ("native", "kind"),
    [
        *((True, kind) for kind in (*KQUANTS, T.Q5_0, T.Q5_1, T.Q4_0, T.Q2_K, T.Q3_K, T.IQ4_XS)),
        *((False, kind) for kind in KQUANTS),
    ],
)
def test_what_counts_is_rounded_better(native: bool, kind: T, rows: Any) -> None:
    with Quantizer(native=native) as quantizer:
        plain = quantizer.encode("w", rows[0], kind)
        weighed = quantizer.encode("w", rows[0], kind, rows[1])
    gain = 0.98 if kind == T.Q6_K else 0.9
    assert weighed_error(weighed, kind, rows) < gain * weighed_error(plain, kind, rows)


@pytest.mark.parametrize("kind", [T.Q4_K, T.Q5_K, T.Q6_K])
def test_numpy_weighs_as_llama_cpp_does(kind: T, rows: Any) -> None:
    with Quantizer(native=True) as theirs, Quantizer(native=False) as ours:
        a, b = (each.encode("w", rows[0], kind, rows[1]) for each in (theirs, ours))
    assert (a != b).mean() < 0.01  # sums in another order
    assert weighed_error(b, kind, rows) == pytest.approx(weighed_error(a, kind, rows), rel=0.02)


def test_a_file_with_it_says_so_and_differs(
    tmp_path: Path, llama: Path, matrix: ImportanceMatrix
) -> None:
    for name, importance in (("plain", None), ("weighed", matrix)):
        write_gguf(llama, tmp_path / f"{name}.gguf", "q4_k_m", importance=importance)
    plain, weighed = (GGUFReader(tmp_path / f"{name}.gguf") for name in ("plain", "weighed"))
    field = weighed.get_field("quantize.imatrix.dataset")
    assert field is not None and field.contents() == matrix.dataset
    assert weighed.get_field("quantize.imatrix.entries_count").contents() == 14
    assert weighed.get_field("quantize.imatrix.chunks_count").contents() == matrix.num_chunks
    same = {a.name: np.array_equal(a.data, b.data) for a, b in zip(plain.tensors, weighed.tensors)}
    assert {name for name, equal in same.items() if not equal} == set(matrix.squares)


def test_with_numpy_a_type_that_it_cannot_weigh_is_named(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "odd", LLAMA | {"hidden_size": 96, "head_dim": 24})
    found = importance_of(folder, [WORDS] * 40, "w", special=False)
    with Quantizer(native=False) as quantizer:
        report = write_gguf(
            folder, tmp_path / "m.gguf", "q4_k_m", importance=found, quantizer=quantizer
        )
    (note,) = [note for note in report.notes if "importance" in note]
    assert "NumPy makes their types without it" in note


def test_iq4_xs_needs_no_larger_first_layers_with_it() -> None:
    names = [f"blk.{i}.ffn_down.weight" for i in range(16)]
    plain, weighed = (Mixture("iq4_xs", 16, False, weighed=w) for w in (False, True))
    assert [plain.tensor_type(n, (256, 256))[0].name for n in names[:2]] == ["Q5_K", "Q5_K"]
    assert {weighed.tensor_type(n, (256, 256))[0].name for n in names} == {"IQ4_XS"}


# ---------------------------------------------------------------- what cannot take effect


@pytest.mark.parametrize("types", [["q8_0"], ["f16", "bf16", "f32"], ["f16", "q8_0"]])
def test_types_that_ignore_it_are_refused_with_it(types: list[str]) -> None:
    check_types(types)
    with pytest.raises(UserError, match="--imatrix has no effect on") as error:
        check_types(types, weighed=True)
    assert "--types q4_k_m" in error.value.hint
    check_types([*types, "q4_k_m"], weighed=True)


def test_mxfp4_is_refused_for_a_dense_model(tmp_path: Path, llama: Path) -> None:
    with pytest.raises(ModelError, match="mxfp4 is for models with experts") as error:
        write_gguf(llama, tmp_path / "m.gguf", "mxfp4")
    assert "q8_0 throughout" in error.value.message and "q4_k_m" in error.value.hint
    assert not list(tmp_path.iterdir())
