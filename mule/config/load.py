"""From a recipe file and `key=value` words to one checked Recipe.

defaults < the recipe it extends < the recipe < the command line. A later source that makes an
earlier setting idle replaces it: `train.steps=20` on the command line goes before `train.epochs` in
the file. Every problem of every source is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mule.config.dump import identity_fingerprint as identity_fingerprint
from mule.config.dump import to_yaml as to_yaml
from mule.config.hints import near, wrong_entry, wrong_value
from mule.config.knobs import knobs
from mule.config.layers import Layer, Setting, read_layer, read_overrides
from mule.config.presets import preset_file, presets
from mule.config.reader import MAX_BYTES
from mule.config.schema import Recipe
from mule.config.section import Conflict, Problem
from mule.errors import ConfigError
from mule.hub.token import look_for_token_in

_MAX_PARENTS = 10
_COMMAND_LINE = _MAX_PARENTS + 1  # rank above every file


@dataclass(frozen=True)
class Loaded:
    """A recipe as it was given: the checked values, the text, and where each key was set."""

    recipe: Recipe
    text: str
    set_keys: frozenset[str]
    file: Path | None
    settings: dict[str, Setting]

    def place(self, key: str) -> str:
        """How an error names a setting: file and line, command line, or the key alone."""
        return self.settings[key].place() if key in self.settings else key


def load_recipe(
    path: Path | str | None,
    overrides: list[str] | None = None,
    *,
    complete: bool = True,
    assumed: Mapping[str, tuple[Any, str]] | None = None,
) -> Loaded:
    """Read a recipe (a file, or the name of one that comes with Mule) and apply the overrides.

    With `complete`, a recipe that says nothing of its data or its model is refused too.
    A `.env` beside the file may hold the token for the hub (mule/hub/token.py).
    `text` is the file as typed, followed by the overrides as comments. Of what was `assumed` (key ->
    value and reason), which stands below all else, it is a recipe of all settings with the reasons.
    Raises ConfigError, listing every problem with its place.
    """
    overrides = overrides or []
    file = _find(path) if path is not None else None
    if file and (file.parent / ".env").is_file():
        look_for_token_in(file.parent)
    layers = [*(_file_layers(file) if file else []), read_overrides(overrides, _COMMAND_LINE)]
    if assumed:
        layers.insert(0, _assumed_layer(assumed))
    source = str(path) if path is not None else "command line"
    recipe, settings, problems = check_layers(layers, source, complete=complete)
    if problems or recipe is None:
        problems.sort(key=by_line)
        raise ConfigError(problems, "every key is described in docs/configuration.md")
    text = file.read_text(encoding="utf-8-sig") if file else ""
    if assumed:
        text = _with_reasons(recipe, settings, assumed)
    elif overrides:
        text += "".join(f"\n# command line: {word}" for word in overrides) + "\n"
    return Loaded(recipe, text, frozenset(recipe.given()), file, settings)


def check_layers(
    layers: list[Layer], source: str, *, complete: bool
) -> tuple[Recipe | None, dict[str, Setting], list[str]]:
    """The recipe that the layers give, later ones first; the settings it is made of; the problems.

    `source` names the recipe in problems that are no setting's.
    """
    problems = [problem for layer in layers for problem in layer.problems]
    settings = _merge(layers)
    recipe = _validate(settings, problems, source)
    if recipe and complete and (settings or not problems):
        problems += [f"{source}: {missing}" for missing in _missing(recipe)]
    return recipe, settings, problems


# ---------------------------------------------------------------- assumed


def _assumed_layer(assumed: Mapping[str, tuple[Any, str]]) -> Layer:
    source = "assumed"
    return Layer(
        source, -1, {key: Setting(key, value, source, -1) for key, (value, _) in assumed.items()}
    )


def _with_reasons(
    recipe: Recipe, settings: dict[str, Setting], assumed: Mapping[str, tuple[Any, str]]
) -> str:
    """The settings as a recipe that gives the same again, each assumed one with its reason."""
    reasons = {
        key: f"assumed: {reason}"
        for key, (_, reason) in assumed.items()
        if reason and key in settings and settings[key].rank < 0
    }
    return to_yaml(recipe, reasons, only=frozenset(settings))


# ---------------------------------------------------------------- files


def _find(path: Path | str) -> Path:
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(
            [f"{path}: a folder, not a recipe"], f"give a file, as {path}/recipe.yaml"
        )
    if found := preset_file(str(path)):
        return found
    folder = path.parent
    names = [str(folder / f.name) for f in sorted(folder.glob("*.y*ml"))] if folder.is_dir() else []
    match = near(str(path), [*names, *presets()])
    hint = f"did you mean `{match}`?" if match else "`mule recipe list` shows what comes with Mule"
    raise ConfigError([f"{path}: no such file"], hint)


def _file_layers(file: Path) -> list[Layer]:
    """The layer of `file` after those of the recipes it extends."""
    layers: list[Layer] = []
    seen: list[Path] = []
    while True:
        layer = read_layer(recipe_text(file), str(file), _MAX_PARENTS - len(layers))
        layers.insert(0, layer)
        seen.append(file.resolve())
        setting = layer.settings.pop("extends", None)
        if setting is None or setting.value is None:
            return layers
        parent, problem = _parent(file, setting, seen)
        if parent is None:
            layer.problems.append(problem)
            return layers
        file = parent


def _parent(file: Path, setting: Setting, seen: list[Path]) -> tuple[Path | None, str]:
    place, name = setting.place(), setting.value
    if not isinstance(name, str) or not name:
        return None, f"{place}: {wrong_value(knobs()['extends'], name)}"
    beside = file.parent / name
    found = beside if beside.is_file() else preset_file(name)
    if found is None:
        match = near(name, [*presets(), *(f.name for f in file.parent.glob("*.y*ml"))])
        hint = f"did you mean `{match}`?" if match else "see `mule recipe list`"
        return None, f"{place}: neither {beside} nor a recipe of Mule called `{name}`; {hint}"
    if found.resolve() in seen:
        chain = " -> ".join(path.name for path in [*seen, found])
        return None, f"{place}: goes round in a circle ({chain})"
    if len(seen) > _MAX_PARENTS:
        return None, f"{place}: more than {_MAX_PARENTS} recipes extend one another"
    return found, ""


def recipe_text(file: Path) -> str:
    """The text of a recipe or campaign; ConfigError where it is none."""
    if file.stat().st_size > MAX_BYTES:
        problem = f"{file}: larger than {MAX_BYTES:,} bytes; not a recipe"
        raise ConfigError([problem], "give a recipe; `mule init` writes an example")
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError([f"{file}:{line}: not UTF-8 text"], "save it as UTF-8") from None
    except PermissionError:
        raise ConfigError([f"{file}: permission denied"], f"chmod u+r {file}") from None


# ---------------------------------------------------------------- merging and checking


def _merge(layers: list[Layer]) -> dict[str, Setting]:
    """The settings of all layers, later ones first; null takes a setting away.

    A map keeps the entries of earlier layers beside its own.
    """
    merged: dict[str, Setting] = {}
    for layer in layers:
        for key, setting in layer.settings.items():
            before = merged.pop(key, None)
            if before and isinstance(before.value, dict) and isinstance(setting.value, dict):
                setting = replace(setting, value={**before.value, **setting.value})
            if setting.value is not None or not _nullable(key):
                merged[key] = setting
    return merged


def _nullable(key: str) -> bool:
    return knobs()[key].default is None


def _validate(settings: dict[str, Setting], problems: list[str], source: str) -> Recipe | None:
    """The recipe, after adding every problem to `problems`; drops what a later source replaced."""
    while True:
        try:
            return Recipe.model_validate(_nested(settings))
        except ValidationError as error:
            conflicts = list(_conflicts(error))
            if replaced := _replaced(conflicts, settings):
                for key in replaced:
                    del settings[key]
                continue
            problems += _wrong_values(error, settings)
            problems += _at_odds(conflicts, settings, source)
            return None


def _nested(settings: dict[str, Setting]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, setting in settings.items():
        *parents, name = key.split(".")
        section = root
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = setting.value
    return root


def _conflicts(error: ValidationError) -> list[Problem]:
    """The problems between settings, with full dotted keys."""
    found = []
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Conflict):
            prefix = "".join(f"{part}." for part in detail["loc"])
            found += [
                Problem(prefix + p.key, p.message, prefix + p.because if p.because else "")
                for p in cause.problems
            ]
    return found


def _replaced(conflicts: list[Problem], settings: dict[str, Setting]) -> set[str]:
    """Idle settings whose cause comes from a later source."""
    return {
        p.key
        for p in conflicts
        if p.because in settings and settings[p.because].rank > settings[p.key].rank
    }


def _at_odds(conflicts: list[Problem], settings: dict[str, Setting], source: str) -> list[str]:
    said: list[str] = []
    pairs: set[frozenset[str]] = set()
    for problem in conflicts:
        pair = frozenset((problem.key, problem.because))
        if problem.because and pair in pairs:  # `a` against `b` was said; not `b` against `a`
            continue
        pairs.add(pair)
        setting = settings.get(problem.key)
        place = setting.place() if setting else f"{source}: {problem.key}"
        said.append(f"{place}: {problem.message}")
    return said


def _wrong_values(error: ValidationError, settings: dict[str, Setting]) -> list[str]:
    """One message for each setting, or item of a list, of the wrong type or range."""
    said: dict[str, None] = {}
    for detail in error.errors():
        key, rest = _split(detail["loc"])
        if key is None:
            continue
        setting, knob = settings[key], knobs()[key]
        if isinstance(setting.value, dict) and rest and (name := str(rest[0])) in setting.value:
            found = wrong_entry(setting.value[name])
            said[f"{setting.place()}: {name}: {found}"] = None
            continue
        item = next((part for part in rest if isinstance(part, int)), None)
        if item is None or not isinstance(setting.value, list):
            said[f"{setting.place()}: {wrong_value(knob, setting.value)}"] = None
        else:
            message = wrong_value(knob, setting.value[item], item=True)
            said[f"{setting.place(item)}: item {item + 1}: {message}"] = None
    return list(said)


def _split(loc: tuple[int | str, ...]) -> tuple[str | None, tuple[int | str, ...]]:
    """The dotted key a pydantic location begins with, and the rest of it."""
    for end in range(len(loc), 0, -1):
        if (key := ".".join(str(part) for part in loc[:end])) in knobs():
            return key, loc[end:]
    return None, loc


def by_line(problem: str) -> tuple[bool, int]:
    """Sorts the problems of a file by line, and those of the command line last."""
    found = re.match(r".+?:(\d+): ", problem)
    return problem.startswith("command line:"), int(found[1]) if found else 0


def _missing(recipe: Recipe) -> list[str]:
    found = []
    if not recipe.data.train:
        found.append("data.train is missing: the files to train on, as data.train: [corpus.txt]")
    model = recipe.model
    needed = ("hidden_size", "num_layers", *(("num_heads",) if model.attends else ()))
    shape = {key: getattr(model, key) for key in needed}
    named = model.path or model.size or model.module
    if named is None and not all(shape.values()):
        lacking = ", ".join(f"model.{key}" for key, value in shape.items() if value is None)
        given = any(shape.values())
        found.append(
            f"{lacking} missing: give them all, or model.size"
            if given
            else "model is missing: give model.path (to start from it) or model.size, such as 25m"
        )
    return found
