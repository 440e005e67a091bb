"""The generated reference of the settings: `python -m mule.config.docs` writes both files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.dump import to_yaml
from mule.config.knobs import Knob, knobs, number, sections
from mule.config.schema import Recipe

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKDOWN, SCHEMA = "configuration.md", "recipe.schema.json"

_INTRODUCTION = """\
# Settings

<!-- Generated from mule/config/schema.py by `python -m mule.config.docs`; edit that file. -->

A recipe is a YAML file of sections and keys. A value comes from, later ones first: the command line
(`mule train recipe.yaml train.steps=200`), the recipe, the recipe it `extends`, the default.

- A key that does not exist, a value of another type or out of range, a key given twice, and a key
  that has no effect beside the others are errors, all reported at once with file and line.
- When a later source makes an earlier setting idle, it replaces it: `train.steps=200` on the command
  line goes before `train.epochs` in the recipe. `key=null` (or `key=`) takes a setting away.
- On the command line a list is written `data.train=[a.jsonl,b.jsonl]` (quote it in zsh); a list of
  one may leave out the brackets.
- File names are relative to the folder the command runs in; `extends` to the recipe.
- **auto** is decided when a run starts, for the machine and the data; `resolved.yaml` in the run's
  folder says what was chosen and why, and can be used as a recipe.
- A key marked † is *mechanical*: it changes speed, storage or reporting, not what is learned, and may
  change when a run is resumed. All others are part of the run's fingerprint.

For completion and checks in an editor, begin a recipe with
`# yaml-language-server: $schema=<path of docs/recipe.schema.json>`.
"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors and forms."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Recipe.model_json_schema(),
        "title": "Mule recipe",
    }


def config_markdown() -> str:
    """docs/configuration.md: one table for each section."""
    parts = [_INTRODUCTION]
    for name, section in sections().items():
        rows = [_row(knob) for knob in knobs().values() if knob.section == name]
        title = f"## {name}" if name else "## At the top"
        parts.append(
            f"{title}\n\n{section.__doc__}\n\n"
            "| key | accepts | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    parts.append(f"## All defaults\n\n```yaml\n{to_yaml(Recipe())}```\n")
    return "\n".join(parts)


def _row(knob: Knob) -> str:
    mark = " †" if knob.role == "mechanical" else ""
    unit = f" ({knob.unit})" if knob.unit else ""
    return (
        f"| `{knob.key}`{mark} | {knob.expected()}{unit} | {_default(knob)} | {knob.description} |"
    )


def _default(knob: Knob) -> str:
    value = knob.default
    if value is None or value in ([], {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, (int, float)):
        return f"`{number(value)}`"
    return f"`{value}`" if isinstance(value, str) else f"`[{', '.join(value)}]`"


def write(folder: Path = DOCS) -> None:
    """Write both generated files."""
    fsio.write_text(folder / MARKDOWN, config_markdown())
    fsio.write_json(folder / SCHEMA, json_schema())


if __name__ == "__main__":
    write()
