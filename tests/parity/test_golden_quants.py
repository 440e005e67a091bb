"""Quantised files hold the bytes that llama.cpp's own quantiser writes, by recorded hashes."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from mule import fsio
from mule.errors import ModelError
from mule.export.gguf import write_gguf
from tests.parity.golden_models import MODELS, RECORD, tensor_record, types_of, write_golden_model

GOLDEN: dict[str, Any] = fsio.read_json(RECORD)["models"]
_NUMPY = (
    "q4_k_m",
    "q5_k_m",
    "q8_0",
    "q6_k",
    "q4_k_s",
    "q5_k_s",
    "mxfp4",
)  # made without llama.cpp too
_QUICK = {("qwen2", "q4_k_m"), ("odd rows", "q5_k_m"), ("phi3", "q3_k_m"), ("experts", "mxfp4")}
_MOST_OTHER_BYTES = 0.002  # of NumPy's blocks: sums in another order
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="recorded on x86-64"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("golden")
    for name in MODELS:
        write_golden_model(root / name, name)
    return {name: root / name for name in MODELS}


def golden(model: str, type_name: str) -> dict[str, str]:
    """Tensor -> its type and hash."""
    return dict(zip(GOLDEN[model]["tensors"], GOLDEN[model][type_name], strict=True))


def pairs(only: tuple[str, ...] | None = None) -> list[Any]:
    return [
        pytest.param(model, kind, marks=[] if (model, kind) in _QUICK else pytest.mark.slow)
        for model in MODELS
        for kind in types_of(model)
        if only is None or kind in only
    ]


def test_the_record_covers_every_model_and_type() -> None:
    assert {name: set(kinds) for name, kinds in GOLDEN.items()} == {
        name: {"tensors", "f32", *types_of(name)} for name in MODELS
    }


@pytest.mark.parametrize("model", MODELS)
def test_the_weights_are_those_of_the_record(
    folders: dict[str, Path], tmp_path: Path, model: str
) -> None:
    write_gguf(folders[model], tmp_path / "m.gguf", "f32")
    assert tensor_record(tmp_path / "m.gguf") == golden(model, "f32")


@pytest.mark.parametrize(("model", "type_name"), pairs())
def test_every_byte_is_llama_cpps(
    folders: dict[str, Path], tmp_path: Path, model: str, type_name: str
) -> None:
    write_gguf(folders[model], tmp_path / "m.gguf", type_name)
    assert tensor_record(tmp_path / "m.gguf") == golden(model, type_name)


@pytest.mark.parametrize(("model", "type_name"), pairs(_NUMPY))
def test_few_bytes_of_numpys_blocks_differ(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    type_name: str,
) -> None:
    def absent(subject: str) -> None:
        raise ModelError("the package xllamacpp is not installed")

    write_gguf(folders[model], tmp_path / "native.gguf", type_name)
    monkeypatch.setattr("mule.export.quantize.Runtime", absent)
    write_gguf(folders[model], tmp_path / "numpy.gguf", type_name)
    theirs, ours = (
        {tensor.name: tensor for tensor in GGUFReader(tmp_path / file).tensors}
        for file in ("native.gguf", "numpy.gguf")
    )
    assert {n: t.tensor_type for n, t in ours.items()} == {
        n: t.tensor_type for n, t in theirs.items()
    }
    different = sum(int(np.sum(_bytes(ours[n]) != _bytes(theirs[n]))) for n in theirs)
    share = different / sum(_bytes(tensor).size for tensor in theirs.values())
    told = f"{different} bytes of {model} as {type_name} differ: {share:.3%}"
    assert share <= _MOST_OTHER_BYTES, told


def _bytes(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.data).view(np.uint8)
