"""Every planted fault is caught and named, and good exports of the same models pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mule.adapters.nf4 import QUANTIZED
from mule.adapters.source import Source
from mule.commands.verify import origin_of
from mule.errors import ModelError
from mule.export import verify as verify_module
from mule.export.gguf import write_gguf
from mule.export.imatrix_file import ImportanceMatrix
from mule.export.merge import merge_adapter
from mule.export.origin import Original
from mule.export.quantize import Quantizer
from mule.export.verify import verify_contents
from tests.merge_case import save_adapter, save_base
from tests.parity.planted import FAULTS
from tests.parity.planted_cases import Model, applies, model, planted, report_on
from tests.parity.trained_families import FAMILIES

# (fault, family, type) of those that are tried in `make test`: each kind of check, each way to name.
QUICK = {
    ("adapter left out", "llama", "q4_k_m"),
    ("merged twice", "llama", "f16"),
    ("quantised twice", "llama", "q4_k_m"),
    ("q and k unpermuted", "llama", "f16"),
    ("layers swapped", "llama", "f16"),
    ("norm + 1 forgotten", "gemma3_text", "f16"),
    ("head is the embedding", "llama", "f16"),
    ("cut short", "llama", "f16"),
}
TRIED = [
    pytest.param(
        name,
        family,
        type_name,
        marks=[] if (name, family, type_name) in QUICK else pytest.mark.slow,
        id=f"{name}, {family} {type_name}",
    )
    for name, fault in FAULTS.items()
    for family in [family for family in FAMILIES if applies(fault, family)][:2]
    for type_name in fault.types
]


@pytest.mark.parametrize(("name", "family", "type_name"), TRIED)
def test_a_planted_fault_is_named(name: str, family: str, type_name: str) -> None:
    report = report_on(name, family, type_name, run=False)
    assert not report.ok
    assert FAULTS[name].is_named_in(report.failures), report.failures[:2]
    assert report.verdict == f"not the same model: {report.failures[0]}"


def test_there_are_enough_faults_in_enough_families() -> None:
    assert len(FAULTS) >= 16
    assert {
        family for fault in FAULTS.values() for family in FAMILIES if applies(fault, family)
    } == {*FAMILIES}
    assert QUICK <= {tuple(param.values) for param in TRIED}


def test_a_fault_is_seen_in_llama_cpp_too() -> None:
    """And its cause is told first."""
    report = report_on("rope base", "llama", "f16", run=True)
    assert report.failures[0] == "metadata: RoPE base 12345, the model has 10000 (rope.freq_base)"
    kinds = [failure.partition(":")[0] for failure in report.failures[1:]]
    assert kinds[0] == "kl_mean" and "attention: RoPE" not in "".join(report.failures[1:])
    assert json.loads(json.dumps(report.as_dict()))["checks"][1]["ok"] is False


@pytest.mark.parametrize("type_name", ["f32", pytest.param("q4_k_m", marks=pytest.mark.slow)])
def test_a_good_export_passes_without_a_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type_name: str
) -> None:
    """The same figures from the file's weights in our own decoder, and what that leaves open."""
    known = model("llama")
    assert known.source.model_dir is not None
    write_gguf(known.source.model_dir, tmp_path / "m.gguf", type_name)

    def absent(*_args: object, **_options: object) -> None:
        raise ModelError("the package xllamacpp is not installed")

    monkeypatch.setattr(verify_module, "LlamaCpp", absent)
    monkeypatch.setattr(verify_module, "Runtime", absent)
    report = known.verify(tmp_path / "m.gguf")
    assert report.ok and report.runtime == "Mule", report.failures
    assert report.unchecked == ["tokens", "template", "stops"]
    assert report.tokens_equal is None and report.template_equal is None and report.stops is None
    assert "not in llama.cpp: token ids, template and stops there are not checked" in report.verdict
    assert report.kl_mean < {"f32": 1e-9, "q4_k_m": 3e-2}[type_name]
    assert report.num_greedy_equal == report.num_prompts or type_name == "q4_k_m"


def test_a_fault_is_seen_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_args: object, **_options: object) -> None:
        raise ModelError("the package xllamacpp is not installed")

    with planted("layers swapped", "llama", "f16") as (known, file, origin):
        monkeypatch.setattr(verify_module, "LlamaCpp", absent)
        monkeypatch.setattr(verify_module, "Runtime", absent)
        monkeypatch.setattr(verify_module, "Quantizer", lambda: Quantizer(native=False))
        report = known.verify(file, origin)
    assert report.failures[0].startswith("weights: layers 1 and 2 are swapped")
    assert any(failure.startswith("kl_mean") for failure in report.failures)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["q4_k_m", "q5_k_m", "q2_k", "iq4_xs"])
def test_an_importance_matrix_is_no_fault(tmp_path: Path, type_name: str) -> None:
    """Columns matter a hundred times more or less than others; what those lose is no other model."""
    known, draw = model("llama"), np.random.default_rng(0)
    folder = known.source.model_dir
    assert folder is not None
    tensors = Original(folder).tensors(type_name)
    squares = {
        name: np.exp(2 * draw.standard_normal(tensor.shape[-1])).astype(np.float32)
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and name.startswith("blk.")
    }
    matrix = ImportanceMatrix(squares, dict.fromkeys(squares, 1), "drawn", 1)
    write_gguf(folder, tmp_path / "m.gguf", type_name, importance=matrix)
    report = verify_contents(tmp_path / "m.gguf", origin_of(known.source))
    assert report.ok, report.failures
    assert report.weights is not None and report.weights["identical_blocks"] < 0.9


def test_an_adapter_of_qlora_is_compared_on_the_base_in_4_bits(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base, quantized=QUANTIZED[False])
    source = Source("q", model_dir=base, adapter_dir=adapter)
    for onto, is_it in (("quantized", True), ("original", False)):
        merge_adapter(source, tmp_path / onto, {}, onto=onto)
        write_gguf(tmp_path / onto, tmp_path / f"{onto}.gguf", "f32")
        report = verify_contents(tmp_path / f"{onto}.gguf", origin_of(source))
        assert report.ok == is_it, report.failures


@pytest.mark.slow
@pytest.mark.parametrize("type_name", ["f32", "f16", "q4_k_m"])
def test_a_merge_rounded_to_bf16_is_the_adapter_on_its_base(tmp_path: Path, type_name: str) -> None:
    """The adapter is not rounded, the merged weights are: f32 and f16 get the room of bf16."""
    known = model("llama", adapted=True)
    base, adapter = known.source.model_dir, known.source.adapter_dir
    assert base is not None
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("optimizer*"))
    file = tmp_path / "base" / "model.safetensors"
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file)
    source = Source("narrow", model_dir=tmp_path / "base", adapter_dir=adapter)
    merge_adapter(source, tmp_path / "merged", {})
    write_gguf(tmp_path / "merged", tmp_path / "m.gguf", type_name)
    found = Model("llama", source).verify(tmp_path / "m.gguf")
    assert found.ok, found.failures
    assert type_name == "q4_k_m" or 1e-8 < found.kl_mean < 1e-4
