"""What `mule plan` must know of this machine: about ten seconds of measuring, once, then kept.

The measuring needs torch and what a run imports, so a child process does it; with its result in the
user's cache nothing here imports torch. Figures only get better: other work can only lower them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mule import fsio, machine, progress
from mule.errors import UserError

_RUN = "mule.cli.main", "mule.commands.train", "mule.train.assemble", "mule.train.loop"
_FILE = "calibration.json"  # of the cache
_COMPILER = "torch._dynamo", "torch._inductor.compile_fx"
_CHILD = "import sys; from mule import calibration; calibration.measure(sys.argv[1])"
_LIMIT_S = 900.0
_CALLS, _TRIES = 200, 5  # of tiny operations, whose time is that of the call
_WRITTEN_BYTES = 1 << 26


@dataclass(frozen=True)
class Calibration:
    """This machine's device for training, its ideal rates, and what a process of a run begins with.

    `matmul_flops` is in the precision that training takes here, `bf16_flops` in bf16; memory is that
    of the GPU, or 0 where the processor computes. `capability` is a CUDA device's.
    """

    device: str
    device_name: str
    device_bytes: int
    capability: tuple[int, int]
    precision: str
    matmul_flops: dict[str, float]
    read_bytes_per_second: float
    operation_s: float
    import_bytes: int
    compiler_bytes: int
    import_s: float


@dataclass(frozen=True)
class Disk:
    """How fast a disk takes what is written and flushed, and how long a flush takes by itself."""

    bytes_per_second: float
    flush_s: float


def calibration(*, fresh: bool = False) -> Calibration:
    """As kept for this machine and this torch; measured now in a child process when it is not."""
    known = machine.read_cached(_FILE).get(_key())
    if known is not None and not fresh:
        return _calibration(known)
    with progress.task("Measuring this machine", total=None):
        command = [sys.executable, "-c", _CHILD, _key()]
        try:
            ran = subprocess.run(
                command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise _failed(f"not done after {_LIMIT_S:.0f} s") from None
    found = machine.read_cached(_FILE).get(_key())
    if ran.returncode or found is None:
        raise _failed((ran.stderr.strip().splitlines() or ["nothing was kept"])[-1])
    return _calibration(found)


def is_known() -> bool:
    """Whether this machine was measured before."""
    return _key() in machine.read_cached(_FILE)


def disk(folder: Path) -> Disk:
    """Of the disk that holds `folder`, or will; measured once for each disk."""
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    key = f"disk {place.stat().st_dev}"
    known = machine.read_cached(_FILE)
    if key not in known:
        known[key] = asdict(_measured_disk(place))
        machine.write_cached(_FILE, known, "what was measured")
    return Disk(**known[key])


# ---------------------------------------------------------------- in the child


def measure(key: str) -> None:
    """Measure the machine and keep it under `key`; for a fresh process, whose memory counts too."""
    began = time.perf_counter()
    import_bytes = _resident_after(_RUN)
    import_s = time.perf_counter() - began
    compiler_bytes = _resident_after(_COMPILER) - import_bytes
    found = _rates(import_bytes, max(0, compiler_bytes), import_s)
    known = machine.read_cached(_FILE)
    before = known.get(key)
    best = _better(found, _calibration(before)) if before else found
    machine.write_cached(_FILE, known | {key: asdict(best)}, "what was measured")


def _resident_after(modules: tuple[str, ...]) -> int:
    """Bytes that this process holds once it has imported these."""
    import importlib

    import psutil

    for module in modules:
        importlib.import_module(module)
    return psutil.Process().memory_info().rss


def _rates(import_bytes: int, compiler_bytes: int, import_s: float) -> Calibration:
    import torch

    device, name, num_bytes, capability = "cpu", machine.cpu_model(), 0, (0, 0)
    if torch.cuda.is_available():
        device, name = "cuda", torch.cuda.get_device_name()
        num_bytes, capability = torch.cuda.mem_get_info()[1], torch.cuda.get_device_capability()
    elif torch.backends.mps.is_available():
        device, num_bytes = "mps", torch.mps.recommended_max_memory()
    threads = machine.physical_cores()
    kinds = ("fp32", "bf16") if device == "cpu" else ("fp32", "bf16", "fp16")
    flops = {kind: machine.matmul_peak(kind, device, threads) for kind in kinds}
    fast = machine.has_fast_bf16() if device == "cpu" else device == "mps" or capability >= (8, 0)
    slow = "fp16" if device == "cuda" else "fp32"
    return Calibration(
        device=device,
        device_name=name,
        device_bytes=num_bytes,
        capability=capability,
        precision="bf16" if fast else slow,
        matmul_flops=flops,
        read_bytes_per_second=machine.read_bandwidth(device, threads),
        operation_s=_operation_s(device),
        import_bytes=import_bytes,
        compiler_bytes=compiler_bytes,
        import_s=import_s,
    )


def _operation_s(device: str) -> float:
    """Seconds of one call of a kernel with next to nothing to do, forward and backward."""
    import torch

    x = torch.ones(8, 8, device=device, requires_grad=True)
    best = float("inf")
    for _ in range(_TRIES):
        began = time.perf_counter()
        y = x
        for _ in range(_CALLS // 2):
            y = y * x
        y.sum().backward()
        float(x.detach()[0, 0])
        best = min(best, time.perf_counter() - began)
    return best / (1.5 * _CALLS)  # a product has one call forward, and two backward


def _better(found: Calibration, before: Calibration) -> Calibration:
    """The best that was ever measured."""
    kinds = found.matmul_flops.keys() & before.matmul_flops.keys()
    flops = {kind: max(found.matmul_flops[kind], before.matmul_flops[kind]) for kind in kinds}
    rate = max(found.read_bytes_per_second, before.read_bytes_per_second)
    return replace(
        found,
        matmul_flops=found.matmul_flops | flops,
        read_bytes_per_second=rate,
        operation_s=min(found.operation_s, before.operation_s),
        import_s=min(found.import_s, before.import_s),
    )


# ---------------------------------------------------------------- disk and cache


def _measured_disk(place: Path) -> Disk:
    """Written, flushed and removed at once, as a checkpoint is."""
    block = os.urandom(1 << 22)
    file = place / f".mule-disk-{os.getpid()}"
    try:
        with fsio.explain_storage(file), open(file, "wb") as out:
            began = time.perf_counter()
            for _ in range(_WRITTEN_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
            took = time.perf_counter() - began
            began = time.perf_counter()
            out.write(b"0")
            out.flush()
            os.fsync(out.fileno())
            flush_s = time.perf_counter() - began
    finally:
        file.unlink(missing_ok=True)
    return Disk(_WRITTEN_BYTES / took, flush_s)


def _key() -> str:
    cores = machine.physical_cores()
    return f"{machine.cpu_model()} | {cores} cores | torch {machine.torch_version()}"


def _calibration(raw: dict[str, Any]) -> Calibration:
    values: dict[str, Any] = raw | {"capability": tuple(raw["capability"])}
    return Calibration(**values)


def _failed(why: str) -> UserError:
    return UserError(
        f"this machine could not be measured: {why}",
        "see whether training works here: mule demo --fast; or plan for a named machine: "
        "mule plan RECIPE --machine rtx4090",
    )
