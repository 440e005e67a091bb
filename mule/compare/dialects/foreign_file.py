"""Reading another tool's settings: a YAML or JSON file, a command line, or `NAME=value` lines.

Strict and safe as recipes are read (mule/config/reader.py); nothing is run or followed. Settings
come back flat, with dotted keys: `optimizer.init_args.lr`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from mule.compare.dialects.table import Given
from mule.config.load import recipe_text
from mule.config.reader import MAX_BYTES, YamlProblem, line_of, mapping_items, parse_yaml, plain
from mule.errors import ConfigError, UserError

_YES, _NO = {"yes", "on"}, {"no", "off"}  # booleans in YAML 1.1, which all these tools read
_VARIABLE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*[:?]?=\s*(.*)")
_SIMPLE = re.compile(r"\s*(?:export\s+)?([A-Za-z_]\w*)=[\"']?([^\"'`()]*)[\"']?\s*")
_MOST_NESTED = 5  # variables in the values of variables
_SECRET = re.compile(
    r"(^|_|\.)((hf|hub|ms_hub|om_hub|hf_hub|wandb|auth|access|api)_(token|key)|api_key|secret|password)$",
    re.IGNORECASE,
)
HIDDEN = "(not shown)"

# what a command runs -> the tool, the first that fits
_PROGRAMS: tuple[tuple[str, str], ...] = (
    (r"\btrl\s+sft\b|\bsft\.py\b|\brun_sft\.py\b", "trl"),
    (r"\bllamafactory-cli\b|\bsrc/train\w*\.py\b", "llama-factory"),
    (r"\bmlx_lm[. ]lora\b|\bmlx_lm\.lora\b", "mlx-lm"),
    (r"\blitgpt\s+(finetune\w*|pretrain)\b", "litgpt"),
    (r"\baxolotl\b", "axolotl"),
    (r"\bfine-tune\.sh\b|\bmake\s+(train|all)\b", "donkeytune"),
)


@dataclass(frozen=True)
class Foreign:
    """A file of settings; `program` is the tool a command line calls, "" in other files."""

    file: str
    given: dict[str, Given]
    form: Literal["yaml", "command", "variables"]
    program: str = ""


def read_foreign(file: Path) -> Foreign:
    """The settings in a file. Raises UserError or ConfigError with file and line."""
    if not file.is_file():
        what = "a folder, not a file of settings" if file.is_dir() else "no such file"
        raise UserError(f"{file}: {what}", "give the tool's file: mule recipe import config.yaml")
    text = recipe_text(file)
    if file.suffix.lower() not in (".yaml", ".yml", ".json"):
        if found := _command(text):
            program, command, line = found
            command = _without_variables(text, command, str(file), line)
            return _from_command(str(file), program, command, line)
        if variables := _variables(text):
            return Foreign(str(file), variables, "variables")
    return Foreign(str(file), _from_yaml(str(file), text), "yaml")


# ---------------------------------------------------------------- YAML


def _from_yaml(source: str, text: str) -> dict[str, Given]:
    hint = "mend that line; nothing was imported"
    try:
        node = parse_yaml(text)
        if node is None:
            raise ConfigError([f"{source}: it is empty"], "give the tool's file of settings")
        if not isinstance(node, MappingNode):
            raise ConfigError(
                [f"{source}:{line_of(node)}: no settings here; they are written `key: value`"],
                "give the tool's file of settings, not its data",
            )
        plain(node)  # refuses aliases that expand without end before they are walked
        return _flat(node, "")
    except YamlProblem as problem:
        raise ConfigError([f"{source}:{problem.line}: {problem.message}"], hint) from None


def _flat(node: MappingNode, prefix: str) -> dict[str, Given]:
    found: dict[str, Given] = {}
    for name, line, value in mapping_items(node):
        key = f"{prefix}{name}"
        if isinstance(value, MappingNode) and value.value:
            found |= _flat(value, f"{key}.")
        else:
            found[key] = _given(key, _value(value), line)
    return found


def _value(node: Node) -> Any:
    if isinstance(node, ScalarNode) and node.style is None and node.value.lower() in _YES | _NO:
        return node.value.lower() in _YES
    return plain(node)


def _given(key: str, value: Any, line: int | None) -> Given:
    """The setting; what looks like a password is never kept."""
    return Given(key, HIDDEN if value is not None and _SECRET.search(key) else value, line)


# ---------------------------------------------------------------- commands and variables


def _command(text: str) -> tuple[str, str, int] | None:
    """(program, command, line) of the first command that a known tool runs."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        first, command = number, lines[number]
        while command.rstrip().endswith("\\") and number + 1 < len(lines):
            number += 1
            command = f"{command.rstrip()[:-1]} {lines[number]}"
        number += 1
        if command.lstrip().startswith("#"):
            continue
        for pattern, program in _PROGRAMS:
            if re.search(pattern, command):
                return program, command, first + 1
    return None


def _from_command(source: str, program: str, command: str, line: int) -> Foreign:
    try:
        words = _until_operator(shlex.split(command, comments=True))
    except ValueError as error:
        problem = f"{source}:{line}: not a command a shell would take: {error}"
        raise ConfigError([problem], "close the quotes; nothing was imported") from None
    given: dict[str, Given] = {}
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word.startswith("--"):
            name, equals, text = word[2:].partition("=")
            values = [text] if equals else []
            while not equals and index < len(words) and not _ends_values(words[index]):
                values.append(words[index])
                index += 1
            key = name.replace("-", "_")
            given[key] = _given(key, _of_words(values), line)
        elif variable := _VARIABLE.fullmatch(word):
            given[variable[1]] = _given(variable[1], _typed(variable[2]), line)
        else:
            file = Path(word)
            if file.suffix in (".yaml", ".yml") and program in ("axolotl", "llama-factory"):
                problem = f"{source}:{line}: the settings are in {word}, not in this command"
                raise ConfigError([problem], f"mule recipe import {word}")
            if program == "litgpt" and word not in ("litgpt", "finetune", "lora", "full"):
                key = "model_name" if "pretrain" in words[:2] else "checkpoint_dir"
                if not word.startswith(("finetune", "pretrain")):
                    given.setdefault(key, Given(key, word, line))
    return Foreign(source, given, "command", program)


def _until_operator(words: list[str]) -> list[str]:
    """The words of the command, without what the shell does with its output."""
    for index, word in enumerate(words):
        if re.match(r"\d?>|\||&|;", word):
            return words[:index]
    return [word for word in words if word not in ("$@", "${@}")]


def _without_variables(text: str, command: str, source: str, line: int) -> str:
    """The command with the variables that the script itself sets put in; nothing is run."""
    num_chars = 0
    values = {match[1]: match[2] for one in text.splitlines() if (match := _SIMPLE.fullmatch(one))}

    def put(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in values:
            problem = f"{source}:{line}: the value of ${name} does not stand in this file"
            raise ConfigError([problem], f"write the value in its place, or {name}=VALUE above")
        nonlocal num_chars
        num_chars += len(values[name])
        if num_chars > MAX_BYTES:
            problem = f"{source}:{line}: its variables expand without end"
            raise ConfigError([problem], "write the values out")
        return values[name]

    for _ in range(_MOST_NESTED):
        replaced = re.sub(r"\$(?:\{(\w+)\}|(\w+))", put, command)
        if replaced == command:
            break
        command = replaced
    return command


def _ends_values(word: str) -> bool:
    """Whether a word is an option, or the script that a launcher starts."""
    is_option = word.startswith("--") or (word.startswith("-") and not re.match(r"-[\d.]", word))
    return is_option or word.endswith((".py", ".sh"))


def _of_words(values: list[str]) -> Any:
    if not values:
        return True
    return _typed(values[0]) if len(values) == 1 else [_typed(value) for value in values]


def _variables(text: str) -> dict[str, Given]:
    """`NAME=value` lines; nothing when the file holds anything else."""
    found: dict[str, Given] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _VARIABLE.fullmatch(line)
        if match is None:
            return {}
        value = match[2].strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        value = value[1:-1] if quoted else value.partition(" #")[0].strip()
        found[match[1]] = _given(match[1], _typed(value), number)
    return found


def _typed(text: str) -> Any:
    """A word of a command line as its tool reads it: numbers, true and false, else text."""
    if text == "":
        return None
    if re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)
