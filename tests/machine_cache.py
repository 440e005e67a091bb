"""A cache folder of the tests' own, in which this machine is measured already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mule import machine


@contextmanager
def own_machine_cache(folder: Path) -> Iterator[None]:
    """A made-up matmul peak: a busy test machine must not leave its own in the user's cache."""
    compiled = machine.cache_dir() / "native"  # minutes of g++, named by what they are made of
    compiled.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        machine.cache_dir().mkdir()
        (machine.cache_dir() / "native").symlink_to(compiled)
        patch.setattr(machine, "_measure_peak", lambda _device, _dtype: 1e11)
        for dtype in ("bf16", "fp32", "fp16"):
            machine.matmul_peak(dtype, "cpu", machine.physical_cores())
        yield
