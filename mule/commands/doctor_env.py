"""`mule doctor --env`: this machine and its Python, and what is missing for what.

Nothing here imports torch: versions come from the packages' metadata, and only where a GPU can be
seen a child process asks torch about it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mule import calibration, machine
from mule.commands import env_packages
from mule.commands.env_packages import Package
from mule.errors import MuleError

State = Literal["ready", "missing", "not here"]
EXTRAS = {  # what each brings, as one asks for it
    "report": "curves as pictures (report.md, mule runs plot)",
    "ui": "the pages in the browser (mule ui)",
    "scale": "data prepared by several workers or on Slurm (mule.data.scale)",
    "qlora": "QLoRA and the 8-bit AdamW (adapter.kind=qlora, optim.kind=adamw8bit)",
    "fp8": "training in float8 (train.precision=fp8)",
    "schema": "answers by a JSON schema (mule serve, mule chat)",
    "search": "settings sampled for each variant of a campaign (mule lab run, search.trials)",
    "eval": "Mule's tasks in lm-evaluation-harness (mule eval --export lm-eval)",
    "mlx": "Apple's mlx-lm (adapter.engine=mlx, mule chat --mlx)",
}
_FLOAT8 = (8, 9)  # the capability from which CUDA devices compute it
_ROOM = 5 * 2**30  # bytes: a small model with its checkpoints and exports
_SETTINGS = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
_SETTINGS += ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
_GPU_LIMIT_S = 60.0
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
found = [(torch.cuda.get_device_name(i), torch.cuda.get_device_properties(i).total_memory,
          torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())] if cuda else []
print(json.dumps({"devices": found, "mps": torch.backends.mps.is_available()}))
"""


@dataclass(frozen=True)
class Capability:
    """Something Mule can do: whether it can here, what it has or lacks, and the command to get it."""

    name: str
    state: State
    told: str
    get: str = ""


def run() -> dict[str, Any]:
    """All of it; `ok` is false when something is broken that every run needs."""
    wanted = env_packages.packages()
    gpus = _gpus()
    broken = _broken(wanted)
    able = [*_by_machine(gpus), *_by_extra(wanted, gpus), *_by_program(), _hub()]
    return {
        "machine": _machine(gpus),
        "python": {
            "version": platform.python_version(),
            "program": sys.executable,
            "torch": _torch(),
        },
        "measured": _measured(),
        "packages": [asdict(package) | {"fits": package.fits} for package in wanted],
        "places": _places(),
        "settings": {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)},
        "broken": [asdict(capability) for capability in broken],
        "capabilities": [asdict(capability) for capability in able],
        "ok": not broken,
        "next": broken[0].get if broken else "mule demo",
    }


# ---------------------------------------------------------------- what there is


def _machine(gpus: dict[str, Any]) -> dict[str, Any]:
    usage = shutil.disk_usage(Path.cwd())
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": machine.cpu_model(),
        "cores": machine.physical_cores(),
        "cpu_flags": sorted(machine.cpu_flags()),
        "memory_bytes": machine.total_bytes(),
        "available_bytes": machine.available_bytes(),
        "disk_free_bytes": usage.free,
        "disk_bytes": usage.total,
        "devices": [
            {"name": name, "memory_bytes": size, "capability": ".".join(map(str, capability))}
            for name, size, capability in gpus["devices"]
        ],
    }


def _torch() -> str:
    """Its version and for what it was built, as its own version file says."""
    version = env_packages.installed_version("torch")
    if version is None:
        return "not installed"
    built = _built_for()
    return f"{version}, built for {built}" if built else version


def _built_for() -> str:
    """CUDA or ROCm and its version, or the processor; empty where torch's files do not say."""
    import importlib.util
    import re

    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    if file is None or not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    for name, kind in (("cuda", "CUDA"), ("hip", "ROCm")):
        if found := re.search(rf"^{name}\b[^=]*= *'([^']+)'", text, re.MULTILINE):
            return f"{kind} {found[1]}"
    return "Apple silicon" if platform.system() == "Darwin" else "the processor"


def _measured() -> dict[str, Any] | None:
    """What `mule plan` knows of this machine; None where it was never measured."""
    if env_packages.installed_version("torch") is None or not calibration.is_known():
        return None
    known = calibration.calibration()
    return {
        "device": known.device_name,
        "matmul_flops": known.matmul_flops,
        "read_bytes_per_second": known.read_bytes_per_second,
    }


def _places() -> list[dict[str, Any]]:
    """Where things are kept, and how much room is there."""
    from huggingface_hub import constants

    cache = machine.cache_dir()
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or cache / "compile"
    listed = (
        ("runs, exports and models of yours", Path.cwd()),
        ("measurements of this machine", cache),
        ("compiled code", Path(compiled)),
        ("models from the hub", Path(constants.HF_HUB_CACHE)),
    )
    return [
        {
            "what": what,
            "folder": str(folder),
            "exists": folder.is_dir(),
            "free_bytes": _free(folder),
        }
        for what, folder in listed
    ]


def _free(folder: Path) -> int:
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    return shutil.disk_usage(place).free


def _gpus() -> dict[str, Any]:
    """The GPUs as torch sees them; `seen` says that the system has one, `error` why torch failed."""
    found: dict[str, Any] = {"seen": _sees_gpu(), "devices": [], "mps": False, "error": ""}
    if not found["seen"]:
        return found
    command = [sys.executable, "-c", _ASK_TORCH]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=_GPU_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return found | {"error": f"torch did not answer within {_GPU_LIMIT_S:.0f} s"}
    if ran.returncode:
        return found | {"error": (ran.stderr.strip().splitlines() or ["no word from torch"])[-1]}
    return found | json.loads(ran.stdout.splitlines()[-1])


def _sees_gpu() -> bool:
    """A GPU that torch might use, by what its driver leaves in the system."""
    if platform.system() == "Darwin":
        return platform.machine() == "arm64"
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()


# ---------------------------------------------------------------- what is missing for what


def _broken(wanted: Sequence[Package]) -> list[Capability]:
    """What keeps every run from working."""
    found = []
    for package in wanted:
        if package.extra or package.fits:
            continue
        has = "is not installed" if package.installed is None else f"is {package.installed}"
        told = f"{package.name} {has}; Mule needs {package.wanted.lstrip('=') or 'it'}"
        found.append(
            Capability("every run", "missing", told, env_packages.install_command([package]))
        )
    if not os.access(Path.cwd(), os.W_OK):
        told = f"nothing can be written in {Path.cwd()}, where runs are kept"
        found.append(Capability("every run", "missing", told, "cd ~"))
    return found


def _by_machine(gpus: dict[str, Any]) -> list[Capability]:
    """What hangs on the machine: the GPU, the compiler, several processes, room."""
    return [_gpu(gpus), _several(gpus), _compiler(), _room()]


def _gpu(gpus: dict[str, Any]) -> Capability:
    name = "training on a GPU"
    if gpus["devices"]:
        return Capability(name, "ready", ", ".join(device[0] for device in gpus["devices"]))
    if gpus["mps"]:
        return Capability(name, "ready", "Apple's GPU (mps)")
    if not gpus["seen"]:
        plan = "mule plan RECIPE --machine rtx4090"
        return Capability(name, "not here", "no GPU; the processor computes", plan)
    why = gpus["error"] or f"torch is built for {_built_for()}"
    get = f"{env_packages.python()} -m pip install --force-reinstall torch"
    return Capability(name, "missing", f"there is a GPU, and torch cannot use it: {why}", get)


def _several(gpus: dict[str, Any]) -> Capability:
    """Several GPUs or machines: torchrun comes with torch, the GPUs and Slurm do not."""
    name = "several GPUs or machines"
    if shutil.which("sbatch"):
        told = "Slurm's sbatch"
        return Capability(name, "ready", told, "mule train RECIPE --launch slurm:2x8")
    if len(gpus["devices"]) > 1:
        told = f"{len(gpus['devices'])} GPUs"
        return Capability(name, "ready", told, "mule train RECIPE --launch torchrun")
    told = "one device and no Slurm here; with other machines torchrun does it"
    return Capability(name, "not here", told, "mule train RECIPE --launch torchrun:2x1")


def _compiler() -> Capability:
    name = "compiled training (torch.compile)"
    problem = machine.cpp_compiler_problem()
    if problem is None:
        return Capability(name, "ready", "the C++ compiler works")
    if platform.system() == "Darwin":
        return Capability(name, "missing", problem, "xcode-select --install")
    return Capability(name, "missing", problem, "sudo apt install g++ python3-dev")


def _room() -> Capability:
    free = shutil.disk_usage(Path.cwd()).free
    state: State = "ready" if free >= _ROOM else "missing"
    told = f"{free / 2**30:.1f} GiB are free here"
    return Capability(
        "room for runs and exports",
        state,
        told,
        "" if state == "ready" else "mule runs list, then: rm -r runs/NAME",
    )


def _by_extra(wanted: Sequence[Package], gpus: dict[str, Any]) -> list[Capability]:
    """A line for each extra of pyproject."""
    found = []
    for extra, name in EXTRAS.items():
        asked = [package for package in wanted if package.extra == extra]
        lacking = [package for package in asked if not package.fits]
        if reason := _not_here(extra, gpus):
            found.append(Capability(name, "not here", reason))
        elif lacking:
            told = ", ".join(_lack(package) for package in lacking)
            found.append(Capability(name, "missing", told, env_packages.install_command(lacking)))
        else:
            told = ", ".join(f"{package.name} {package.installed}" for package in asked)
            found.append(Capability(name, "ready", told))
    return found


def _lack(package: Package) -> str:
    if package.installed is None:
        return f"{package.name} is not installed"
    return f"{package.name} is {package.installed}, not {package.wanted}"


def _not_here(extra: str, gpus: dict[str, Any]) -> str:
    """Why an extra would do nothing on this machine; empty where it would."""
    if extra == "fp8" and not any(tuple(device[2]) >= _FLOAT8 for device in gpus["devices"]):
        return "no GPU that computes float8 (CUDA capability 8.9 or newer)"
    if extra == "mlx" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return "no Apple silicon"
    return ""


def _by_program() -> list[Capability]:
    """The programs that run an exported file beside Mule."""
    found = []
    for program, name in (
        ("ollama", "exported models in Ollama"),
        ("docker", "exported models in Docker"),
    ):
        place = shutil.which(program)
        if place:
            found.append(Capability(name, "ready", place))
        else:
            told = f"{program} is not installed; mule chat and mule serve run the file without it"
            found.append(Capability(name, "not here", told))
    return found


def _hub() -> Capability:
    """Whether the hub may be asked, and with a token; the token itself is never told."""
    from huggingface_hub import constants

    from mule.hub.token import TOKENS_PAGE, has_token

    name = "gated and private models of the hub, mule push"
    if constants.HF_HUB_OFFLINE:
        return Capability(name, "not here", "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    try:
        if has_token():
            return Capability(name, "ready", "a token is set")
    except MuleError as error:
        return Capability(name, "missing", error.message, error.hint)
    get = f"make a token at {TOKENS_PAGE}, then: export HF_TOKEN=hf_..."
    return Capability(name, "missing", "no token; public models need none", get)
