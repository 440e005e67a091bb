"""Imports point down, and what must load fast loads no torch."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys

import pytest

from tests.house.source import Module, imports, modules

# The first layer is itself ordered; within the others no folder imports a sibling.
FOUNDATION = (
    "errors",
    "message",
    "statistics",
    "figures",
    "progress",
    "fsio",
    "french",
    "locks",
    "logs",
    "attempts",
    "hub",
    "batch",
    "machine",
    "native",
    "calibration",
    "config",
)
LAYERS = (
    ("run", "tokenizer", "data", "models"),
    ("adapters", "generate"),
    ("evaluate", "plan", "doctor"),
    ("train",),
    ("export", "serve", "compare"),
    ("lab",),
    ("commands",),
    ("cli", "web"),
)
SIBLINGS = {("data", "tokenizer"), ("cli", "web")}  # `mule ui` starts the pages
RANK = {part: rank for rank, part in enumerate(FOUNDATION)} | {
    part: len(FOUNDATION) + rank for rank, layer in enumerate(LAYERS) for part in layer
}

LIGHT = (
    *("mule.run", "mule.machine", "mule.calibration", "mule.config"),
    *("mule.plan", "mule.doctor", "mule.compare"),
    *("mule.commands", "mule.cli", "mule.models.config", "mule.models.cost", "mule.models.solve"),
)
HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "gguf", "xllamacpp")


def _part(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


def test_every_part_has_a_layer() -> None:
    parts = {_part(module.dotted) for module in modules("mule")} - {""}
    assert parts <= RANK.keys(), f"name a layer for {sorted(parts - RANK.keys())} in this test"


def _wrong_imports(module: Module) -> list[str]:
    part = _part(module.dotted)
    wrong = []
    for name, line in imports(module.tree):
        target = _part(name) if name.startswith("mule.") else ""
        if target not in RANK or target == part or not part or (part, target) in SIBLINGS:
            continue
        if RANK[target] >= RANK[part]:
            wrong.append(f"{module.path}:{line}: {part} imports {name}, which is not below it")
    return wrong


@pytest.mark.parametrize("module", modules("mule"), ids=lambda module: module.path)
def test_imports_point_down(module: Module) -> None:
    assert not (wrong := _wrong_imports(module)), "\n".join(wrong)


@pytest.mark.parametrize(
    ("part", "code", "allowed"),
    [
        ("models", "from mule.train.loop import fit", False),
        ("models", "from mule import tokenizer", False),
        ("data", "from mule.tokenizer import Tokenizer", True),
        ("tokenizer", "from mule.data import chat", False),
        ("fsio", "import mule.config.load", False),
        ("commands", "def run():\n    from mule.cli import main", False),
        ("commands", "from mule.commands import train", True),
        ("train", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import mule.cli", True),
    ],
)
def test_the_test_sees_an_import_that_points_up(part: str, code: str, allowed: bool) -> None:
    module = Module(f"mule/{part}/x.py", code, ast.parse(code))
    assert bool(_wrong_imports(module)) is not allowed


def test_light_modules_import_nothing_heavy_at_the_start() -> None:
    wrong = [
        f"{module.path}:{line}: imports {name} when it is loaded"
        for module in modules("mule")
        if any(module.dotted == light or module.dotted.startswith(f"{light}.") for light in LIGHT)
        for name, line in imports(module.tree, at_start=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_light_modules_bring_no_torch_with_them() -> None:
    names = [
        module.dotted
        for module in modules("mule")
        if any(module.dotted == light or module.dotted.startswith(f"{light}.") for light in LIGHT)
    ]
    assert all(importlib.util.find_spec(name) for name in names)
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} brings torch with it')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
