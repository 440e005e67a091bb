"""Another tool's settings as a recipe: read, recognised, translated, checked, written down.

Nothing is guessed in silence: each setting comes with what it became, those without an equivalent
with what happens instead, and what looks like a mistake with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mule.compare.checks.mistake import Mistake
from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.detect import Detected, detect
from mule.compare.dialects.foreign_file import read_foreign
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Given, Key, Trap
from mule.compare.dialects.to_recipe import Chosen, Refused, choose, lose_what_differs
from mule.compare.mistakes import find_mistakes
from mule.config.dump import to_yaml
from mule.config.knobs import number
from mule.config.layers import read_layer
from mule.config.load import check_layers
from mule.config.schema import Recipe
from mule.errors import ConfigError, UserError

_SEE, _PARTLY = "no equivalent: see below", "in part: see below"


@dataclass(frozen=True)
class Overrides:
    """What the file cannot say: how many devices it ran on, and what is elsewhere here."""

    devices: int | None = None
    model: str | None = None
    data: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A setting of theirs beside ours; `value` and `ours_value` as they are written."""

    key: str
    value: str
    ours: str = ""
    ours_value: str = ""
    note: str = ""


@dataclass(frozen=True)
class Imported:
    """What became of a file: the recipe's text, and everything there is to say."""

    text: str
    recipe: Recipe
    detected: Detected
    setup: ForeignSetup
    rows: list[Row]
    traps: list[Trap]
    mistakes: list[Mistake]


def import_file(
    file: Path, told: str | None = None, overrides: Overrides | None = None
) -> Imported:
    """Translate a file of another tool's settings. Raises UserError or ConfigError."""
    overrides = overrides or Overrides()
    foreign = read_foreign(file)
    detected = detect(foreign, told)
    setup = _read(detected.dialect, foreign.given, foreign.file, overrides)
    recipe, chosen, refused = choose(setup)
    _require_all(recipe, setup)
    lose_what_differs(setup, chosen)
    traps = detected.dialect.traps(setup) if detected.dialect.traps else []
    traps += _common_traps(setup)
    mistakes = find_mistakes(setup, detected.dialect)
    text = _text(recipe, chosen, setup, mistakes, refused)
    _check(text, file)
    rows = _rows(detected.dialect, setup, chosen, refused)
    return Imported(text, recipe, detected, setup, rows, traps, mistakes)


# ---------------------------------------------------------------- the facts


def _read(
    dialect: Dialect, given: dict[str, Given], file: str, overrides: Overrides
) -> ForeignSetup:
    setup = ForeignSetup(dialect.name, dialect.title, file, given=given)
    for name, value in dialect.defaults.items():
        setup.put(name, value)
    for one in given.values():
        _take(dialect, setup, one)
    if overrides.devices is not None:
        setup.put("devices", overrides.devices, Given("--devices", overrides.devices))
    if dialect.read is not None:
        dialect.read(setup)
    if overrides.data:
        for fact in ("data.valid", "data.format", "data.columns", "sets"):
            setup.facts.pop(fact, None)
        put_sets(setup, [DataSet(path) for path in overrides.data], Given("--data", overrides.data))
    if overrides.model is not None:
        setup.facts.pop("model.revision", None)
        setup.put("model.path", overrides.model, Given("--model", overrides.model))
    return setup


def _take(dialect: Dialect, setup: ForeignSetup, given: Given) -> None:
    entry = dialect.entry(given.key)
    if entry is None:
        if given.value not in (None, {}) and not dialect.is_section(given.key):
            setup.unknown.append(given)
    elif isinstance(entry, Key):
        value = (
            entry.convert(given.value) if entry.convert and given.value is not None else given.value
        )
        if value is not None:
            setup.put(entry.fact, value, given, note=entry.note)
    elif entry.kind == "lost":
        if (
            not any(given.value is off or given.value == off for off in entry.off)
            and given.value != []
        ):
            setup.lose(given, entry.happens)
    elif given.value is not None:
        setup.left[entry.kind].append(given.key)


def _require_all(recipe: Recipe, setup: ForeignSetup) -> None:
    """UserError where the file says nothing of the model or the data."""
    missing = [] if recipe.data.train else ["the data: --data ./data"]
    shape = recipe.model
    if shape.path is None and shape.size is None and not (shape.hidden_size and shape.num_layers):
        missing.append("the model: --model ORG/NAME, or a folder")
    if missing:
        what = " and ".join(text.partition(":")[0] for text in missing)
        hint = f"name {' and '.join(missing)}"
        raise UserError(f"{setup.file}: the file does not say {what}", hint)


def _common_traps(setup: ForeignSetup) -> list[Trap]:
    found = []
    if setup.is_stated("template") and not setup.value("pretrain"):
        name = str(setup.value("template"))
        shown = name if len(name) <= 40 and "{" not in name else "a template of its own"
        text = (
            f"{shown}: Mule renders chats with the model's own template, so that what is served "
            "reads as what was trained; a model without one gets ChatML"
        )
        found.append(Trap(setup.facts["template"].key, text))
    guesses = [one.name for one in setup.value("sets", []) if one.part == "a guess"]
    if guesses:
        text = (
            f"{', '.join(guesses)}: names of LLaMA-Factory's dataset_info.json, which does not lie "
            "here; the files are a guess: name them in data.train"
        )
        found.append(Trap("dataset", text))
    return found


# ---------------------------------------------------------------- the recipe


def _text(
    recipe: Recipe,
    chosen: list[Chosen],
    setup: ForeignSetup,
    mistakes: list[Mistake],
    refused: list[Refused],
) -> str:
    """The recipe as YAML: where it comes from, what is open, and a reason behind the values."""
    comments = {row.key: _comment(row, setup) for row in chosen}
    lines = [f"# Imported from {Path(setup.file).name}, settings of {setup.title}."]
    lines += _listed("Looks like a mistake there", [f"{m.key}: {m.found}" for m in mistakes])
    lines += _listed(
        "Left out, since Mule cannot take the value",
        [f"{row.key} = {shown(row.value)}: {row.why}" for row in refused],
    )
    lines += _listed("No equivalent", [f"{one.key}: {one.happens}" for one in setup.lost])
    only = frozenset(recipe.given())
    body = to_yaml(recipe, {key: text for key, text in comments.items() if text}, only=only)
    return "\n".join([*lines, ""]) + body


def _comment(row: Chosen, setup: ForeignSetup) -> str:
    stated = [setup.facts[fact] for fact in row.facts if setup.is_stated(fact)]
    if not stated:
        return f"{setup.title}'s default" + (f": {row.note}" if row.note else "")
    if row.note:
        return row.note
    leaf = stated[0].key.rpartition(".")[2]
    return "" if leaf in (row.key.rpartition(".")[2], shown(row.value)) else stated[0].key


def _listed(title: str, items: list[str]) -> list[str]:
    if not items:
        return []
    return [f"# {title}:", *(f"#   {' '.join(item.split())}" for item in items)]


def _check(text: str, file: Path) -> None:
    """The recipe must load as `mule train` loads it; else it is our defect, with all problems."""
    layer = read_layer(text, "the recipe", 0)
    _, _, problems = check_layers([layer], "the recipe", complete=True)
    if problems:
        raise ConfigError(problems, f"this is a defect of Mule: please report it with {file.name}")


# ---------------------------------------------------------------- the table


def _rows(
    dialect: Dialect, setup: ForeignSetup, chosen: list[Chosen], refused: list[Refused]
) -> list[Row]:
    """Each setting of the file with what it became, then what the tool assumes."""
    by_fact: dict[str, Chosen | Refused] = {}
    for taken in (*chosen, *refused):
        for fact in taken.facts:
            by_fact.setdefault(fact, taken)
    rows = []
    for given in setup.given.values():
        entry = dialect.entry(given.key)
        if given.value is not None and isinstance(entry, Key):
            rows.append(_row(setup, given, entry, by_fact))
    for row in chosen:
        known = [setup.facts[fact] for fact in row.facts if fact in setup.facts]
        if known and not any(fact.is_stated for fact in known):
            value = f"{shown(known[0].value)} (default)"
            name = _name_of(dialect, known[0].name)
            rows.append(Row(name, value, row.key, shown(row.value), row.note))
    return rows


def _row(
    setup: ForeignSetup, given: Given, entry: Key, by_fact: dict[str, Chosen | Refused]
) -> Row:
    facts = [entry.fact, *(name for name, fact in setup.facts.items() if fact.key == given.key)]
    became = list(dict.fromkeys(by_fact[fact].key for fact in facts if fact in by_fact))
    value, lost = shown(given.value), [one for one in setup.lost if one.key == given.key]
    if not became:
        note = _SEE if lost else entry.note or _why_idle(setup, given, entry.fact)
        return Row(given.key, value, "", "", note)
    rows = {by_fact[fact].key: by_fact[fact] for fact in facts if fact in by_fact}
    values = ["left out" if isinstance(row, Refused) else shown(row.value) for row in rows.values()]
    notes = [row.why if isinstance(row, Refused) else row.note for row in rows.values()]
    notes += [_PARTLY] if lost else []
    note = "; ".join(dict.fromkeys(note for note in notes if note))
    return Row(given.key, value, ", ".join(became), ", ".join(values), note)


def _why_idle(setup: ForeignSetup, given: Given, fact: str) -> str:
    if fact == "train.epochs" and (setup.value("train.steps") or setup.value("train.tokens")):
        return "the number of updates goes before it"
    if fact == "micro_rows" and setup.number("global_rows") is not None:
        return "only cuts an update; train.micro_batch_rows: auto fits it to the memory"
    if fact.startswith("adapter.lora.") and setup.value("method", "full") == "full":
        return "nothing is adapted: all weights are trained"
    if fact.startswith("evaluate."):
        return "nothing is held out"
    if fact == "template":
        return "the model's own template is used"
    if fact in ("on_prompt", "answers_only") and not setup.value("pretrain"):
        is_ours = (given.value is True) == (fact == "answers_only")
        return "as Mule does it" if is_ours else "Mule trains the answers only"
    return "nothing to set"


def _name_of(dialect: Dialect, fact: str) -> str:
    names = [
        name
        for name, entry in dialect.keys.items()
        if isinstance(entry, Key) and entry.fact == fact
    ]
    return names[0] if names else fact.rpartition(".")[2]


def shown(value: Any) -> str:
    """A value as it is written in a file, cut where it is long."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, list):
        text = ", ".join(shown(item) for item in value)
    elif isinstance(value, dict):
        text = ", ".join(f"{key}: {shown(item)}" for key, item in value.items())
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
