"""What pyproject asks for beside what is installed, without importing any of it."""

from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"  # of a checkout
_EVERY_RUN = ""  # the extra of what Mule cannot do without


@dataclass(frozen=True)
class Package:
    """A package: the range asked for, the version installed or None, and the extra that wants it."""

    name: str
    wanted: str
    installed: str | None
    extra: str

    @property
    def fits(self) -> bool:
        """Whether a version is installed that the range allows."""
        if self.installed is None:
            return False
        return Requirement(f"{self.name}{self.wanted}").specifier.contains(
            self.installed, prereleases=True
        )


def packages() -> list[Package]:
    """Those of every run first, then those of each extra; without the ones for developers."""
    found = []
    for extra, lines in _asked().items():
        for line in lines:
            asked = Requirement(line)
            if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                found.append(
                    Package(asked.name, str(asked.specifier), installed_version(asked.name), extra)
                )
    return found


def extras() -> list[str]:
    """The names of the extras, without the one for developers."""
    return [extra for extra in _asked() if extra]


def install_command(missing: Iterable[Package]) -> str:
    """What brings these packages into the Python that runs now."""
    words = [shlex.quote(f"{package.name}{package.wanted}") for package in missing]
    pins = _PYPROJECT.with_name("constraints.txt")
    pinned = ["-c", _as_typed(pins)] if pins.is_file() else []
    return " ".join([python(), "-m pip install", *pinned, *words])


def python() -> str:
    """This Python as one types it: relative where it lies below the current folder."""
    return _as_typed(Path(sys.executable))


def _as_typed(file: Path) -> str:
    here = Path.cwd()
    return shlex.quote(str(file.relative_to(here) if file.is_relative_to(here) else file))


def installed_version(name: str) -> str | None:
    """The version in the metadata; None of a package that is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _asked() -> dict[str, list[str]]:
    """Requirements by extra, in pyproject's order: from a checkout's file, else as installed."""
    if _PYPROJECT.is_file():
        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        asked = {_EVERY_RUN: project["dependencies"]} | project["optional-dependencies"]
    else:
        asked = _asked_as_installed()
    return {extra: lines for extra, lines in asked.items() if extra != "dev"}


def _asked_as_installed() -> dict[str, list[str]]:
    """The same from the metadata of the installed package, whose markers name the extras."""
    found = metadata.metadata("mule")
    asked: dict[str, list[str]] = {_EVERY_RUN: []}
    asked |= {extra: [] for extra in found.get_all("Provides-Extra") or []}
    for line in metadata.requires("mule") or []:
        marker = Requirement(line).marker
        if marker is None or marker.evaluate({"extra": _EVERY_RUN}):
            asked[_EVERY_RUN].append(line)
            continue
        for extra in asked:
            if extra and f'extra == "{extra}"' in str(marker):
                asked[extra].append(line)
    return asked
