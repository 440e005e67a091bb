"""`mule data check`: is this data fit to train on?"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.data_inputs import open_inputs, read_options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mule.data.check import Part


_REPEATED = frozenset({"leak", "near-leak", "duplicate", "near-duplicate"})  # what mix takes out


def run(
    words: list[str],
    *,
    tokenizer: str | None = None,
    fix_encoding: bool = False,
    out: Path | None = None,
    places: int = 5,
) -> dict[str, Any]:
    """Look at every row of the data `words` name; with `fix_encoding`, of its repaired copies.

    `ok` is False where training on it would be a mistake. The copies go to `out`, or beside each
    path given, in a folder of its name with -fixed. Of each problem so many
    `places` are listed, 1,000 at most.
    """
    from mule.data.check import Settings, check
    from mule.errors import UserError

    if out is not None and not fix_encoding:
        raise UserError(
            "--out has no effect without --fix-encoding", "a check writes nothing; leave it out"
        )
    inputs = open_inputs(words, tokenizer)
    files = parts_of(inputs.paths, inputs.valid, inputs.data.train)
    repaired: dict[str, int] = {}
    if fix_encoding:
        files, repaired = _repair(files, inputs.data.train, out)
    data = inputs.data
    settings = Settings(read_options(data), data.max_seq_length, data.too_long, places)
    result = check(files, inputs.tokenizer, settings)
    for problem in result["problems"]:
        problem["hint"] = problem["hint"].replace("PATH", shlex.join(words))
    return {
        **result,
        "tokenizer": inputs.tokenizer_origin,
        "repaired": repaired if fix_encoding else None,
        "next": _next(
            result, words, sorted({str(Path(file).parent) for file in repaired}), tokenizer
        ),
    }


def parts_of(
    train: Sequence[Path], valid: Sequence[Path], given: Sequence[str]
) -> dict[Part, list[Path]]:
    """The files by what they are for; a test file in a folder that was given counts too."""
    from mule.data.sources import split_files

    files: dict[Part, list[Path]] = {"train": list(train), "valid": list(valid)}
    folders = [Path(path) for path in given if Path(path).is_dir()]
    test = [file for folder in folders for file in split_files(folder, "test")]
    taken = {*files["train"], *files["valid"]}
    files["test"] = [file for file in test if file not in taken]
    return {part: paths for part, paths in files.items() if paths}


def _repair(
    files: Mapping[Part, Sequence[Path]], given: Sequence[str], out: Path | None
) -> tuple[dict[Part, list[Path]], dict[str, int]]:
    """The files to check in place of `files`, and the repaired texts of each copy."""
    from mule.data.check.repair import repair_files

    folders = [Path(path) for path in given if Path(path).is_dir()]
    targets = {f: _copy_of(f, folders, out) for paths in files.values() for f in paths}
    repaired = repair_files(targets)
    if not repaired:
        return {part: list(paths) for part, paths in files.items()}, {}
    return {part: [targets[f] for f in paths] for part, paths in files.items()}, repaired


def _copy_of(file: Path, folders: Sequence[Path], out: Path | None) -> Path:
    for folder in folders:
        if file.is_relative_to(folder):
            base = folder.absolute()
            return (out or base.with_name(f"{base.name}-fixed")) / file.relative_to(folder)
    stem = file.name.split(".", 1)[0]
    return (out or file.with_name(f"{stem}-fixed")) / file.name


def _next(
    result: Mapping[str, Any], words: Sequence[str], folders: Sequence[str], tokenizer: str | None
) -> str:
    """The fix that comes first, or a look at what the model will see."""
    problems = result["problems"]
    paths = list(folders) or list(words)
    named = ["--tokenizer", tokenizer] if tokenizer else []
    if not folders and any(problem["code"] == "mojibake" for problem in problems):
        return shlex.join(["mule", "data", "check", *paths, *named, "--fix-encoding"])
    errors = {problem["code"] for problem in problems if problem["severity"] == "error"}
    if errors and errors <= _REPEATED:
        return shlex.join(["mule", "data", "mix", *paths, "--out", "FOLDER"])
    verb = "preview" if result["ok"] else "check"
    return shlex.join(["mule", "data", verb, *paths, *named])
