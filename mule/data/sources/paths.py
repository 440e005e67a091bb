"""Which files a data path means: a file, a folder, or a pattern with * in it."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Sequence
from pathlib import Path

from mule.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt", ".md")


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The data files of `paths`, each once. Of a folder: its train file(s), else every data file.

    Raises DataError when a path names no data file.
    """
    found = [file for path in paths for file in _files_of(path)]
    return list(dict.fromkeys(found))


def split_files(folder: str | Path, split: str) -> list[Path]:
    """The files of a folder named for a split: train.jsonl, train-00000-of-00001.parquet..."""
    files = _data_files(Path(folder))
    return [f for f in files if f.stem == split or f.stem.startswith(f"{split}-")]


def _files_of(path: str | Path) -> list[Path]:
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        return _files_in(given)
    if given.exists():
        raise DataError(given, None, "neither a file nor a folder", "give a regular file")
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if files := [match for match in matches if match.is_file()]:
            return files
        raise DataError(path, None, "no file matches this pattern", "check the pattern and folder")
    raise DataError(given, None, "no such file or folder", _near_name(given))


def _files_in(folder: Path) -> list[Path]:
    if files := split_files(folder, "train") or _data_files(folder):
        return files
    inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    raise DataError(
        folder,
        None,
        f"no data file in this folder ({', '.join(SUFFIXES)})",
        f"give one of its folders: {', '.join(inside[:5])}" if inside else "put train.jsonl in it",
    )


def _data_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix in SUFFIXES
        and file.is_file()
        and not file.name.lower().startswith((".", "readme", "license"))
    ]


def _near_name(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else f"look in {folder}"
