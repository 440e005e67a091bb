"""A recipe written down: as YAML with the reason of each choice, or as a fingerprint."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from mule.config.knobs import knobs, sections
from mule.config.schema import Recipe
from mule.config.section import Section
from mule.fsio import sha256_json

_BARE = re.compile(r"[A-Za-z_./~][A-Za-z0-9_./+-]*( [A-Za-z0-9_./+-]+)*")
_NOT_TEXT = {"true", "false", "null", "~", ".inf", ".nan"}
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def to_yaml(
    recipe: Recipe, comments: dict[str, str] | None = None, *, only: frozenset[str] | None = None
) -> str:
    """The recipe as YAML, with `comments` (dotted key -> reason) behind the values.

    Settings that have no effect beside the others are left out, since the loader would refuse them
    (`epochs`, once `steps` is decided). The text loads back to an equal recipe but for those, with
    an equal fingerprint. With `only`, just those keys are written.
    """
    comments = comments or {}
    lines: list[str] = []
    idle = idle_keys(recipe)
    open_section = ""
    for key, knob in knobs().items():
        value = value_of(recipe, key)
        unset = value is None and knob.default is None  # null can also be what was chosen
        if unset or key in idle or (only is not None and key not in only):
            continue
        lines += _headings(open_section, knob.section)
        open_section = knob.section
        indent = "  " * key.count(".")
        comment = f"  # {' '.join(comments[key].split())}" if key in comments else ""
        lines.append(f"{indent}{knob.name}: {_flow(value)}{comment}")
    return "\n".join(lines).lstrip() + "\n"


def read_settings(text: str) -> dict[str, dict[str, str]]:
    """The settings of what `to_yaml` wrote: dotted key -> {value, reason}, each as it stands there."""
    found: dict[str, dict[str, str]] = {}
    sections: list[str] = []
    for line in text.splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name, _, rest = line.strip().partition(":")
        sections[indent:] = [name]
        value, _, reason = rest.partition("  # ")
        if value.strip():
            found[".".join(sections)] = {"value": value.strip(), "reason": reason}
    return found


def read_reasons(text: str) -> dict[str, dict[str, str]]:
    """The commented settings of what `to_yaml` wrote: dotted key -> {value, reason}."""
    return {key: entry for key, entry in read_settings(text).items() if entry["reason"]}


def identity_fingerprint(recipe: Recipe) -> str:
    """SHA-256 over every setting that changes what is learned; see `identity_values`.

    Defaults are left out, so that a run goes on in a newer Mule that has more settings.
    """
    values, known = identity_values(recipe), knobs()
    return sha256_json({key: v for key, v in values.items() if v != known[key].default})


def identity_values(recipe: Recipe) -> dict[str, Any]:
    """The settings that may not change on resume; one without effect counts as its default."""
    idle = idle_keys(recipe)
    return {
        key: knob.default if key in idle else value_of(recipe, key)
        for key, knob in knobs().items()
        if knob.role == "identity"
    }


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


def with_values(recipe: Recipe, values: dict[str, Any], *, without: Iterable[str] = ()) -> Recipe:
    """A copy of the recipe with dotted keys replaced, and those of `without` unset; checked again.

    Raises pydantic's ValidationError when a value is wrong or has no effect.
    """
    data = recipe.model_dump(exclude_unset=True)

    def holder(key: str) -> dict[str, Any]:
        section = data
        for parent in key.split(".")[:-1]:
            section = section.setdefault(parent, {})
        return section

    for key, value in values.items():
        holder(key)[key.rpartition(".")[2]] = value
    for key in without:
        holder(key).pop(key.rpartition(".")[2], None)
    return Recipe.model_validate(data)


def idle_keys(recipe: Recipe) -> set[str]:
    """Dotted keys that have no effect beside the other settings."""
    found: set[str] = set()
    for name in sections():
        section: Section = value_of(recipe, name) if name else recipe
        prefix = f"{name}." if name else ""
        for problem in section.idle():
            if prefix + problem.because not in found:  # of two that exclude each other, the first
                found.add(prefix + problem.key)
    return found


def _headings(before: str, now: str) -> list[str]:
    """The section lines to write when the section changes, a blank line before a new top one."""
    if before == now or not now:
        return []
    names, old = now.split("."), before.split(".")
    shared = next(
        (i for i, name in enumerate(names) if i >= len(old) or name != old[i]), len(names)
    )
    lines = [f"{'  ' * i}{names[i]}:" for i in range(shared, len(names))]
    return ["", *lines] if shared == 0 else lines


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_flow(item) for item in value)}]"
    if isinstance(value, dict):
        return (
            "{" + ", ".join(f"{_flow(name)}: {_flow(item)}" for name, item in value.items()) + "}"
        )
    if isinstance(value, str):
        return value if _is_bare(value) else _quoted(value)
    return json.dumps(value)


def _is_bare(text: str) -> bool:
    return bool(_BARE.fullmatch(text)) and text.lower() not in _NOT_TEXT and text[:1] != "."


def _quoted(text: str) -> str:
    """A YAML double-quoted scalar; lone surrogates cannot be written and stay escaped."""
    return _UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(text, ensure_ascii=False))
