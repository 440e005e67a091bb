"""Folders of weights that cannot be what they say: cases 52-60, each refused with one clear error.

A broken safetensors file does not reach native code.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mule import fsio
from mule.errors import ModelError, MuleError, StorageError
from mule.models.folder import load_model, model_state, save_model
from tests.house.source import modules
from tests.tiny import TINY, tiny_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "good"
    with fsio.atomic_folder(folder) as out:
        save_model(model_state(tiny_model()), TINY, out)
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def refused(work: Callable[[], Any], message: str, kind: type[MuleError] = ModelError) -> None:
    with pytest.raises(kind) as caught:
        work()
    assert message in caught.value.message, caught.value.message
    assert caught.value.hint


# ---------------------------------------------------------------- folders of weights


def test_the_good_one_is_read(good: Path) -> None:
    assert load_model(good).config == TINY


INDEXES: dict[str, tuple[Any, str]] = {
    "a shard that is not there": (
        {"weight_map": {EMBEDDING: "model-00002-of-00002.safetensors"}},
        "model-00002-of-00002.safetensors is missing",
    ),
    "another folder": (
        {"weight_map": {EMBEDDING: "../other/model.safetensors"}},
        "index.json: names '../other/model.safetensors', outside the folder",
    ),
    "an absolute path": ({"weight_map": {EMBEDDING: "/etc/passwd"}}, "names '/etc/passwd'"),
    "the folder itself": ({"weight_map": {EMBEDDING: ".."}}, ".. is missing"),
    "an endless name": ({"weight_map": {EMBEDDING: "a" * 5000}}, "outside the folder"),
    "no text": ({"weight_map": {EMBEDDING: 7}}, "index.json: has no weight_map of names and files"),
    "a list": ([], "index.json: has no weight_map of names and files"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_52_an_index_that_names_what_is_not_beside_it(copy: Path, case: str) -> None:
    index, message = INDEXES[case]
    (copy / INDEX).write_text(json.dumps(index))
    refused(lambda: load_model(copy), message)


def with_header(header: str | bytes, data: bytes = b"") -> Callable[[bytes], bytes]:
    """A file of this header in place of the good one."""
    text = header.encode() if isinstance(header, str) else header
    return lambda _: struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def flipped(content: bytes) -> bytes:
    """One bit of the header's first brace."""
    return content[:8] + bytes([content[8] ^ 4]) + content[9:]


TWO = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "53 cut off": (lambda content: content[:-5], "it is cut off: 'model.norm.weight' ends at byte"),
    "53 cut in the header": (
        lambda content: content[:200],
        "its header is longer than the file",
    ),
    "53 one byte more": (
        lambda content: content + b"x",
        "it has 1 bytes that belong to no tensor",
    ),
    "53 nothing": (lambda _: b"", "it has 0 bytes, and its first number alone takes 8"),
    "54 a flipped bit": (flipped, "not a readable safetensors file"),
    "54 a page of zeros": (
        lambda content: content[:8] + bytes(100) + content[108:],
        "not a readable safetensors file",
    ),
    "59 a header of 2^63 bytes": (
        lambda content: struct.pack("<Q", 2**63) + content[8:],
        "announces a header of 9,223,372,036,854,775,808 bytes; more than 100,000,000 are not read",
    ),
    "59 longer than the file": (
        lambda content: struct.pack("<Q", len(content)) + content[8:],
        "its header is longer than the file",
    ),
    "no object": (with_header("[1, 2]"), "its header is not a JSON object"),
    "nested": (with_header("[" * 100_000), "its header is nested too deep"),
    "a tensor twice": (with_header(f"{{{TWO},{TWO}}}", bytes(8)), "'a' is there twice"),
    "an unknown type": (
        with_header(entry(dtype="F31"), bytes(8)),
        "'a' has the unknown type 'F31'",
    ),
    "a type that is no text": (with_header(entry(dtype=[1]), bytes(8)), "'a' has the unknown type"),
    "a negative size": (with_header(entry(shape=[-2]), bytes(8)), "'a' has the shape '[-2]'"),
    "a size of 2^64": (with_header(entry(shape=[2**64]), bytes(8)), "'a' has the shape"),
    "sizes beyond 2^64": (
        with_header(entry(shape=[2**40, 2**40]), bytes(8)),
        "'a' has another size than its shape",
    ),
    "half a number": (with_header(entry(shape=[2.0]), bytes(8)), "'a' has the shape '[2.0]'"),
    "true": (with_header(entry(shape=[True]), bytes(8)), "'a' has the shape '[True]'"),
    "turned offsets": (
        with_header(entry(data_offsets=[8, 0]), bytes(8)),
        "'a' has another size than its shape",
    ),
    "one offset": (with_header(entry(data_offsets=[8]), bytes(8)), "'a' has the offsets '[8]'"),
    "a gap": (
        with_header(entry(data_offsets=[4, 12]), bytes(12)),
        "'a' leaves a gap behind the header",
    ),
    "an overlap": (
        with_header(f'{{{TWO},"b":{{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}}}', bytes(8)),
        "'b' overlaps 'a'",
    ),
    "more keys": (
        with_header(entry(code="x"), bytes(8)),
        "'a' has not just dtype, shape and data_offsets",
    ),
    "metadata": (
        with_header('{"__metadata__":{"a":1}}'),
        "its __metadata__ is not an object of texts",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_safetensors_file(copy: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    change, message = FILES[case]
    monkeypatch.setattr("mule.models.tensor_file.safe_open", None)  # native code is not reached
    (copy / WEIGHTS).write_bytes(change((copy / WEIGHTS).read_bytes()))
    refused(lambda: load_model(copy), message)
    refused(lambda: load_model(copy), f"{copy / WEIGHTS}: not a readable safetensors file (")


@pytest.mark.parametrize("spoil", ["flip", "zeros"])
def test_54_damage_that_only_a_sum_shows(copy: Path, spoil: str) -> None:
    """Weights are any bytes: what Mule wrote has a manifest, which other folders have not."""
    file = copy / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-4000:-3000] = bytes(1000) if spoil == "zeros" else bytes([1]) * 1000
    file.write_bytes(content)
    refused(
        lambda: fsio.verify_folder(copy),
        "model.safetensors: its content differs from its SHA-256 in the manifest",
        StorageError,
    )


def changed(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda weights: weights | {key: change(weights[key]).contiguous()}


def renamed(before: str) -> Callable[[dict], dict]:
    return lambda weights: {f"{before}{name}": tensor for name, tensor in weights.items()}


STATES: dict[str, tuple[Callable[[dict], dict], str]] = {
    "55 NaN": (changed(EMBEDDING, lambda t: t * torch.nan), f"{EMBEDDING} holds NaN or infinite"),
    "55 infinite": (changed(EMBEDDING, lambda t: t / 0), f"{EMBEDDING} holds NaN or infinite"),
    "56 turned": (
        changed(EMBEDDING, lambda t: t.T),
        f"{EMBEDDING} has shape (24, 89), the config says (89, 24)",
    ),
    "57 whole numbers": (
        changed(EMBEDDING, lambda t: t.to(torch.int64)),
        f"{EMBEDDING} is stored as torch.int64, which is no type of plain weights",
    ),
    "57 float8 without its scale": (
        changed(EMBEDDING, lambda t: t.to(torch.float8_e4m3fn)),
        f"{EMBEDDING} is stored as torch.float8_e4m3fn",
    ),
    "58 one is missing": (
        lambda weights: {key: weights[key] for key in weights if key != EMBEDDING},
        f"1 weights are missing, first {EMBEDDING}",
    ),
    "58 one more": (
        lambda weights: weights | {"model.extra.weight": torch.ones(2)},
        "holds model.extra.weight, which this model does not have",
    ),
    "58 torch.compile": (renamed("_orig_mod."), "holds _orig_mod.model."),
    "58 DDP": (renamed("module."), "holds module.model."),
}


@pytest.mark.parametrize("case", STATES)
def test_weights_that_do_not_fit(copy: Path, case: str) -> None:
    change, message = STATES[case]
    save_file(change(load_file(copy / WEIGHTS)), copy / WEIGHTS, metadata={"format": "pt"})
    refused(lambda: load_model(copy), message)


def test_60_a_pickle_is_not_opened(copy: Path, tmp_path: Path) -> None:
    (copy / WEIGHTS).unlink()
    stop = f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR."
    (copy / "pytorch_model.bin").write_text(stop)
    refused(
        lambda: load_model(copy),
        "model.safetensors is missing (pytorch_model.bin is a pickle file, which can run code",
    )
    assert not (tmp_path / "ran").exists()


def test_native_code_opens_no_file_that_was_not_checked() -> None:
    found = [module.path for module in modules("mule") if "safe_open(" in module.text]
    assert found == ["mule/models/tensor_file.py"]
