"""Which files a data path means: a file, a folder, a pattern with * in it, or a hub dataset."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mule.data.sources.files import COMPRESSIONS, SUFFIXES, is_data_file
from mule.errors import DataError

__all__ = ["COMPRESSIONS", "SUFFIXES", "expand", "is_data_file", "is_hub_id", "split_files"]

_SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "dev", "val", "eval"),
    "test": ("test",),
}
_USUAL_FOLDERS = ("main", "data", "default")
_NOT_DATA = (
    ".",
    "readme",
    "license",
    "dataset_card",
    "licence",
    "notice",
    "copying",
    "citation",
    "changelog",
)
_HUB_RECORDS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SHARD = re.compile(r"\d+|of")  # the words of train-00000-of-00001


def expand(paths: Sequence[str | Path]) -> list[Path]:
    """The data files of `paths`, each once.

    Of a folder: its train files, else all but those of other splits. Raises DataError when a path
    names no data file.
    """
    found: dict[str, Path] = {}
    for path in paths:
        for file in _files_of(path):
            found.setdefault(os.path.realpath(file), file)
    return list(found.values())


def split_files(folder: str | Path, split: str) -> list[Path]:
    """The files of a folder named for `split`: train, valid or test.

    train.jsonl, train-00000-of-00001.parquet, wiki.train.tokens, or a folder train/.
    """
    inside = _data_folder(Path(folder))
    if files := [file for file in _data_files(inside) if _split_of(file) == split]:
        return files
    names = _SPLITS.get(split, (split,))
    folders = [entry for entry in _folders(inside) if entry.name.lower() in names]
    return [file for entry in folders for file in _data_files(entry)]


def _files_of(path: str | Path) -> list[Path]:
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        return _files_in(given)
    if given.exists():
        raise DataError(given, None, "neither a file nor a folder", "give a regular file")
    if is_hub_id(str(path)):
        from mule.data.sources import hub

        fetched = hub.fetch(str(path))
        return [fetched] if fetched.is_file() else _files_in(fetched)
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if files := [match for match in matches if match.is_file()]:
            return files
        raise DataError(path, None, "no file matches this pattern", "check the pattern and folder")
    if given.is_symlink():
        raise DataError(
            given,
            None,
            "no such file or folder: a symbolic link that leads nowhere",
            "give the path of the real file",
        )
    raise DataError(given, None, "no such file or folder", _near_name(given))


# ---------------------------------------------------------------- folders


def _files_in(folder: Path) -> list[Path]:
    """What to train on in `folder`. Raises DataError when that is nothing."""
    if files := split_files(folder, "train"):
        return files
    found = _data_files(_data_folder(folder))
    if files := [file for file in found if _split_of(file) is None]:
        return files
    if found:
        raise DataError(
            folder,
            None,
            f"only files of other splits: {', '.join(file.name for file in found[:5])}",
            "rename the training file to train.jsonl, or give the files by name",
        )
    inside = [entry.name for entry in _folders(folder)]
    raise DataError(
        folder,
        None,
        f"no data file in this folder ({', '.join(SUFFIXES)})",
        f"give one of its folders: {', '.join(inside[:5])}" if inside else "put train.jsonl in it",
    )


def _data_folder(folder: Path) -> Path:
    """`folder`, or where it holds no data itself, the one folder inside that does."""
    if _data_files(folder):
        return folder
    inside = [entry for entry in _folders(folder) if _data_files(entry)]
    names = {name for split in _SPLITS.values() for name in split}
    if any(entry.name.lower() in names for entry in inside):
        return folder
    usual = [entry for entry in inside if entry.name in _USUAL_FOLDERS]
    for choice in (usual, inside):
        if len(choice) == 1:
            return choice[0]
    return folder


def _folders(folder: Path) -> list[Path]:
    return sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )


def _data_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if is_data_file(file)
        and file.is_file()
        and not file.name.lower().startswith(_NOT_DATA)
        and file.name not in _HUB_RECORDS
    ]


def _split_of(file: Path) -> str | None:
    """The split a file is named for, by the first or the last word of its name."""
    name = file.name
    if name.lower().endswith(COMPRESSIONS):
        name = Path(name).stem
    words = [word for word in re.split(r"[-_.]", Path(name).stem) if not _SHARD.fullmatch(word)]
    for split, names in _SPLITS.items():
        if words and (words[0] in names or words[-1] in names):
            return split
    return None


# ---------------------------------------------------------------- hub ids and near names


def is_hub_id(text: str) -> bool:
    """Whether a data path is fetched from the hub.

    hf://datasets/ORG/NAME, or ORG/NAME where no folder ORG is here and NAME is no data file.
    """
    if re.match(r"hf:/{1,2}", text):
        return True
    match = re.fullmatch(r"(\w[\w.-]*)/(\w[\w.-]*)(@[\w./-]+)?", text)
    return match is not None and not is_data_file(match[2]) and not Path(match[1]).exists()


def _near_name(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    names = [entry.name for entry in folder.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else f"look in {folder}"
