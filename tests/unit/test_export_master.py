"""The kept file of 16 bits, and further types made from a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from mule import progress
from mule.errors import ModelError, StorageError
from mule.export.from_gguf import write_from_gguf
from mule.export.gguf import write_gguf
from mule.export.imatrix import importance_of
from mule.export.imatrix_file import ImportanceMatrix, write_imatrix
from mule.export.master import choose_master
from mule.export.mixtures import TYPES
from mule.export.series import Target, write_series, write_series_from
from tests.unit.test_imatrix import LLAMA, PHI3, WORDS, folder_of

ABOUT = {"name": "m", "license": "mit", "quantized_by": "Mule"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("master") / "llama", LLAMA)


def changed(folder: Path, out: Path, how: Any) -> Path:
    """A copy of a model folder whose weights went through `how`."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    state = {name: how(name, tensor) for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
    return out


def large(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1e8 if "down_proj" in name else tensor


# ---------------------------------------------------------------- which type


@pytest.mark.parametrize(
    ("how", "type_name", "why"),
    [
        (lambda _, t: t.bfloat16(), "bf16", "the weights are bf16"),
        (lambda _, t: t.half(), "f16", "the weights are f16"),
        (lambda _, t: t.bfloat16().float(), "bf16", "every weight is a bf16 number"),
        (lambda _, t: t.half().float(), "f16", "every weight is an f16 number"),
        (lambda _, t: t, "f16", "rounds the weights to 11 bits"),
        (large, "bf16", r"f16 ends at 65504: the bf16 master rounds them to 8 bits"),
        (lambda n, t: t.half() if "up" in n else t.bfloat16().half(), "f16", "weights are f16"),
        (
            lambda n, t: t.half() if "up" in n else t.bfloat16(),
            "f16",
            "rounds the weights|f16 number",
        ),
    ],
)
def test_the_master_is_what_holds_the_weights(
    llama: Path, tmp_path: Path, how: Any, type_name: str, why: str
) -> None:
    master = choose_master(changed(llama, tmp_path / "m", how))
    assert master.type_name == type_name
    assert any(part in master.why for part in why.split("|"))


def test_weights_of_nan_make_no_master(llama: Path, tmp_path: Path) -> None:
    def broken(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * float("nan") if "up_proj" in name else tensor

    with pytest.raises(ModelError, match=r"up_proj\.weight holds NaN or infinite values"):
        choose_master(changed(llama, tmp_path / "m", broken))


# ---------------------------------------------------------------- bytes


QUICK = ("q4_k_m", "iq4_xs", "q2_k")
OTHERS = tuple(sorted(set(TYPES) - {"f32", "f16", "bf16", *QUICK}))


@pytest.mark.parametrize(
    ("raw", "types"),
    [
        pytest.param(LLAMA, QUICK, marks=pytest.mark.slow),
        pytest.param(LLAMA, OTHERS, marks=pytest.mark.slow),
        pytest.param(PHI3, QUICK + OTHERS, marks=pytest.mark.slow),
    ],
    ids=["llama", "llama, all", "phi3"],
)
def test_every_byte_is_that_of_a_direct_export(
    tmp_path: Path, raw: dict[str, Any], types: Sequence[str]
) -> None:
    folder = changed(folder_of(tmp_path / "x", raw), tmp_path / "m", lambda _, t: t.bfloat16())
    found = importance_of(folder, [WORDS] * 40, "w", special=False)
    write_gguf(folder, tmp_path / "m-BF16.gguf", "bf16", metadata=ABOUT)
    for type_name in types:
        for importance in (None, found):
            direct, made = tmp_path / "direct.gguf", tmp_path / "made.gguf"
            write_gguf(folder, direct, type_name, metadata=ABOUT, importance=importance)
            write_from_gguf(tmp_path / "m-BF16.gguf", made, type_name, importance=importance)
            assert made.read_bytes() == direct.read_bytes(), type_name


def test_16_bits_are_made_from_an_f32_file(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "m-F32.gguf", "f32", metadata=ABOUT)
    for type_name in ("f16", "bf16"):
        direct, made = tmp_path / "direct.gguf", tmp_path / "made.gguf"
        write_gguf(llama, direct, type_name, metadata=ABOUT)
        write_from_gguf(tmp_path / "m-F32.gguf", made, type_name)
        assert made.read_bytes() == direct.read_bytes()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("quantised", ["q8_0", "q4_k_m"])
def test_a_quantised_file_is_no_master(llama: Path, tmp_path: Path, quantised: str) -> None:
    write_gguf(llama, tmp_path / "m.gguf", quantised)
    with pytest.raises(ModelError) as error:
        write_from_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf", "q4_k_m")
    assert "tensors are quantised already" in error.value.message
    assert "what is made from a quantised file has both errors" in error.value.message
    assert "mule export RUN --types TYPE" in error.value.hint


def test_full_types_of_a_rounded_file_are_refused(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "m.gguf", "f16")
    with pytest.raises(ModelError, match="bf16 made from that is no more exact") as error:
        write_from_gguf(tmp_path / "m.gguf", tmp_path / "n.gguf", "bf16")
    assert "mule export RUN --types bf16" in error.value.hint


def test_an_importance_matrix_is_no_master(llama: Path, tmp_path: Path) -> None:
    matrix = ImportanceMatrix({"w": np.ones(4, np.float32)}, {"w": 8}, "words", 512)
    write_imatrix(tmp_path / "imatrix.gguf", matrix)
    with pytest.raises(ModelError, match="of type 'imatrix', not a model"):
        write_from_gguf(tmp_path / "imatrix.gguf", tmp_path / "n.gguf", "q4_k_m")


def patched(file: Path, out: Path, old: bytes, new: bytes) -> Path:
    content = file.read_bytes()
    assert content.count(old) and len(old) == len(new)
    out.write_bytes(content.replace(old, new))
    return out


def test_an_unknown_architecture_is_refused(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "m.gguf", "f16")
    other = patched(
        tmp_path / "m.gguf",
        tmp_path / "o.gguf",
        b"\x05\0\0\0\0\0\0\0llama",
        b"\x05\0\0\0\0\0\0\0mamba",
    )
    with pytest.raises(ModelError, match="the architecture 'mamba'; Mule knows the mixtures of"):
        write_from_gguf(other, tmp_path / "n.gguf", "q4_k_m")


def test_a_file_without_its_numbers_is_refused(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "m.gguf", "f16")
    other = patched(
        tmp_path / "m.gguf", tmp_path / "o.gguf", b"llama.block_count", b"llama.block_cOunt"
    )
    with pytest.raises(ModelError, match=r"llama\.block_count is None, not a number from 1 on"):
        write_from_gguf(other, tmp_path / "n.gguf", "q4_k_m")


# ---------------------------------------------------------------- several types


def types_of(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.gguf"))


def test_a_master_is_kept_beside_quantised_files(llama: Path, tmp_path: Path) -> None:
    told: list[str] = []

    class Sink(progress.Silence):
        def note(self, text: str, level: str) -> None:
            told.append(text)

    with progress.using(Sink()):
        series = write_series(llama, Target(tmp_path, "m"), ["q8_0", "q4_k_m"], metadata=ABOUT)
    assert types_of(tmp_path) == ["m-F16.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]
    assert [report.type for report in series.files] == ["q8_0", "q4_k_m"]
    assert series.master is not None and series.master.type == "f16"
    assert any("m-F16.gguf is kept: the f16 master rounds" in line for line in told)
    write_from_gguf(tmp_path / "m-F16.gguf", tmp_path / "again.gguf", "q4_k_m")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m-Q4_K_M.gguf").read_bytes()


@pytest.mark.parametrize(
    ("types", "keep", "files", "master"),
    [
        (["q8_0", "f32"], True, ["m-F32.gguf", "m-Q8_0.gguf"], "f32"),
        (["bf16", "q8_0"], True, ["m-BF16.gguf", "m-Q8_0.gguf"], "bf16"),
        (["q8_0"], False, ["m-Q8_0.gguf"], None),
        (["f16"], True, ["m-F16.gguf"], None),
    ],
)
def test_the_master_is_one_that_was_asked_for(
    llama: Path, tmp_path: Path, types: list[str], keep: bool, files: list[str], master: str | None
) -> None:
    series = write_series(llama, Target(tmp_path, "m"), types, metadata=ABOUT, keep_master=keep)
    assert types_of(tmp_path) == files
    assert (series.master and series.master.type) == master
    assert [report.type for report in series.files] == types


def test_the_matrix_lies_beside_what_it_weighed(llama: Path, tmp_path: Path) -> None:
    found = importance_of(llama, [WORDS] * 40, "w", special=False)
    target = Target(tmp_path, "m", found)
    write_series(llama, target, ["q8_0", "q3_k_m"], metadata=ABOUT)
    assert "imatrix.gguf" in types_of(tmp_path)
    fields = {
        name: GGUFReader(tmp_path / name).get_field("quantize.imatrix.file")
        for name in types_of(tmp_path)
    }
    assert {name for name, field in fields.items() if field} == {"m-Q3_K_M.gguf"}
    write_series_from(tmp_path / "m-F16.gguf", Target(tmp_path, "n", found), ["q3_k_m"])
    assert (tmp_path / "n-Q3_K_M.gguf").read_bytes() == (tmp_path / "m-Q3_K_M.gguf").read_bytes()


def test_room_for_all_files_is_asked_for_first(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    with pytest.raises(StorageError, match=r"the 3 GGUF files \(q8_0, q4_k_m, f16\) needs"):
        write_series(llama, Target(tmp_path, "m"), ["q8_0", "q4_k_m"], metadata=ABOUT)
    assert not types_of(tmp_path)
