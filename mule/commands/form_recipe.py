"""A recipe made of what was typed into the form of the page Start: checked, planned, saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.commands.form import NAME, NOT_IN_A_FORM, RECIPES, as_typed, free_name, read_field
from mule.errors import ConfigError, MuleError, UserError
from mule.run import RUNS

if TYPE_CHECKING:
    from mule.config.layers import Layer, Setting
    from mule.config.schema import Recipe

PATHS = ("model.path", "tokenizer.path", "data.train", "data.valid", "adapter.warm_start")
_ASSUMED_FROM = ("model.", "tokenizer.", "data.", "adapter.kind", "train.device")
_NAME_BYTES = 255  # of a part of a path, on every file system here
_FORM, _ASSUMED = "form", "assumed"
_PLACE = re.compile(rf"(?:{_FORM}|{_ASSUMED}): (?P<rest>(?P<key>[a-z][\w.]*).*)", re.DOTALL)
_HEADER = "# Made in the browser by `mule ui`. Every key: docs/configuration.md\n"

Values = Mapping[str, Any]  # dotted key -> what was typed


@dataclass
class Draft:
    """A recipe in the making: `problems` and what is `missing`, each of a key."""

    name: str
    file: Path
    text: str = ""
    words: list[str] = field(default_factory=list)  # the same settings as `mule plan` takes them
    recipe: Recipe | None = None
    problems: list[dict[str, str]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return self.recipe is not None and not self.problems and not self.missing


def check(
    values: Values, *, assume: bool = False, runs: Path = RUNS, seen: str = ""
) -> dict[str, Any]:
    """What the fields mean: every problem at its key, what is missing, the recipe and the command.

    `assume` is for a model that learns from chats: what `mule train --model --data` would assume.
    `seen` is the sum of the recipe that was saved last, which may be saved again.
    """
    draft = _draft(values, assume=assume, runs=runs, seen=seen)
    return {
        "ok": draft.is_complete,
        "problems": draft.problems,
        "missing": draft.missing,
        "name": draft.name,
        "file": str(draft.file),
        "recipe": draft.text,
        "command": _command(draft.file),
        "next": f"mule plan {draft.file}",
    }


def plan(
    values: Values, *, assume: bool = False, runs: Path = RUNS, machine: str | None = None
) -> dict[str, Any]:
    """`mule plan` of the fields; each remedy with the fields that it sets.

    Raises UserError where fields are wrong or missing, or the data would have to be fetched.
    """
    from mule.commands import plan as command

    draft = _draft(values, assume=assume, runs=runs, seen=None)
    _require_complete(draft)
    assert draft.recipe is not None
    if away := _on_the_hub(draft.recipe):
        raise UserError(
            f"{away} is a data set of the hub, and nothing is fetched while you type",
            f"fetch it, and look at it: mule data preview {away}",
        )
    typed = [str(draft.file)]
    found = command.run(None, draft.words, root=runs, name=draft.name, machine=machine, typed=typed)
    for row in found["remedies"]:
        row["values"] = _fields_of(row["set"].split())
    return found


def save(
    values: Values, *, assume: bool = False, runs: Path = RUNS, seen: str = ""
) -> dict[str, Any]:
    """Write the recipe that the fields make; its file, its sum, and what starts it."""
    from mule import fsio

    if runs.resolve() != RUNS.resolve():
        raise UserError(
            f"these are the runs of {runs}, and `mule train` writes to {RUNS} of the folder it is in",
            "start `mule ui` without --runs, in the folder above the runs",
        )
    draft = _draft(values, assume=assume, runs=runs, seen=seen)
    _require_complete(draft)
    fsio.write_text(draft.file, draft.text)
    return {
        "name": draft.name,
        "file": str(draft.file),
        "sha256": fsio.sha256_file(draft.file),
        "recipe": draft.text,
        "words": ["train", str(draft.file)],
        "next": _command(draft.file),
    }


def _command(file: Path) -> str:
    return f"mule train {file}"


def _draft(values: Values, *, assume: bool, runs: Path, seen: str | None) -> Draft:
    from mule.config.load import check_layers, to_yaml

    layer = _form_layer(values)
    layer.problems += [f"{_FORM}: {problem}" for problem in _outside(layer.settings)]
    layers, reasons = [layer], {}
    if assume and not layer.problems:
        layers, reasons = _with_assumed(layer)
    recipe, settings, problems = check_layers(layers, _FORM, complete=False)
    missing = [] if problems else check_layers(layers, _FORM, complete=True)[2]
    name = recipe.name if recipe and recipe.name else free_name(_suggested(layer), runs)
    draft = Draft(name, RECIPES / f"{name}.yaml", recipe=recipe)
    draft.problems = [_at_key(problem) for problem in problems]
    draft.missing = [_at_key(problem) for problem in missing]
    if recipe is None:
        return draft
    if recipe.name and seen is not None:
        draft.problems += _taken(name, runs, seen)
    keys = frozenset(settings) - {NAME}
    draft.text = _HEADER + to_yaml(recipe, reasons, only=keys)
    draft.words = _words(settings, keys)
    return draft


def _form_layer(values: Values) -> Layer:
    """The settings typed; a key that does not exist is a problem as in a recipe."""
    from mule.config.hints import unknown_key
    from mule.config.knobs import knobs
    from mule.config.layers import Layer, Setting

    layer = Layer(_FORM, 0)
    for key, typed in values.items():
        typed = typed.strip() if isinstance(typed, str) else typed
        if isinstance(typed, list):
            typed = [t.strip() if isinstance(t, str) else t for t in typed]
            typed = [t for t in typed if t != ""]
        if typed in ("", []):
            continue
        if key in NOT_IN_A_FORM:
            layer.problems.append(f"{_FORM}: {key}: {NOT_IN_A_FORM[key]}")
            continue
        if key not in knobs():
            layer.problems.append(f"{_FORM}: {key}: {unknown_key('', key)}")
            continue
        try:
            value = typed if key == NAME else read_field(knobs()[key], typed)
        except (ValueError, TypeError) as problem:
            layer.problems.append(f"{_FORM}: {key}: {problem}")
            continue
        layer.settings[key] = Setting(key, value, _FORM, 0, typed=key)
    return layer


def _outside(settings: Mapping[str, Setting]) -> Iterator[str]:
    """Problems with files that are not below the folder the pages are of (rule S6)."""
    here = Path().resolve()
    for key in PATHS:
        value = settings[key].value if key in settings else []
        for text in value if isinstance(value, list) else [value]:
            if "\0" in text or any(len(part.encode()) > _NAME_BYTES for part in Path(text).parts):
                yield f"{key}: this cannot be the name of a file; check what was typed"
            elif not (here / text).resolve().is_relative_to(here):
                yield (
                    f"{key}: {text} is outside of the folder of these pages; copy it here, or "
                    "use a terminal, which may read any file"
                )


def _with_assumed(layer: Layer) -> tuple[list[Layer], dict[str, str]]:
    """The layer above what is assumed beside it, and the reasons; alone until there is enough."""
    from mule.config.layers import Layer, Setting

    words = _words(layer.settings, frozenset(layer.settings))
    used = tuple(word for word in words if word.startswith(_ASSUMED_FROM))
    given = {word.partition("=")[0] for word in used}
    found: Mapping[str, tuple[Any, str]] = {}
    if "model.path" in given:
        found = {"adapter.kind": ("lora", "")}
    if {"model.path", "data.train"} <= given:
        try:
            found = _assumed(used)
        except MuleError as error:
            hint = f"; {error.hint}" if error.hint else ""
            layer.problems.append(f"{_FORM}: model.path: {error.message}{hint}")
    below = Layer(_ASSUMED, -1)
    for key, (value, _) in found.items():
        below.settings[key] = Setting(key, value, _ASSUMED, -1, typed=key)
    reasons = {
        key: f"assumed: {why}"
        for key, (_, why) in found.items()
        if why and key not in layer.settings
    }
    return [below, layer], reasons


@lru_cache(maxsize=16)  # the data is read for it
def _assumed(words: tuple[str, ...]) -> Mapping[str, tuple[Any, str]]:
    from mule.commands.assume import begun
    from mule.commands.plan import assumptions

    if away := _on_the_hub(begun(list(words))):
        raise UserError(f"{away} is a data set of the hub", f"fetch it: mule data preview {away}")
    found = assumptions(list(words), "run", None)
    return {key: value for key, value in found.items() if key != NAME}


def _suggested(layer: Layer) -> str:
    """What a run of these settings would be called."""
    from mule.commands.assume import name_of

    try:
        return name_of(_words(layer.settings, frozenset(layer.settings)))
    except UserError:
        return "run"


def _words(settings: Mapping[str, Setting], keys: frozenset[str]) -> list[str]:
    """The settings as `key=value`."""
    return [
        f"{key}={json.dumps(setting.value, ensure_ascii=False)}"
        for key, setting in settings.items()
        if key in keys
    ]


def _fields_of(words: list[str]) -> dict[str, Any]:
    """What `key=value` words put into the fields."""
    from mule.config.knobs import knobs
    from mule.config.layers import read_overrides

    settings = read_overrides(words, 0).settings
    return {key: as_typed(knobs()[key], setting.value) for key, setting in settings.items()}


def _taken(name: str, runs: Path, seen: str) -> list[dict[str, str]]:
    """Why a new run cannot have this name."""
    from mule import fsio

    file, folder = RECIPES / f"{name}.yaml", runs / name
    other = f"another name, such as {free_name(name, runs)}"
    if folder.exists():
        text = f"{folder} already exists: a new run would mix with it; give {other}"
    elif file.exists() and fsio.sha256_file(file) != seen:
        text = f"{file} is already there, and is not overwritten; give {other}"
    else:
        return []
    return [{"key": NAME, "message": text}]


def _at_key(problem: str) -> dict[str, str]:
    """A problem as the loader says it, with the field that it is shown at; "" for none."""
    from mule.config.knobs import knobs

    found = _PLACE.fullmatch(problem)
    if found is None:
        return {"key": "", "message": problem}
    key, text = found["key"], found["rest"]
    if key in knobs():
        return {"key": key, "message": text.removeprefix(f"{key}: ")}
    return {"key": "model.path" if key == "model" else "", "message": text}


def _require_complete(draft: Draft) -> None:
    found = [*draft.problems, *draft.missing]
    if found:
        said = [f"{p['key']}: {p['message']}" if p["key"] else p["message"] for p in found]
        raise ConfigError(said, "every key is described in docs/configuration.md")


def _on_the_hub(recipe: Recipe) -> str | None:
    """The first data path that would have to be fetched; a fetched one is in a cache, not here."""
    from mule.data.sources.paths import is_hub_id

    paths = [*recipe.data.train, *(recipe.data.valid or [])]
    return next((path for path in paths if not Path(path).exists() and is_hub_id(path)), None)
