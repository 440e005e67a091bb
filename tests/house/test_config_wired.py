"""Every setting of the recipe is read somewhere: a knob that does nothing is a lie."""

from __future__ import annotations

import ast
import functools

import pytest

from mule.config.knobs import Knob, knobs
from tests.house.source import modules

RESOLVED_BY_THE_LOADER = {"extends"}


@functools.cache
def _read_names() -> set[str]:
    """Attributes read, and keys named by text (plan fills sections by key), outside the config."""
    names: set[str] = set()
    for module in modules("mule"):
        if module.path.startswith("mule/config/"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


@pytest.mark.parametrize("knob", knobs().values(), ids=lambda knob: knob.key)
def test_every_setting_is_read(knob: Knob) -> None:
    if knob.key not in RESOLVED_BY_THE_LOADER:
        assert knob.name in _read_names(), f"{knob.key} is read nowhere outside mule/config"
