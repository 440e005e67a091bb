"""Files of experts and state-space layers, of tiny models with random weights: faults are named, and
every way to write and to read one gives the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mule.adapters.source import Source, load_source
from mule.export.dequantized import DequantizedModel
from mule.export.from_gguf import write_from_gguf
from mule.export.gguf import write_gguf
from mule.export.origin import Origin, Original
from mule.export.reference import TorchReference
from mule.export.stored import StoredTensors
from mule.export.verify import verify_contents
from mule.generate.gguf_header import read_header
from mule.generate.gguf_memory import cache_token_bytes, state_row_bytes
from mule.generate.llamacpp import LlamaCpp
from tests.parity.planted import FAULTS, Case
from tests.parity.tiny_families import save_family
from tests.parity.tiny_gguf import edit_json

MODELS = {
    "qwen3_moe": "qwen3_moe",
    "granitemoeshared": "granitemoeshared",
    "granitemoehybrid": "hybrid",
    "jamba": "jamba",
}
TRIED = [
    ("experts swapped", "qwen3_moe", "q4_k_m"),
    ("experts' gate and up swapped", "qwen3_moe", "f16"),
    ("router shifted", "granitemoeshared", "q4_k_m"),
    ("shared expert left out", "granitemoeshared", "f16"),
    ("experts a token", "qwen3_moe", "f16"),
    ("A's sign forgotten", "granitemoehybrid", "q4_k_m"),
    ("A_log written", "jamba", "q4_k_m"),
    ("D forgotten", "granitemoehybrid", "f16"),
    ("convolution reversed", "granitemoehybrid", "q4_k_m"),
    ("x and z swapped", "granitemoehybrid", "q4_k_m"),
    ("positions turned", "granitemoehybrid", "f16"),
]
AGAIN = [
    ("experts swapped", "granitemoeshared", "f16"),
    ("experts' gate and up swapped", "granitemoeshared", "q4_k_m"),
    ("A's sign forgotten", "jamba", "f16"),
    ("x and z swapped", "jamba", "f16"),
    ("gate and up swapped", "granitemoehybrid", "f16"),
    ("q and k unpermuted", "granitemoehybrid", "f16"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixers")
    for family, name in MODELS.items():
        save_family(root / family, name)
    return {family: root / family for family in MODELS}


@pytest.mark.parametrize(
    ("name", "family", "type_name"),
    [*TRIED, *(pytest.param(*case, marks=pytest.mark.slow) for case in AGAIN)],
)
def test_a_fault_is_named(
    tmp_path: Path, folders: dict[str, Path], name: str, family: str, type_name: str
) -> None:
    fault = FAULTS[name]
    assert not fault.families or family in fault.families
    file = fault.plant(Case(folders[family], type_name, tmp_path))
    report = verify_contents(file, Origin(folders[family]))
    assert fault.is_named_in(report.failures), report.failures[:3]


@pytest.mark.parametrize("family", MODELS)
def test_a_good_file_passes(tmp_path: Path, folders: dict[str, Path], family: str) -> None:
    write_gguf(folders[family], tmp_path / "m.gguf", "q4_k_m")
    report = verify_contents(tmp_path / "m.gguf", Origin(folders[family]))
    assert report.ok, report.failures
    assert report.weights is not None and report.weights["identical_blocks"] == 1.0


@pytest.mark.parametrize("family", ["granitemoeshared", "jamba"])
def test_a_master_gives_the_same_bytes(
    tmp_path: Path, folders: dict[str, Path], family: str
) -> None:
    write_gguf(folders[family], tmp_path / "direct.gguf", "q4_k_m", metadata={"name": "m"})
    write_gguf(folders[family], tmp_path / "master.gguf", "f32", metadata={"name": "m"})
    write_from_gguf(tmp_path / "master.gguf", tmp_path / "made.gguf", "q4_k_m")
    direct, made = (StoredTensors(read_header(tmp_path / f"{n}.gguf")) for n in ("direct", "made"))
    assert direct.infos.keys() == made.infos.keys()
    for name, info in direct.infos.items():
        assert made.infos[name].type == info.type, name
        assert np.array_equal(direct.blocks(name), made.blocks(name)), name


@pytest.mark.parametrize("family", MODELS)
def test_the_file_s_weights_in_our_decoder_are_the_model(
    tmp_path: Path, folders: dict[str, Path], family: str
) -> None:
    """What `verify` does where llama.cpp is not installed."""
    write_gguf(folders[family], tmp_path / "m.gguf", "f32")
    stored = StoredTensors(read_header(tmp_path / "m.gguf"))
    found = DequantizedModel(stored, Original(folders[family])).logits(range(40))
    reference = TorchReference(*load_source(Source("tiny", model_dir=folders[family])))
    np.testing.assert_allclose(found, reference.logits(list(range(40))), atol=1e-4)


@pytest.mark.parametrize("name", ["hybrid, no attention", "jamba, no attention"])
def test_a_pure_model_is_its_file_with_a_layer_of_zeros(tmp_path: Path, name: str) -> None:
    """Our decoder leaves that layer out; llama.cpp needs it."""
    save_family(tmp_path, name)
    edit_json(tmp_path / "config.json", null_attention_layer=True)
    write_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    ids = list(range(40))
    reference = TorchReference(*load_source(Source("tiny", model_dir=tmp_path)))
    assert reference.model.config.attention_layers == ()
    expected = reference.logits(ids)
    with LlamaCpp(tmp_path / "m.gguf", n_ctx=64, threads=1, exact=True) as runtime:
        np.testing.assert_allclose(runtime.logits(ids), expected, atol=1e-3)
    stored = StoredTensors(read_header(tmp_path / "m.gguf"))
    found = DequantizedModel(stored, Original(tmp_path)).logits(ids)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert verify_contents(tmp_path / "m.gguf", Origin(tmp_path)).ok


def test_only_attention_has_a_cache_and_only_mamba_a_state(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    sizes = {}
    for family in ("granitemoehybrid", "jamba", "qwen3_moe"):
        write_gguf(folders[family], tmp_path / "m.gguf", "q8_0")
        header = read_header(tmp_path / "m.gguf")
        sizes[family] = cache_token_bytes(header), state_row_bytes(header)
    one_layer = 2 * 2 * 32 * 2  # keys and values of two heads of 32, in 16 bits
    assert sizes["granitemoehybrid"] == (one_layer, 2 * 4 * (3 * (256 + 2 * 16) + 16 * 256))
    assert sizes["jamba"] == (one_layer, 2 * 4 * (3 * 256 + 8 * 256))
    assert sizes["qwen3_moe"] == (2 * 2 * 2 * 64 * 2, 0)


def test_what_narrow_experts_cost_is_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    report = write_gguf(folders["qwen3_moe"], tmp_path / "m.gguf", "q4_k_m")
    assert "blk.0.ffn_down_exps.weight: rows of 64, Q4_K -> Q5_0" in report.fallbacks
    assert "rows (64, 128) that do not divide into blocks" in report.notes[-1]
