"""The header of a GGUF file is checked before native code sees it."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mule.errors import ModelError
from mule.generate.gguf_header import read_header


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of value and two tensors, of 3x32 and 5 numbers."""
    file = tmp_path_factory.mktemp("header") / "small.gguf"
    writer = GGUFWriter(str(file), "llama")
    writer.add_uint32("llama.block_count", 7)
    writer.add_float32("llama.rope.freq_base", 1e6)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", "<|end|>"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float32).reshape(3, 32))
    writer.add_tensor("output_norm.weight", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def damaged(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "damaged.gguf"
    file.write_bytes(content)
    return file


def test_reads_what_was_written(small: Path) -> None:
    header = read_header(small)
    assert header.metadata["llama.block_count"] == 7
    assert header.metadata["llama.rope.freq_base"] == 1e6
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "é", "<|end|>"]
    assert header.metadata["tokenizer.ggml.token_type"] == [1, 1, 3]
    assert [(t.name, t.shape, t.type.name) for t in header.tensors] == [
        ("token_embd.weight", (3, 32), "F32"),
        ("output_norm.weight", (5,), "F16"),
    ]
    assert header.num_params == 101
    assert header.bits_per_weight == pytest.approx(8 * (96 * 4 + 5 * 2) / 101)


def test_a_file_cut_anywhere_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    content = small.read_bytes()
    end = len(content) - 32  # the last tensor's padding may be absent
    for length in (*range(0, 320, 7), *range(320, end, 101)):
        with pytest.raises(ModelError, match=r"damaged\.gguf") as error:
            read_header(damaged(tmp_path, content[:length]))
        assert "write it again with `mule export`" in error.value.hint


def test_says_which_tensor_is_cut(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cut short: tensor 'token_embd.weight' ends at byte"):
        read_header(damaged(tmp_path, small.read_bytes()[:-200]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "announces 4 bytes but has 0 bytes left"),
        (b"PK\3\4" + bytes(99), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(99), "GGUF version 1; 2 and 3 are known"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(99),
            "announces 1,152,921,504,606,846,976 metadata entries but has 99 bytes left",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0) + bytes(99),
            "announces 1,099,511,627,776 tensors",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77) + bytes(99),
            "unknown value type 77",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50) + bytes(99),
            "an array or string of 1,125,899,906,842,624 items",
        ),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ModelError) as error:
        read_header(damaged(tmp_path, content))
    assert message in error.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.gguf: no such file"):
        read_header(tmp_path / "absent.gguf")


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_never_surprise(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    try:
        header = read_header(damaged(tmp_path, bytes(content)))
    except ModelError:
        return
    assert all(tensor.num_bytes <= len(content) for tensor in header.tensors)
