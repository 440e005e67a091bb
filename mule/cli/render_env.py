"""What `mule doctor --env` found, on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from mule.cli import render
from mule.figures import in_bytes

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"ready": "green", "missing": "yellow", "not here": "dim", "broken": "bold red"}


def show_env(console: Console, result: dict[str, Any]) -> None:
    """The machine and its Python in a few lines, where things are, and what works."""
    for name, text in (*_machine(result["machine"]), *_software(result)):
        console.print(Text.assemble((f"{name:<11}", "bold"), text), soft_wrap=True)
    rows = [
        [place["what"], place["folder"], in_bytes(place["free_bytes"])]
        for place in result["places"]
    ]
    render.print_table(console, "\nWhere things are kept", ["what", "folder", "free"], rows)
    console.print(Text("\nWhat works here, and what is missing for what", style="bold"))
    for capability in result["broken"]:
        _show(console, "broken", capability)
    for state in ("ready", "missing", "not here"):
        for capability in result["capabilities"]:
            if capability["state"] == state:
                _show(console, state, capability)
    console.print()


def _show(console: Console, state: str, capability: dict[str, str]) -> None:
    told = f"  {capability['name']}: {capability['told']}"
    console.print(Text.assemble((f"{state:<8}", _STYLES[state]), told), soft_wrap=True)
    if capability["get"]:
        render.print_line(console, f"          {capability['get']}")


def _machine(found: dict[str, Any]) -> list[tuple[str, str]]:
    flags = f" ({', '.join(found['cpu_flags'])})" if found["cpu_flags"] else ""
    memory = f"{in_bytes(found['memory_bytes'])} memory, {in_bytes(found['available_bytes'])} free"
    disk = f"{in_bytes(found['disk_free_bytes'])} of {in_bytes(found['disk_bytes'])} disk free"
    devices = [
        f"{device['name']}, {in_bytes(device['memory_bytes'])}, capability {device['capability']}"
        for device in found["devices"]
    ]
    return [
        ("system", found["system"]),
        ("processor", f"{found['cpu']}, {found['cores']} cores{flags}; {memory}; {disk}"),
        ("devices", "; ".join(devices) or "the processor alone"),
    ]


def _software(result: dict[str, Any]) -> list[tuple[str, str]]:
    python, packages = result["python"], result["packages"]
    needed = [package for package in packages if not package["extra"]]
    fit = sum(package["fits"] for package in needed)
    lines = [
        ("python", f"{python['version']}, {python['program']}"),
        ("torch", python["torch"]),
        ("packages", f"{fit} of the {len(needed)} that every run needs are as pyproject asks"),
        ("measured", _measured(result["measured"])),
    ]
    if result["settings"]:
        told = ", ".join(f"{name}={value}" for name, value in result["settings"].items())
        lines.append(("set", told))
    return lines


def _measured(found: dict[str, Any] | None) -> str:
    if found is None:
        return "nothing yet; `mule plan RECIPE` measures this machine in about ten seconds"
    rates = [f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["matmul_flops"].items()]
    reads = f"reads {in_bytes(found['read_bytes_per_second'])}/s"
    return f"{', '.join([*rates, reads])} ({found['device']})"
