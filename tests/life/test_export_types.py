"""`mule export`: the kept master, further types made from it, and importance matrices."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from tests.life.test_cli_life import PRETRAIN, SHAPE, call
from tests.life.tiny_life import Forker, write_data

WIDE = SHAPE.replace("hidden_size: 64", "hidden_size: 256").replace("size: 96", "size: 256")
FOLDER = "exports/wide"


@pytest.fixture(scope="module")
def home(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    write_data(folder)
    recipe = PRETRAIN.replace(SHAPE, WIDE).replace("steps: 40", "steps: 6")
    (folder / "wide.yaml").write_text(recipe)
    code, found = call(forker, folder, "train wide.yaml --json")
    assert code == 0, found
    return folder


@pytest.fixture(scope="module")
def exported(forker: Forker, home: Path) -> dict[str, Any]:
    code, found = call(forker, home, "export wide --types q8_0,q4_k_m --imatrix --json")
    assert code == 0, found
    return found


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.gguf")}


def entry_of(file: Path, key: str) -> Any:
    field = GGUFReader(file).get_field(key)
    return field.contents() if field is not None else None


def test_the_master_and_the_matrix_are_kept(home: Path, exported: dict[str, Any]) -> None:
    files = {"wide-Q8_0.gguf", "wide-Q4_K_M.gguf", "imatrix.gguf", "wide-F16.gguf"}
    assert names(home / FOLDER) == files
    assert [file["type"] for file in exported["files"]] == ["q8_0", "q4_k_m"]
    assert exported["master"]["file"] == f"{FOLDER}/wide-F16.gguf"
    assert exported["modelfile"] == f"{FOLDER}/Modelfile"
    record = json.loads((home / FOLDER / "export.json").read_text())
    by_name = {entry["file"]: entry for entry in record["files"]}
    assert set(by_name) == files - {"imatrix.gguf"}
    assert by_name["wide-Q4_K_M.gguf"]["made_from"] == "wide-F16.gguf"
    matrix = record["imatrix"]
    assert matrix["file"] == "imatrix.gguf" and matrix["num_matrices"] == 14
    assert "rows of wide; " in matrix["dataset"] and "sha256 " in matrix["dataset"]
    assert "imatrix.gguf" in (home / FOLDER / "SHA256SUMS").read_text()
    weighed = entry_of(home / FOLDER / "wide-Q4_K_M.gguf", "quantize.imatrix.dataset")
    assert weighed == matrix["dataset"]
    assert entry_of(home / FOLDER / "wide-Q8_0.gguf", "quantize.imatrix.dataset") is None


def test_a_further_type_is_made_from_the_master(
    forker: Forker, home: Path, exported: dict[str, Any]
) -> None:
    line = f"export {FOLDER}/wide-F16.gguf --types q4_k_m,q3_k_m --out again --imatrix "
    code, found = call(forker, home, f"{line}{FOLDER}/imatrix.gguf --json")
    assert code == 0, found
    assert names(home / "again") == {"wide-Q4_K_M.gguf", "wide-Q3_K_M.gguf", "imatrix.gguf"}
    first, second = (
        hashlib.sha256((home / folder / "wide-Q4_K_M.gguf").read_bytes()).hexdigest()
        for folder in (FOLDER, "again")
    )
    assert first == second == found["files"][0]["sha256"]
    assert found["next"].startswith("mule verify again/wide-Q3_K_M.gguf --against ")
    code, found = call(forker, home, f"export {FOLDER}/wide-F16.gguf --types q6_k --imatrix --json")
    assert code == 0, found
    assert found["next"] == f"mule verify {FOLDER}"
    record = json.loads((home / FOLDER / "export.json").read_text())
    assert {"wide-Q6_K.gguf", "wide-Q8_0.gguf"} <= {entry["file"] for entry in record["files"]}


def test_the_rows_may_come_from_a_file(
    forker: Forker, home: Path, exported: dict[str, Any]
) -> None:
    line = "export wide --types q4_k_m --no-master --out other --imatrix text.txt --json"
    code, found = call(forker, home, line)
    assert code == 0, found
    assert names(home / "other") == {"wide-Q4_K_M.gguf", "imatrix.gguf"}
    assert found["master"] is None and found["imatrix"]["dataset"].startswith("text.txt; ")


@pytest.mark.parametrize(
    ("line", "error", "hint"),
    [
        ("wide --types q8_0 --imatrix", "--imatrix has no effect on q8_0", "--types q4_k_m"),
        ("wide --types mxfp4", "mxfp4 is for models with experts", "q4_k_m"),
        ("wide --types q4_k_m,q4_k_m", "q4_k_m is listed twice", "--types q4_k_m"),
        ("wide --types q4_k_m --imatrix no.jsonl", "no.jsonl: no such file", "--imatrix FILE"),
        (
            f"{FOLDER}/wide-Q8_0.gguf --types q4_k_m",
            "tensors are quantised already",
            "mule export RUN --types",
        ),
        (f"{FOLDER}/wide-F16.gguf", "is a GGUF file already", "--types q4_k_m"),
        (f"{FOLDER}/wide-F16.gguf --types f16", "is the f16 file itself", "other types"),
        (f"{FOLDER}/wide-F16.gguf --types q8_0 --no-master", "is the master", "leave it out"),
        (f"{FOLDER}/wide-F16.gguf --types q8_0 --author me", "--author has no effect", "RUN"),
        (f"{FOLDER}/none.gguf --types q8_0", "no such file", ".gguf"),
    ],
)
def test_what_cannot_be_is_refused(
    forker: Forker, home: Path, exported: dict[str, Any], line: str, error: str, hint: str
) -> None:
    before = names(home / FOLDER)
    code, found = call(forker, home, f"export {line} --json")
    assert code == 2, found
    assert error in found["error"] and hint in found["hint"]
    assert names(home / FOLDER) == before


def test_a_file_that_no_record_knows_needs_a_matrix_of_its_own(
    forker: Forker, home: Path, exported: dict[str, Any]
) -> None:
    (home / "alone").mkdir(exist_ok=True)
    (home / "alone" / "m-F16.gguf").write_bytes((home / FOLDER / "wide-F16.gguf").read_bytes())
    line = "export alone/m-F16.gguf --types q4_k_m --json"
    code, found = call(forker, home, f"{line} --imatrix")
    assert code == 2 and "nothing says where alone/m-F16.gguf was written from" in found["error"]
    assert "--imatrix imatrix.gguf" in found["hint"]
    code, found = call(forker, home, line)
    assert code == 0 and names(home / "alone") == {"m-F16.gguf", "m-Q4_K_M.gguf"}


def test_a_run_whose_data_is_gone_needs_a_file(
    forker: Forker, home: Path, exported: dict[str, Any]
) -> None:
    (home / "text.txt").rename(home / "moved.txt")
    code, found = call(forker, home, "export wide --types q4_k_m --imatrix --json")
    (home / "moved.txt").rename(home / "text.txt")
    assert code == 2 and "the data of runs/wide cannot be read: " in found["error"]
    assert "text.txt" in found["error"] and "--imatrix FILE.jsonl" in found["hint"]
