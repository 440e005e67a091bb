"""The catalogue of published setups: one file each below published/, every value with its source."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mule.compare.derive import completed
from mule.compare.parameters import BY_KEY
from mule.compare.sourced import Setup, Value
from mule.config.hints import near
from mule.config.reader import YamlProblem, parse_yaml, plain
from mule.errors import ConfigError, UserError

PUBLISHED = Path(__file__).parent / "published"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Entry(_Strict):
    """A value: `from` names the sources of the file that it is from."""

    is_: float | int | str = Field(alias="is")
    from_: str | list[str] = Field(alias="from")
    note: str = ""
    checked: bool = True
    rests_on: str = ""


class _Hearsay(_Strict):
    said: str
    so: str


class _File(_Strict):
    title: str
    kind: Literal["pretrain", "fine-tune", "adapter"]
    described: bool = False  # by a user, and no reference for others
    sources: dict[str, str]
    values: dict[str, _Entry]
    hearsay: list[_Hearsay] = []


@functools.cache
def catalogue() -> Mapping[str, Setup]:
    """Every setup by its name, completed by what follows from its values."""
    return {file.stem: completed(read_entry(file)) for file in sorted(PUBLISHED.glob("*.yaml"))}


def named(name: str) -> Setup:
    """The setup called `name`; UserError names the nearest."""
    if name in catalogue():
        return catalogue()[name]
    match = near(name, list(catalogue()))
    hint = f"did you mean `{match}`? " if match else ""
    raise UserError(
        f"`{name}` is no recipe, no run, and not in the catalogue of published setups",
        f"{hint}`mule compare --list` shows the catalogue",
    )


def read_entry(file: Path) -> Setup:
    """One file of the catalogue; ConfigError when a value is unknown or has no source."""
    try:
        node = parse_yaml(file.read_text(encoding="utf-8"))
        found = _File.model_validate(plain(node) if node is not None else {})
    except YamlProblem as problem:
        raise ConfigError([f"{file}:{problem.line}: {problem.message}"], _HINT) from None
    except ValidationError as error:
        wrong = [f"{file}: {_place(detail)}: {detail['msg']}" for detail in error.errors()]
        raise ConfigError(wrong, _HINT) from None
    problems = [f"{file}: {line}" for line in _problems(found)]
    if problems:
        raise ConfigError(problems, _HINT)
    return Setup(
        name=file.stem,
        title=found.title,
        kind=found.kind,
        origin="described" if found.described else "published",
        values={key: _value(entry, found.sources) for key, entry in found.values.items()},
        hearsay=tuple((line.said, line.so) for line in found.hearsay),
    )


_HINT = "docs/compare.md describes the files of the catalogue"


def _problems(found: _File) -> list[str]:
    wrong = []
    for key, entry in found.values.items():
        if key not in BY_KEY:
            wrong.append(f"{key}: not a parameter; did you mean `{near(key, list(BY_KEY))}`?")
        for source in _names(entry):
            if source not in found.sources:
                wrong.append(f"{key}: its source `{source}` is not among the file's sources")
        if entry.checked == bool(entry.rests_on):
            wrong.append(f"{key}: what was not checked says what it rests on, and only that")
    used = {name for entry in found.values.values() for name in _names(entry)}
    wrong += [f"the source `{name}` is of no value" for name in found.sources.keys() - used]
    return wrong


def _value(entry: _Entry, sources: Mapping[str, str]) -> Value:
    source = "; ".join(sources[name] for name in _names(entry))
    return Value(entry.is_, source, entry.note, entry.checked, entry.rests_on)


def _names(entry: _Entry) -> list[str]:
    return [entry.from_] if isinstance(entry.from_, str) else entry.from_


def _place(detail: Any) -> str:
    return ".".join(str(part) for part in detail["loc"])
