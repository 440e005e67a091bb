"""What data there is to look at: files and folders, recipes, runs, and tokenizers to read with."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mule
from mule.run import RUNS, list_runs

_MAX_SEEN = 20_000  # entries looked at: a page must not wait for a whole disk
_MAX_LISTED = 300  # of each kind
_MAX_DEPTH = 5
_PASSED_OVER = frozenset({"node_modules", "__pycache__", "site-packages", "venv", "campaigns"})
_CLONE = Path(mule.__file__).resolve().parents[1]
_OF_A_CLONE = frozenset({"bench", "docs", "mule", "site", "tests", "tools"})  # in Mule's own
_PROSE = (".md",)  # data too where it is named, but most often documentation
_NO_DATA = re.compile(
    r"(requirements|constraints|readme|licen[cs]e|notice|copying|changelog|cmakelists|robots)[^/]*"
    r"|(package|tsconfig|index|mix|results?|vocab|merges)([-_.][^/]*)?\.(json|txt)"
    r"|[^/]*(config|tokenizer|special_tokens_map|manifest|lock|lineage|facts)[^/]*\.json",
    re.IGNORECASE,
)
_RECIPE = re.compile(r"^data\s*:", re.MULTILINE)
_RESOLVED = "resolved.yaml"  # of a run, beside the recipe that it was begun with
_RECIPE_BYTES = 64 * 1024


def run(root: Path = Path(), *, runs: Path = RUNS) -> dict[str, Any]:
    """Data below `root`, what trains on it, and what reads it; `more` where not all was looked at.

    Links are not followed out of `root`; what came with Mule itself, in a clone, is passed over.
    """
    from mule.config.presets import came_with_mule
    from mule.data.sources.paths import is_data_file, split_files

    walked = _Walk(root, runs)
    of_mule = came_with_mule()
    files: list[Path] = []
    folders: list[Path] = []
    recipes: list[Path] = []
    tokenizers: list[Path] = []
    for folder, names in walked:
        if "tokenizer.json" in names:  # a model's folder: its files are no data
            tokenizers.append(folder)
            continue
        own = [folder / name for name in names if is_data_file(name) and _may_be_data(name)]
        files += own
        if own and split_files(folder, "train") and split_files(folder, "valid"):
            folders.append(folder)
        of_here = (folder / name for name in names)
        recipes += [f for f in of_here if _is_recipe(f) and f.resolve() not in of_mule]
    names = sorted(run.name for run in list_runs(runs))
    has_tokenizer = [n for n in names if (runs / n / "tokenizer" / "tokenizer.json").is_file()]
    return {
        "folders": [str(folder) for folder in folders[:_MAX_LISTED]],
        "files": [_facts(file) for file in files[:_MAX_LISTED]],
        "recipes": [str(recipe) for recipe in recipes[:_MAX_LISTED]],
        "runs": names,
        "tokenizers": [*(str(runs / n) for n in has_tokenizer), *map(str, tokenizers)],
        "more": walked.is_cut or len(files) > _MAX_LISTED,
        "next": "mule data check PATH",
    }


@dataclass
class _Walk:
    """Folders with the names of their files, the upper ones first, in order of their names."""

    root: Path
    runs: Path
    is_cut: bool = False

    def __iter__(self) -> Iterator[tuple[Path, list[str]]]:
        num_seen = 0
        for text, folders, names in os.walk(self.root):
            folder = Path(text)
            depth = len(folder.relative_to(self.root).parts)
            num_seen += len(folders) + len(names)
            folders[:] = sorted(f for f in folders if self._enters(folder / f, depth))
            yield folder, sorted(n for n in names if self._shows(folder / n))
            if num_seen > _MAX_SEEN:
                self.is_cut = True
                return

    def _enters(self, folder: Path, depth: int) -> bool:
        if folder.name.startswith(".") or folder.name in _PASSED_OVER or folder == self.runs:
            return False
        if depth == 0 and folder.name in _OF_A_CLONE and folder.resolve().parent == _CLONE:
            return False
        if depth + 1 > _MAX_DEPTH:
            self.is_cut = True
            return False
        return not (folder / "pyvenv.cfg").is_file()

    def _shows(self, file: Path) -> bool:
        """Not what is hidden, leads out of the folder, or has a name that is no text."""
        if file.name.startswith(".") or any("\ud800" <= c <= "\udfff" for c in file.name):
            return False
        return not file.is_symlink() or file.resolve().is_relative_to(self.root.resolve())


def _may_be_data(name: str) -> bool:
    return not name.lower().endswith(_PROSE) and not _NO_DATA.fullmatch(name)


def _is_recipe(file: Path) -> bool:
    """A YAML file with a section data; whether it is right is told when it is used."""
    if file.suffix not in (".yaml", ".yml") or file.name == _RESOLVED or not file.is_file():
        return False
    if file.stat().st_size > _RECIPE_BYTES:
        return False
    return bool(_RECIPE.search(file.read_text(encoding="utf-8", errors="replace")))


def _facts(file: Path) -> dict[str, Any]:
    about = file.lstat()
    return {"file": str(file), "size_bytes": about.st_size, "changed_at": about.st_mtime}
