"""The rules, one file each: <code>_<slug>.py defines `RULE`, and its docstring explains it.

Each docstring has four headings: What it sees, Why it matters, What to do, Source.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType

from mule.doctor.finding import Rule


@functools.cache
def all_rules() -> tuple[Rule, ...]:
    """Every rule, by its code."""
    return tuple(module.RULE for module in _modules())


def rule_texts() -> dict[str, str]:
    """The docstring of each rule's file, by the rule's code."""
    return {module.RULE.code: (module.__doc__ or "").strip() for module in _modules()}


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    files = [name for name in names if name[0] == "d" and name[1:4].isdigit()]
    return [importlib.import_module(f"{__name__}.{name}") for name in files]
