"""The command line in this process, for the tests of its verbs."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mule.cli import main as cli

Mule = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mule_cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Mule:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mule", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace a function of mule.commands.<verb> for one test."""

    def put(verb: str, function: str, work: Callable[..., Any]) -> None:
        module = types.ModuleType(f"mule.commands.{verb}")
        setattr(module, function, work)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        import mule.commands

        monkeypatch.setattr(mule.commands, verb, module, raising=False)

    return put
