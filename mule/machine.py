"""What this machine is: cores, memory, instructions, a compiler, and its measured matmul peak.

Limits of a container (CPU affinity, cgroup quota and memory) count as the machine.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mule import fsio, progress
from mule.errors import StorageError

if TYPE_CHECKING:
    import torch

_PEAK_SIZES = (1024, 2048, 4096)
_PEAKS = "machine.json"  # of the cache
_PEAK_S = 0.3  # measuring time for each size
_TOO_SLOW_S = 5.0  # a size expected to take longer for one product is left out
_READ_BYTES, _READ_WIDTH = 2**30, 4096  # of floats in a row of what is read for the bandwidth
_CGROUP = Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


# ---------------------------------------------------------------- processor


@functools.cache
def cpu_model() -> str:
    """The processor's name, as its maker writes it."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name") or _cpuinfo("Model") or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that matter here: amx_bf16, avx512_bf16, or Arm's bf16."""
    if platform.system() == "Darwin":
        return frozenset({"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else ())
    words = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return frozenset(words) & {"amx_bf16", "avx512_bf16", "bf16"}


def has_fast_bf16() -> bool:
    """True when the CPU multiplies bf16 in hardware."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


@functools.cache
def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once, at least 1."""
    if not hasattr(os, "sched_getaffinity"):  # macOS
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _cgroup_cpus()))


# ---------------------------------------------------------------- memory


def total_bytes() -> int:
    """Memory of the machine, or of its container when that is less."""
    return min(psutil.virtual_memory().total, _cgroup_number("memory.max") or 2**63)


def available_bytes() -> int:
    """Memory that can still be used without swapping."""
    free = psutil.virtual_memory().available
    limit = _cgroup_number("memory.max")
    if limit is None:
        return free
    return max(0, min(free, limit - (_cgroup_number("memory.current") or 0)))


@functools.cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what is asked for next, unless MALLOC_... is set.

    A training update frees and asks for the same memory as the one before: given back to the system in
    between, it costs a small model a tenth of its time in page faults (docs/log.md).
    """
    is_given = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not is_given:
        c_library = ctypes.CDLL(None)
        c_library.mallopt(_M_MMAP_THRESHOLD, 2**30)
        c_library.mallopt(_M_TRIM_THRESHOLD, -1)


# ---------------------------------------------------------------- compiler


def has_cpp_compiler() -> bool:
    """True when torch.compile can build its CPU kernels."""
    return cpp_compiler_problem() is None


@functools.cache
def cpp_compiler_problem() -> str | None:
    """Why torch.compile cannot build CPU kernels here; None when it can."""
    default = "clang++" if platform.system() == "Darwin" else "g++"
    compiler = shutil.which(os.environ.get("CXX", default))  # as torch chooses it
    if compiler is None:
        return f"no C++ compiler ({default}) is installed"
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        return f"Python's headers are not installed (no Python.h in {include})"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <vector>\nint main() { return std::vector<int>(1)[0]; }\n")
        command = [compiler, "-c", str(source), "-o", f"{folder}/probe.o"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if ran.returncode == 0 else f"{compiler} does not work: {ran.stderr[:200].strip()}"


# ---------------------------------------------------------------- peak


def matmul_peak(
    dtype_name: str, device: str = "cpu", threads: int | None = None, *, fresh: bool = False
) -> float:
    """Best FLOP/s of square matmuls of 1024, 2048 and 4096 in bf16, fp32 or fp16.

    fp8 is measured against bf16's, so that its share of the peak may exceed 1.
    Measured once a machine and kept in the user's cache, the largest figure ever seen, since other
    work can only lower it. `fresh` measures now and gives that figure, whatever is kept.
    """
    threads = threads or physical_cores()
    dtype_name = "bf16" if dtype_name == "fp8" else dtype_name
    key = (
        f"{_named(device)} | {device} | {threads} threads | torch {torch_version()} | {dtype_name}"
    )
    known = read_cached(_PEAKS)
    if key in known and not fresh:
        return known[key]
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = _measure_peak(torch.device(device), dtypes[dtype_name])
    finally:
        torch.set_num_threads(before)
    write_cached(_PEAKS, {**known, key: max(peak, known.get(key, 0.0))}, "the measured peak")
    return peak


def torch_version() -> str:
    """The installed torch's, without importing it."""
    return importlib.metadata.version("torch")


def _named(device: str) -> str:
    """What computes: the processor, or the GPU, whose name only torch knows."""
    if not device.startswith("cuda"):
        return cpu_model()
    import torch

    return torch.cuda.get_device_name()


def _measure_peak(device: torch.device, dtype: torch.dtype) -> float:
    import torch

    best = 0.0
    with progress.task("Measuring the matmul peak", total=len(_PEAK_SIZES)) as bar:
        for size in _PEAK_SIZES:
            flops = 2.0 * size**3
            if best and flops / best > _TOO_SLOW_S:
                break
            a = torch.randn(size, size, device=device).to(dtype)
            out = torch.empty_like(a)
            wait = _waiter(device)
            best = max(best, _best_rate(lambda a=a, o=out: torch.mm(a, a, out=o), wait, flops))
            bar.advance(1, gflops=best / 1e9)
    return best


def _best_rate(multiply: Callable[[], Any], wait: Callable[[], None], flops: float) -> float:
    """The most a second of single calls within the measuring time; the first call warms up."""
    best, calls, started_at = 0.0, 0, time.perf_counter()
    while calls < 2 or time.perf_counter() - started_at < _PEAK_S:
        before = time.perf_counter()
        multiply()
        wait()
        best = max(best, flops / (time.perf_counter() - before))
        calls += 1
    return best


def read_bandwidth(
    device: str = "cpu", threads: int | None = None, *, num_bytes: int = _READ_BYTES
) -> float:
    """Bytes a second that memory gives: the best of some sums and matrix-vector products of more
    than any cache holds."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        data = torch.ones(num_bytes // 4, device=device).view(-1, _READ_WIDTH)
        vector = torch.ones(_READ_WIDTH, device=device)
        reads, wait = (data.sum, lambda: data @ vector), _waiter(data.device)
        return max(_best_rate(read, wait, float(num_bytes)) for read in reads)
    finally:
        torch.set_num_threads(before)


def _waiter(device: torch.device) -> Callable[[], None]:
    import torch

    if device.type == "cuda":
        return torch.cuda.synchronize
    return torch.mps.synchronize if device.type == "mps" else lambda: None


# ---------------------------------------------------------------- report


def describe() -> dict[str, Any]:
    """The machine in a few figures, for reports."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": physical_cores(),
        "cpu_flags": sorted(cpu_flags()),
        "memory_bytes": total_bytes(),
        "python": platform.python_version(),
        "compiler": cpp_compiler_problem() or "works",
    }


# ---------------------------------------------------------------- inside


def cache_dir() -> Path:
    """Where Mule keeps what it can measure or compute again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mule"


def read_cached(name: str) -> dict[str, Any]:
    """What `write_cached` kept in that file of the cache; empty where there is none."""
    try:
        return fsio.read_json(cache_dir() / name)
    except StorageError:  # absent or torn: it is only a cache, measure again
        return {}


def write_cached(name: str, values: dict[str, Any], what: str) -> None:
    """Keep measurements in a file of the cache; where that fails, say that `what` is not kept."""
    try:
        fsio.write_json(cache_dir() / name, values)
    except StorageError as error:
        progress.note(f"{what} is not kept: {error.message}", "warning")


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _sysctl(name: str) -> str:
    ran = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def _siblings(cpu: int) -> str:
    """The hyper-threads of a CPU's core, as the kernel lists them: equal for all of them."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(cpu)


def _cgroup_cpus() -> int:
    """Whole CPUs the container's quota allows; very many without one."""
    path = _CGROUP / "cpu.max"
    quota, _, period = path.read_text().partition(" ") if path.exists() else ("max", "", "")
    return max(1, round(int(quota) / int(period))) if quota != "max" else 2**31


def _cgroup_number(name: str) -> int | None:
    path = _CGROUP / name
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None
