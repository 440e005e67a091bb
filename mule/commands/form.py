"""What the form of the page Start holds: a field for each setting, made of the schema.

The value of a field is what was typed: a text, or a list of texts where a setting takes several. An
empty one is not set. mule/commands/form_recipe.py makes a recipe of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import ConfigError
from mule.run import RUNS

if TYPE_CHECKING:
    from mule.config.knobs import Knob

RECIPES = Path("recipes")  # where the form saves
# The settings that people change first, in this order; all others are in the sections below.
FIRST = (
    "model.path",
    "model.size",
    "tokenizer.vocab_size",
    "data.train",
    "data.valid",
    "data.max_seq_length",
    "train.epochs",
    "train.steps",
    "optim.learning_rate",
    "adapter.kind",
    "adapter.lora.r",
    "evaluate.prompts",
)
NAME = "name"  # of the run, which is asked for by itself
_CAMPAIGN = (
    "only a campaign trains a module of your own: mule lab run CAMPAIGN.yaml --module FILE.py"
)
NOT_IN_A_FORM = {  # and what to say of it
    "extends": "a form holds the settings themselves; begin with that recipe instead",
    "model.module": _CAMPAIGN,
    "model.module_args": _CAMPAIGN,
}

# ---------------------------------------------------------------- the fields


def fields() -> dict[str, Any]:
    """The fields: `first`, then `sections` with all others; each with its help, range and default."""
    from mule.config.knobs import knobs, sections

    known = {key: _field(knob) for key, knob in knobs().items() if key not in NOT_IN_A_FORM}
    names = dict.fromkeys(name.partition(".")[0] for name in sections() if name)
    rest = [row for key, row in known.items() if key not in FIRST]
    return {
        "name": known[NAME],
        "first": [known[key] for key in FIRST],
        "sections": [
            {
                "name": name,
                "help": sections()[name].__doc__,
                "fields": [row for row in rest if row["key"].startswith(f"{name}.")],
            }
            for name in names
        ],
    }


def _field(knob: Knob) -> dict[str, Any]:
    kind = _kind(knob)
    words = knob.choices
    if kind == "choice" and any(branch.get("type") == "boolean" for branch in knob.branches):
        words = [*words, "true", "false"]
    return {
        "key": knob.key,
        "kind": kind,
        "help": knob.description,
        "unit": knob.unit,
        "expected": knob.expected(),
        "default": "" if knob.default is None else as_typed(knob, knob.default),
        "choices": words if kind in ("choice", "several") else [],
        "role": knob.role,
    }


def _kind(knob: Knob) -> str:
    """How it is typed: choice, several (of a few words), number, text, lines, or map."""
    types = {branch.get("type") for branch in knob.branches}
    if knob.is_map:
        return "map"
    if "array" in types:
        worded = any(branch.get("items", {}).get("enum") for branch in knob.branches)
        return "several" if worded else "lines"
    if types & {"integer", "number"}:
        return "number"
    free = any(
        b.get("type") == "string" and not {"enum", "const"} & b.keys() for b in knob.branches
    )
    return "text" if free else "choice"


def _takes_several(knob: Knob) -> bool:
    return _kind(knob) in ("several", "lines", "map")


def as_typed(knob: Knob, value: Any) -> str | list[str]:
    """A value of a recipe as one would type it into its field."""
    from mule.config.knobs import number

    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, dict):
        return [f"{name}: {item}" for name, item in value.items()]
    if isinstance(value, list):
        return [str(item) for item in value]
    return [value] if _takes_several(knob) else str(value)


def read_field(knob: Knob, typed: Any) -> Any:
    """What was typed as a value of a recipe. Raises ValueError with what is wrong."""
    kind = _kind(knob)
    several = _takes_several(knob)
    if isinstance(typed, list) is not several or not all(isinstance(t, str) for t in typed):
        raise ValueError("a list of texts is needed" if several else "a text is needed")
    if kind == "map":
        pairs = [line.partition(":") for line in typed]
        if wrong := next((line for line, pair in zip(typed, pairs) if not pair[1]), None):
            raise ValueError(f"{wrong}: write a name and a text a line, as `prompt: question`")
        return {name.strip(): text.strip() for name, _, text in pairs}
    if kind == "lines" and not _holds_texts(knob):
        return [_plain(text) for text in typed]
    if several:
        return typed[0] if typed[0] in knob.choices and kind == "lines" else typed
    return typed if kind == "text" else _plain(typed)


def _holds_texts(knob: Knob) -> bool:
    items = (branch["items"] for branch in knob.branches if "items" in branch)
    return all(item.get("type") == "string" for item in items)


def _plain(text: str) -> Any:
    """A number, a word or true and false, as a recipe reads them."""
    from mule.config.reader import YamlProblem, parse_yaml, plain

    try:
        node = parse_yaml(text)
        return None if node is None else plain(node)
    except YamlProblem as problem:
        raise ValueError(problem.message) from None


def begin(kind: str, name: str, *, runs: Path = RUNS) -> dict[str, Any]:
    """The fields of a recipe (its name or file) or a run, and a name for the run that follows."""
    from mule.config.knobs import knobs
    from mule.config.load import load_recipe
    from mule.run import Run

    if kind == "run":
        settings = _settings_of_run(Run.open(name, runs).folder)
    else:
        loaded = load_recipe(name, [], complete=False)
        settings = {key: setting.value for key, setting in loaded.settings.items()}
        settings.setdefault(NAME, loaded.file.stem if loaded.file else name)
    called = str(settings.pop(NAME, None) or name)
    values = {
        key: as_typed(knobs()[key], v) for key, v in settings.items() if key not in NOT_IN_A_FORM
    }
    return {"values": values, "name": free_name(called, runs)}


def _settings_of_run(folder: Path) -> dict[str, Any]:
    """What was given for a run: its recipe with the settings of the command line.

    Where that extends a recipe that is gone: what was resolved, without what was decided for it.
    """
    from mule.config.dump import read_reasons
    from mule.config.knobs import knobs
    from mule.config.load import load_recipe

    recipe, resolved = folder / "recipe.yaml", folder / "resolved.yaml"
    mark = "# command line: "
    lines = recipe.read_text(encoding="utf-8-sig").splitlines()
    words = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
    try:
        loaded = load_recipe(recipe, words, complete=False)
        return {key: setting.value for key, setting in loaded.settings.items()}
    except ConfigError:
        if not resolved.is_file():
            raise
    decided = read_reasons(resolved.read_text(encoding="utf-8"))
    loaded = load_recipe(resolved, [], complete=False)
    return {
        key: setting.value
        for key, setting in loaded.settings.items()
        if key not in decided and setting.value != knobs()[key].default
    }


def free_name(wanted: str, runs: Path = RUNS) -> str:
    """`wanted`, or with a number behind it where a run or a recipe has that name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-._")[:90] or "run"
    found, number = name, 2
    while (runs / found).exists() or (RECIPES / f"{found}.yaml").exists():
        found, number = f"{name}-{number}", number + 1
    return found
