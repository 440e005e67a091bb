"""One source of settings (a file, or the command line) as a flat table of dotted keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from mule.config.hints import unknown_key
from mule.config.knobs import knobs, sections
from mule.config.reader import YamlProblem, line_of, mapping_items, parse_yaml, plain


@dataclass(frozen=True)
class Setting:
    """A value and where it was given; `rank` is higher for a source that goes before others."""

    key: str
    value: Any
    source: str
    rank: int
    typed: str = ""
    line: int | None = None
    item_lines: tuple[int, ...] = ()

    def place(self, item: int | None = None) -> str:
        """How an error names it: `recipe.yaml:12: train.steps`, `command line: train.steps=0`."""
        if self.line is None:
            return f"{self.source}: {self.typed}"
        line = self.line if item is None else self.item_lines[item]
        return f"{self.source}:{line}: {self.key}"


@dataclass
class Layer:
    """The settings of one source and the problems met while reading them."""

    source: str
    rank: int
    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def read_layer(text: str, source: str, rank: int) -> Layer:
    """The settings in the text of a recipe."""
    layer = Layer(source, rank)
    try:
        node = parse_yaml(text)
        if node is None:
            layer.problems.append(f"{source}: it is empty; `mule init` writes an example")
        else:
            _walk(layer, node, "")
    except YamlProblem as problem:
        layer.problems.append(f"{source}:{problem.line}: {problem.message}")
    return layer


def read_node(node: Node, source: str, rank: int) -> Layer:
    """The settings in the part of a file that is a recipe."""
    layer = Layer(source, rank)
    try:
        _walk(layer, node, "")
    except YamlProblem as problem:
        layer.problems.append(f"{source}:{problem.line}: {problem.message}")
    return layer


def read_overrides(overrides: list[str], rank: int) -> Layer:
    """The settings in `section.key=value` words; values are YAML."""
    layer = Layer("command line", rank)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            layer.problems.append(f"command line: {word}: not of the form section.key=value")
        elif key in layer.settings:
            layer.problems.append(f"command line: {word}: {key} is given twice")
        elif key == "extends":
            layer.problems.append(f"command line: {word}: extends belongs in a recipe")
        elif key in knobs():
            _read_override(layer, key, text)
        elif _map_of(key):
            _read_entry(layer, key, text)
        elif key in sections():
            layer.problems.append(f"command line: {word}: a section; set its keys one by one")
        else:
            layer.problems.append(f"command line: {word}: {unknown_key('', key)}")
    return layer


def _read_override(layer: Layer, key: str, text: str) -> None:
    typed = f"{key}={_short(text)}"
    try:
        value = _value(text)
    except YamlProblem as problem:
        layer.problems.append(f"command line: {typed}: {problem.message}")
        return
    if knobs()[key].is_list and value is not None and not isinstance(value, list):
        value = [value]
    layer.settings[key] = Setting(key, value, layer.source, layer.rank, typed)


def _read_entry(layer: Layer, key: str, text: str) -> None:
    """`data.columns.input=context`: an entry of the map data.columns, beside those given before."""
    owner, typed = _map_of(key), f"{key}={_short(text)}"
    name = key.removeprefix(f"{owner}.")
    before = layer.settings.get(owner)
    entries = before.value if before and isinstance(before.value, dict) else {}
    if name in entries:
        layer.problems.append(f"command line: {typed}: {key} is given twice")
        return
    try:
        entries = {**entries, name: _value(text)}
    except YamlProblem as problem:
        layer.problems.append(f"command line: {typed}: {problem.message}")
        return
    layer.settings[owner] = Setting(owner, entries, layer.source, layer.rank, typed)


def _map_of(key: str) -> str:
    """The map that `key` would be an entry of, or ""."""
    owners = (name for name, knob in knobs().items() if knob.is_map)
    return next((owner for owner in owners if key.startswith(f"{owner}.")), "")


def _value(text: str) -> Any:
    node = parse_yaml(text)
    return None if node is None else plain(node)


def _walk(layer: Layer, node: Node, section: str) -> None:
    """Take the keys of one section and go into the sections below it."""
    if isinstance(node, ScalarNode) and plain(node) is None and section:
        return  # a section whose keys are all commented out
    if not isinstance(node, MappingNode):
        name = f"`{section}`" if section else "a recipe"
        place = f"{layer.source}:{line_of(node)}"
        layer.problems.append(f"{place}: {name} holds keys, such as `{_example(section)}`")
        return
    lines: dict[str, int] = {}
    for name, line, value in mapping_items(node):
        key = f"{section}.{name}" if section else name
        if name in lines:
            layer.problems.append(
                f"{layer.source}:{line}: {key}: given twice (first on line {lines[name]}); "
                "remove one"
            )
        elif key in sections() and "." not in name and name:
            _walk(layer, value, key)
        elif key in knobs() and "." not in name:
            _take(layer, key, line, value)
        else:
            said = unknown_key(section, name)
            layer.problems.append(f"{layer.source}:{line}: {key}: {said}")
        lines.setdefault(name, line)


def _take(layer: Layer, key: str, line: int, node: Node) -> None:
    value = plain(node)
    lines = tuple(line_of(item) for item in node.value) if isinstance(value, list) else ()
    layer.settings[key] = Setting(key, value, layer.source, layer.rank, line=line, item_lines=lines)


def _example(section: str) -> str:
    prefix = f"{section}." if section else ""
    key = next(k for k in knobs() if k.startswith(prefix) and k.removeprefix(prefix) != "name")
    return f"{key.removeprefix(prefix).partition('.')[0]}: ..."


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
