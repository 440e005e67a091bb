"""Broken files, made by the thousand: a reader ends with rows or a MuleError, in time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.mutate import json_text, mutate
from tests.fuzz.readers import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seconds", [1, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_only_mule_errors_come_out(tmp_path: Path, target: str, seconds: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.readers", target, str(seconds), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    left = [file.read_bytes()[:2000] for file in tmp_path.iterdir()]
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}\ninput: {left}"
    assert int(done.stdout) >= 20 * seconds


def test_the_same_seed_makes_the_same_input() -> None:
    seeds = [b"one two three" * 9, b"four"]
    made = [[mutate(Random(n), seeds) for n in range(200)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 100
    assert json_text(Random(3)) == json_text(Random(3))
