"""How an export goes on: memory, the bar, a disk that fills up, and what was written read back."""

from __future__ import annotations

import errno
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as T

from mule import progress
from mule.errors import ModelError, StorageError
from mule.export.gguf import write_gguf
from mule.export.gguf_file import _padded
from mule.export.mixtures import num_bytes
from mule.export.quantize import FileTensor, Quantizer
from mule.generate.weight_rows import NotFiniteError, WeightRows
from tests.unit.test_imatrix import LLAMA, folder_of

ROWS, COLUMNS = 16_384, 1_024  # 64 MiB in float32
TWO_TENSORS = 2 * 4 * ROWS * COLUMNS
KINDS = [T.F16, T.BF16, T.Q8_0, T.Q4_K]


def stored(file: Path, dtype: str, values: np.ndarray, **more: Any) -> WeightRows:
    """A file that is nothing but a matrix, behind 8 other bytes."""
    file.write_bytes(b"12345678" + np.ascontiguousarray(values).tobytes())
    return WeightRows(str(file), 8, dtype, *values.shape, **more)


def placed(folder: Path, rows: WeightRows, kind: T, **more: Any) -> tuple[Path, FileTensor]:
    out = folder / f"{kind.name}.bin"
    size = num_bytes((rows.num_rows, rows.num_columns), kind)
    with open(out, "wb") as file:
        file.truncate(_padded(size, 32))
    return out, FileTensor("w", "the.weight", (rows,), kind, 0, **more)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> WeightRows:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32)
    return stored(tmp_path_factory.mktemp("large") / "w", "F16", values.astype(np.float16))


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is no file's."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_less_than_two_tensors_are_in_memory(
    tmp_path: Path, large: WeightRows, kind: T, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tensor = placed(tmp_path, large, kind)
    child: list[int] = []
    with Quantizer() as quantizer:
        quantizer.encode("first", np.zeros((1, 256), np.float32), T.Q4_K)  # the child is up
        pid = quantizer._runtime._process.pid if quantizer._runtime else os.getpid()
        idle = anonymous_bytes(pid)
        tracemalloc.start()
        sums = quantizer.write(out, [tensor], lambda _: child.append(anonymous_bytes(pid) - idle))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert sum(size for size, _ in sums["w"]) == out.stat().st_size
    native = kind in (T.Q8_0, T.Q4_K)
    assert (max(child) if native else peak) < TWO_TENSORS / 4
    assert peak < TWO_TENSORS / 4


def test_with_numpy_too(tmp_path: Path, large: WeightRows) -> None:
    short = WeightRows(large.file, large.start, large.dtype, 2_048, large.num_columns)
    out, tensor = placed(tmp_path, short, T.Q6_K)
    tracemalloc.start()
    with Quantizer(native=False) as quantizer:
        quantizer.write(out, [tensor], lambda _: None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < TWO_TENSORS


# ---------------------------------------------------------------- the same bytes, however read


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("kind", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_K, T.Q5_0])
def test_the_bytes_are_those_of_the_tensor_as_a_whole(tmp_path: Path, dtype: str, kind: T) -> None:
    values = np.random.default_rng(1).standard_normal((12, 512)).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32) & 0xFFFF0000
        values, raw = bits.view(np.float32), (bits >> 16).astype(np.uint16)
    else:
        raw = values.astype({"F32": "f4", "F16": "f2", "F64": "f8"}[dtype])
        values = raw.astype(np.float32)
    order = np.arange(12).reshape(3, 2, 2).swapaxes(1, 2).reshape(-1)
    out, tensor = placed(tmp_path, stored(tmp_path / "w", dtype, raw, heads=3), kind)
    with Quantizer() as quantizer:
        quantizer.write(out, [tensor], lambda _: None)
        expected = quantizer.encode("w", values[order], kind)
    assert out.read_bytes()[: expected.nbytes] == expected.tobytes()


def test_what_is_added_is_added(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32).reshape(8, 1)
    for dtype, raw in (("F32", values), ("F16", values.astype(np.float16))):
        rows = stored(tmp_path / "w", dtype, raw, added=1.0)
        out, tensor = placed(tmp_path, rows, T.F32)
        with Quantizer() as quantizer:
            quantizer.write(out, [tensor], lambda _: None)
        assert out.read_bytes()[:32] == (values + 1).tobytes()


@pytest.mark.parametrize(("dtype", "bad"), [("F16", 0x7C00), ("F16", 0xFE00), ("BF16", 0xFF80)])
def test_nan_and_infinity_are_found_in_16_bits(tmp_path: Path, dtype: str, bad: int) -> None:
    values = np.zeros((2, 256), np.uint16)
    rows = stored(tmp_path / "w", dtype, values)
    assert not rows.values(0, 2).any()
    values[1, 7] = bad
    rows = stored(tmp_path / "v", dtype, values)
    rows.values(0, 1)
    with pytest.raises(NotFiniteError):
        rows.values(0, 2)
    for kind in (T.F32, T.Q4_K):
        out, tensor = placed(tmp_path, rows, kind)
        with (
            Quantizer() as quantizer,
            pytest.raises(ModelError, match=r"the\.weight holds NaN or infinite values"),
        ):
            quantizer.write(out, [tensor], lambda _: None)


def test_a_double_beyond_float32_is_infinite(tmp_path: Path) -> None:
    rows = stored(tmp_path / "w", "F64", np.full((1, 32), 1e300))
    with pytest.raises(NotFiniteError):
        rows.values(0, 1)


# ---------------------------------------------------------------- going on, and failing


class Bar(progress.Silence):
    def __init__(self) -> None:
        self.total: float | None = 0.0
        self.done, self.unit = 0.0, ""
        self.fields: dict[str, Any] = {}

    def start(self, key: int, description: str, total: float | None, unit: str) -> None:
        self.total, self.unit = total, unit

    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
        self.done, self.fields = self.done + amount, fields


@pytest.mark.parametrize("type_name", ["f16", "q4_k_m"])
def test_the_bar_counts_weights_and_tells_their_rate(tmp_path: Path, type_name: str) -> None:
    folder, bar = folder_of(tmp_path / "m", LLAMA), Bar()
    with progress.using(bar):
        report = write_gguf(folder, tmp_path / "m.gguf", type_name)
    assert (bar.done, bar.unit) == (bar.total, "weights")
    assert bar.total == report.num_params
    assert math.isfinite(bar.fields["weights_per_second"])


def test_a_disk_that_fills_up_in_the_child_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> tuple[dict[str, Any], bytes]:
        return {"errno": errno.ENOSPC}, b""

    monkeypatch.setattr("mule.generate.llamacpp.Runtime.request", full)
    with pytest.raises(StorageError, match=r"no space|full") as error:
        write_gguf(folder_of(tmp_path / "m", LLAMA), tmp_path / "m.gguf", "q4_k_m")
    assert error.value.hint
    assert not list(tmp_path.glob("*.gguf"))


def test_a_byte_that_is_not_read_back_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = folder_of(tmp_path / "m", LLAMA), Quantizer.write

    def damaged(self: Quantizer, file: Path, tensors: Any, done: Any) -> Any:
        sums = write(self, file, tensors, done)
        with open(file, "r+b") as content:
            content.seek(tensors[3].offset + 5)
            byte = content.read(1)
            content.seek(tensors[3].offset + 5)
            content.write(bytes([byte[0] ^ 1]))
        return sums

    monkeypatch.setattr(Quantizer, "write", damaged)
    with pytest.raises(ModelError, match="was not read back as it was written") as error:
        write_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert "the disk may be failing" in error.value.hint
    assert not (tmp_path / "m.gguf").exists()
