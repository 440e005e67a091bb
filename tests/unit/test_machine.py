"""The machine's figures are plausible, and the measured peak is kept."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mule import machine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mule" / "machine.json"


def test_cores_and_memory_are_plausible() -> None:
    assert 1 <= machine.physical_cores() <= (os.cpu_count() or 1)
    assert 0 < machine.available_bytes() <= machine.total_bytes()
    assert machine.cpu_model()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_affinity_limits_the_cores() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    machine.physical_cores.cache_clear()
    try:
        assert machine.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
        machine.physical_cores.cache_clear()


def test_a_container_limits_cores_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("300000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine._cgroup_cpus() == 2
    assert machine.total_bytes() == 1_000_000
    assert machine.available_bytes() == 700_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._cgroup_cpus() > 10_000
    assert machine.total_bytes() > 10_000_000


def test_a_missing_or_broken_compiler_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = machine.cpp_compiler_problem.__wrapped__
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert str(problem()).startswith("no C++ compiler")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    if "headers" not in str(problem()):
        assert str(problem()).endswith("does not work: it is broken")


def test_the_peak_is_measured_once_and_kept(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_PEAK_SIZES", (48, 96))
    monkeypatch.setattr(machine, "_PEAK_S", 0.01)
    peak = machine.matmul_peak("fp32", threads=1)
    assert peak > 1e6
    ((key, kept),) = json.loads(own_cache.read_text()).items()
    assert kept == peak
    assert machine.cpu_model() in key and "1 threads" in key and key.endswith("fp32")
    monkeypatch.setattr(machine, "_measure_peak", lambda *_: 1.0)
    assert machine.matmul_peak("fp32", threads=1) == peak
    assert machine.matmul_peak("fp32", threads=1, fresh=True) == 1.0  # as it is now
    assert machine.matmul_peak("fp32", threads=1) == peak  # the larger one stays
    assert machine.matmul_peak("bf16", threads=1) == 1.0


def test_a_torn_cache_is_measured_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cache.parent.mkdir()
    own_cache.write_text("{")
    monkeypatch.setattr(machine, "_measure_peak", lambda *_: 2.0)
    assert machine.matmul_peak("fp32", threads=1) == 2.0
    assert json.loads(own_cache.read_text())


def test_the_report_is_json() -> None:
    report = machine.describe()
    assert json.loads(json.dumps(report)) == report
    assert report["cores"] == machine.physical_cores()


def test_memory_is_read_at_some_speed() -> None:
    import torch

    threads = torch.get_num_threads()
    assert machine.read_bandwidth(threads=1, num_bytes=2**20) > 1e6
    assert torch.get_num_threads() == threads


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a promise about glibc")
@pytest.mark.parametrize("given", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["kept", "told"])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(given: dict[str, str]) -> None:
    code = """
import ctypes, resource
from mule import machine
machine.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(2**27), faults(2**27))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | given
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    first, second = map(int, ran.stdout.split())
    assert first > 1000  # 2**27 bytes are 32,768 pages
    assert (second > 1000) == bool(given)
