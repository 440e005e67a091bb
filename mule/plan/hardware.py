"""The machine that is planned for: this one, as it was measured, or a named one. No torch."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from mule import machine
from mule.calibration import Calibration, Disk
from mule.config.schema import Recipe
from mule.plan.data_rows import DataRows
from mule.plan.estimate import Hardware
from mule.plan.fitted import Fitted
from mule.plan.machines import Named, assumed, grounds
from mule.plan.peak import Process
from mule.plan.resolve import Facts
from mule.plan.work import Speed

_APPLE_SHARE = 0.75  # of unified memory that the GPU may take, about
_USER_SHARE = 0.85  # of a named processor's memory that is free for a run
_FIRST_FLOAT8 = (8, 9)


def this_machine(
    found: Calibration, disk: Disk, folder: Path, fitted: Fitted, precision: str, rows: int
) -> Hardware:
    """As measured; memory and disk as they are free now. `rows` are those of the vocabulary."""
    on_cpu = found.device == "cpu"
    flops = found.matmul_flops
    usual = "bf16" if precision in ("fp8", "auto") else precision
    speed = Speed(
        flops.get(usual, flops["fp32"]),
        flops.get("bf16", flops["fp32"]),
        found.read_bytes_per_second,
        found.operation_s,
    )
    about = assumed()[found.device]
    context = found.import_bytes if on_cpu else about["context_bytes"]
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    return Hardware(
        name=found.device_name,
        device=found.device,
        count=1,
        speed=speed,
        process=Process(context, found.compiler_bytes, rows),
        free_bytes=machine.available_bytes() if on_cpu else found.device_bytes,
        times=fitted.time if on_cpu else about["time"],
        is_calibrated=on_cpu,
        basis="measured on this machine"
        if on_cpu
        else f"rates measured on this machine; shares of them assumed. {grounds(found.device)}",
        import_s=found.import_s,
        disk_bytes_per_s=disk.bytes_per_second,
        flush_s=disk.flush_s,
        free_disk_bytes=shutil.disk_usage(place).free,
    )


def with_threads(found: Hardware, threads: int) -> Hardware:
    """A processor of which a run takes so many cores only: products slow down with them."""
    share = min(1.0, threads / machine.physical_cores())
    flops, bf16 = found.speed.matmul_flops * share, found.speed.bf16_flops * share
    speed = replace(
        found.speed,
        matmul_flops=flops,
        bf16_flops=bf16,
        read_bytes=found.speed.read_bytes * share,
    )
    return replace(found, speed=speed)


def other_machine(named: Named, fitted: Fitted, precision: str, rows: int) -> Hardware:
    """As published."""
    about = assumed()[named.kind]
    is_cpu = named.kind == "cpu"
    process = Process(
        fitted.memory["imports"] if is_cpu else about["context_bytes"],
        fitted.memory["compiler"] if is_cpu else 0,
        rows,
    )
    share = {"cpu": _USER_SHARE, "mps": _APPLE_SHARE, "cuda": 1.0}[named.kind]
    return Hardware(
        name=f"{named.name} x {named.count}" if named.count > 1 else named.name,
        device=named.kind,
        count=named.count,
        speed=named.speed(precision),
        process=process,
        free_bytes=round(share * named.memory_bytes),
        times=fitted.time if is_cpu else about["time"],
        is_calibrated=False,
        basis=f"{named.source}. Shares of these rates are assumed. {grounds(named.kind)}",
        watts=named.watts,
    )


def facts_here(rows: DataRows, found: Calibration, recipe: Recipe, hardware: Hardware) -> Facts:
    """As `mule train` finds them on this machine."""
    compiler = found.device != "mps" and machine.has_cpp_compiler()
    return Facts(
        **_of_rows(rows, recipe),
        cpu_cores=machine.physical_cores(),
        fast_bf16=machine.has_fast_bf16(),
        cpp_compiler=compiler,
        available_bytes=hardware.free_bytes,
        matmul_peak_flops=hardware.speed.matmul_flops,
        cuda=found.device == "cuda",
        mps=found.device == "mps",
        cuda_bf16=found.capability >= (8, 0),
        float8=found.capability >= _FIRST_FLOAT8,
        host_bytes=machine.available_bytes(),
        disk_bytes=hardware.free_disk_bytes or 0,
    )


def facts_there(rows: DataRows, named: Named, recipe: Recipe, hardware: Hardware) -> Facts:
    """As `mule train` would find them on a named machine, with a process for each of its GPUs."""
    host = assumed()[named.kind]["host_bytes"]
    return Facts(
        **_of_rows(rows, recipe),
        cpu_cores=named.cores,
        fast_bf16="bf16" in named.matmul_flops and named.kind == "cpu",
        cpp_compiler=True,
        available_bytes=hardware.free_bytes,
        matmul_peak_flops=hardware.speed.matmul_flops,
        cuda=named.kind == "cuda",
        mps=named.kind == "mps",
        cuda_bf16=named.capability >= (8, 0),
        float8=named.capability >= _FIRST_FLOAT8,
        num_processes=named.count,
        processes_per_machine=named.count,
        host_bytes=host if named.kind == "cuda" else hardware.free_bytes,
        disk_bytes=1 << 60,
    )


def _of_rows(rows: DataRows, recipe: Recipe) -> dict[str, Any]:
    return {
        "num_rows": rows.num_rows,
        "row_length": rows.row_length,
        "targets_per_row": rows.targets_per_row,
        "examples_per_row": rows.examples_per_row,
        "isolated": rows.isolated,
        "num_chats": rows.num_items if rows.kind == "chat" else 0,
        "num_valid_rows": min(rows.num_valid_rows, recipe.evaluate.max_rows),
    }
