"""Which files a folder means, by the names and layouts people publish."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mule.data.sources.paths import expand, is_data_file, split_files
from mule.errors import DataError


def _make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def _names(files: list[Path], folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in files]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "b.jsonl", "valid.jsonl"], ["train.jsonl"]),
        (["data_train.csv.gz", "data_test.csv.gz"], ["data_train.csv.gz"]),
        (["wiki.train.tokens", "wiki.valid.tokens"], ["wiki.train.tokens"]),
        (["c4-train.00000-of-01024.json.gz", "c4.json"], ["c4-train.00000-of-01024.json.gz"]),
        (["a.txt", "b.md", "dev.jsonl", "test-1.jsonl", "x_eval.csv"], ["a.txt", "b.md"]),
        (["trainer.jsonl", "Smith_Test_1911.txt"], ["Smith_Test_1911.txt", "trainer.jsonl"]),
        (["a.jsonl.zst", "LICENSE.txt", "Readme.md", ".b.txt", "c.bin"], ["a.jsonl.zst"]),
        (["a.parquet", "dataset_infos.json", "CHANGELOG.md"], ["a.parquet"]),
        (["main/train-0-of-1.parquet", "main/test-0-of-1.parquet"], ["main/train-0-of-1.parquet"]),
        (["README.md", "data/train-00000.parquet", "img/a.png"], ["data/train-00000.parquet"]),
        (["main/a.jsonl", "socratic/a.jsonl"], ["main/a.jsonl"]),
        (["en/a.jsonl", "img/a.png"], ["en/a.jsonl"]),
        (["train/b.txt", "train/a.txt", "valid/c.txt"], ["train/a.txt", "train/b.txt"]),
        (["data/train/a.txt"], []),
    ],
)
def test_folders(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    _make(tmp_path, *names)
    if not expected:
        with pytest.raises(DataError, match="no data file in this folder"):
            expand([tmp_path])
        return
    assert _names(expand([tmp_path]), tmp_path) == expected


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "val", "eval"])
def test_every_name_of_a_valid_split(tmp_path: Path, name: str) -> None:
    _make(tmp_path, f"{name}.jsonl", "train.jsonl", "main/test.jsonl", "test.jsonl")
    assert _names(split_files(tmp_path, "valid"), tmp_path) == [f"{name}.jsonl"]
    assert _names(split_files(tmp_path, "test"), tmp_path) == ["test.jsonl"]
    assert split_files(tmp_path / "main", "valid") == []


def test_split_files_of_other_layouts(tmp_path: Path) -> None:
    _make(tmp_path, "hub/data/validation-0-of-2.parquet", "hub/data/validation-1-of-2.parquet")
    _make(tmp_path, "folders/dev/a.txt", "folders/train/b.txt")
    assert len(split_files(tmp_path / "hub", "valid")) == 2
    assert _names(split_files(tmp_path / "folders", "valid"), tmp_path) == ["folders/dev/a.txt"]


def test_only_other_splits(tmp_path: Path) -> None:
    _make(tmp_path, "test.jsonl")
    with pytest.raises(DataError, match=r"only files of other splits: test\.jsonl") as caught:
        expand([tmp_path])
    assert "rename the training file to train.jsonl" in caught.value.hint


def test_several_folders_with_data_are_named(tmp_path: Path) -> None:
    _make(tmp_path, "de/a.jsonl", "en/a.jsonl")
    with pytest.raises(DataError, match="no data file in this folder") as caught:
        expand([tmp_path])
    assert caught.value.hint == "give one of its folders: de, en"


def test_the_same_file_under_two_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert expand(["a.jsonl", "./a.jsonl", tmp_path, f"{tmp_path}/../{tmp_path.name}/*"]) == [
        Path("a.jsonl")
    ]


def test_a_misspelt_local_path_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked of the network: the tests have none."""
    monkeypatch.chdir(tmp_path)
    _make(tmp_path, "data/train.jsonl")
    for path, hint in (
        ("data/trian", "look in data|did you mean"),
        ("other/train.jsonl", "the folder other does not exist either"),
        ("./org/name", "does not exist either"),
        ("a/b/c", "does not exist either"),
    ):
        with pytest.raises(DataError, match="no such file or folder") as caught:
            expand([path])
        assert any(part in caught.value.hint for part in hint.split("|"))
    assert os.listdir(tmp_path) == ["data"]


def test_names_of_data_files() -> None:
    assert all(is_data_file(f"a{s}") for s in (".jsonl", ".CSV", ".tokens.zst", ".parquet.gz"))
    assert not any(is_data_file(name) for name in ("a.gz", "a", "a.bin", "a.gz.jsonlx", ".gz"))
