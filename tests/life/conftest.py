"""Fixtures of the life tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.life.harness_ranks import Ranks
from tests.life.tiny_life import Forker


@pytest.fixture(scope="package", autouse=True)
def machine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A made-up matmul peak: a busy test machine must not leave its own in the user's cache."""
    from mule import machine

    compiled = machine.cache_dir() / "native"  # minutes of g++, named by what they are made of
    compiled.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        machine.cache_dir().mkdir()
        (machine.cache_dir() / "native").symlink_to(compiled)
        patch.setattr(machine, "_measure_peak", lambda _device, _dtype: 1e11)
        for dtype in ("bf16", "fp32", "fp16"):
            machine.matmul_peak(dtype, "cpu", machine.physical_cores())
        yield


@pytest.fixture(scope="package")
def forker(machine_cache: None) -> Iterator[Forker]:
    """The fork server, started when the first test asks for it."""
    server = Forker()
    yield server
    server.close()


@pytest.fixture(scope="package")
def ranks(machine_cache: None) -> Iterator[Ranks]:
    """The server of several processes, started when the first test asks for it."""
    server = Ranks()
    yield server
    server.close()
