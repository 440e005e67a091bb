"""What a dialect is: the keys of another tool, what each means here, and what the tool assumes.

A key gives a fact. Facts that have a setting of ours carry its dotted key (`optim.learning_rate`);
the others (`micro_rows`, `warmup_share`, `bf16`) need another fact beside them before they become
settings, which mule/compare/dialects/to_recipe.py does once for all tools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from mule.config.aliases import ALIASES
from mule.config.knobs import knobs

if TYPE_CHECKING:
    from mule.compare.dialects.foreign_setup import ForeignSetup

Convert = Callable[[Any], Any]


@dataclass(frozen=True)
class Given:
    """A setting as the file has it: the dotted key, the value, and the line it stands on."""

    key: str
    value: Any
    line: int | None = None


@dataclass(frozen=True)
class Key:
    """A key that gives a fact; `convert` may return None where the value says nothing."""

    fact: str
    convert: Convert | None = None
    note: str = ""


@dataclass(frozen=True)
class Left:
    """A key that gives no setting: what it is about, and what happens without it.

    speed: how fast or in how much memory, which Mule decides by itself; report: logging and files;
    lost: it changes what is learned, and nothing here does the same. `off` are its harmless values.
    """

    kind: Literal["speed", "report", "lost"]
    happens: str = ""
    off: tuple[Any, ...] = (None, False, "", 0, "no", "none")


Entry = Key | Left


@dataclass(frozen=True)
class Trap:
    """Something that means another thing than it seems: what, why, and what to do."""

    key: str
    text: str


@dataclass(frozen=True)
class Dialect:
    """A tool's settings.

    `keys` may hold patterns with `*`; `defaults` are the facts that the tool assumes, as of
    `version`; `signs` are keys that only this tool has; `read` adds the facts that need more than
    one key, and `traps` what its users get wrong.
    """

    name: str
    title: str
    version: str
    keys: Mapping[str, Entry]
    signs: frozenset[str]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[ForeignSetup], None] | None = None
    traps: Callable[[ForeignSetup], list[Trap]] | None = None

    def entry(self, key: str) -> Entry | None:
        """The entry of a dotted key, exact names before patterns."""
        if key in self.keys:
            return self.keys[key]
        patterns = (name for name in self.keys if "*" in name)
        return next((self.keys[name] for name in patterns if fnmatchcase(key, name)), None)

    def is_section(self, key: str) -> bool:
        """Whether keys of its own stand below it."""
        return any(name.startswith(f"{key}.") for name in self.keys)

    def names(self) -> list[str]:
        """Every key it knows by its full name."""
        return [name for name in self.keys if "*" not in name]


def ours(name: str) -> str:
    """The setting that a foreign key of this name means: by the aliases, or by being called so."""
    known = ALIASES.get(name, "")
    if known and " " not in known:
        return known
    leaves = [key for key in knobs() if key.rpartition(".")[2] == name]
    if len(leaves) != 1:
        raise KeyError(f"{name}: no alias and not the name of one setting")
    return leaves[0]


def same(*names: str) -> dict[str, Entry]:
    """Keys that mean one of our settings, value for value."""
    return {name: Key(ours(name)) for name in names}


def left(
    kind: Literal["speed", "report", "lost"], *names: str, happens: str = ""
) -> dict[str, Entry]:
    """Keys that give no setting, all for the same reason."""
    return dict.fromkeys(names, Left(kind, happens))
