"""Opening a pickle file, from outside: a child process does it, under limits. No torch here."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mule
from mule.errors import ModelError

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
_GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """What the child may use beyond its own start: memory, processor time."""

    memory_bytes: int
    cpu_s: int

    @staticmethod
    def of(file: Path) -> Limits:
        """Twice the file (mapped, and copied once when tensors share storage) and room to work."""
        size = file.stat().st_size
        return Limits(2 * size + _GIB, 60 + size // (20 * 2**20))


@dataclass(frozen=True)
class Tensor:
    """A tensor as it lay in the pickle file; `sha256` is of its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Unpickled:
    """A state dict, now safetensors: `aliases` name a tensor that is there under another name."""

    file: Path
    key: str
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    left_out: dict[str, str]

    def names(self) -> dict[str, str]:
        """Every name of the state dict -> the name under which its tensor is stored."""
        return {name: name for name in self.tensors} | self.aliases


def convert_command(file: Path) -> str:
    """The command that turns a pickle file into a model folder."""
    name = file.parent.name if file.stem == "pytorch_model" else file.stem
    return f"mule convert {file} --out {name or 'model'}-converted"


def unpickle(file: Path, out: Path, key: str | None, limits: Limits | None = None) -> Unpickled:
    """Write the state dict of `file` to `out` as safetensors; what is in it.

    Raises ModelError when the file is damaged, asks for more than weights, or exceeds the limits.
    """
    limits = limits or Limits.of(file)
    request = {
        "file": str(file.resolve()),
        "out": str(out.resolve()),
        "key": key,
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
    }
    try:
        ran = _run_child(json.dumps(request).encode(), 120 + 10 * limits.cpu_s)
    except subprocess.TimeoutExpired:
        raise _out_of_time(file, limits.cpu_s) from None
    answer = _answer(file, ran, limits)
    if not answer["ok"]:
        raise _refusal(file, answer["kind"], answer["error"], limits)
    tensors = {
        name: Tensor(found["dtype"], tuple(found["shape"]), found["sha256"])
        for name, found in answer["tensors"].items()
    }
    return Unpickled(out, answer["key"], tensors, answer["aliases"], answer["left_out"])


def _run_child(request: bytes, timeout_s: int) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "mule.models._unpickle_worker"],
        input=request,
        capture_output=True,
        env=_environment(),
        start_new_session=True,  # Ctrl-C in the terminal is Mule's to handle
        timeout=timeout_s,
        check=False,
    )


def _answer(file: Path, ran: subprocess.CompletedProcess[bytes], limits: Limits) -> dict[str, Any]:
    if ran.returncode == 0:
        return json.loads(ran.stdout)
    said = ran.stderr.decode("utf-8", "replace")
    if ran.returncode == -signal.SIGXCPU:
        raise _out_of_time(file, limits.cpu_s)
    if re.search(r"MemoryError|bad_alloc|can't allocate|Cannot allocate", said):
        raise _refusal(file, "memory", "", limits)
    how = f"signal {-ran.returncode}" if ran.returncode < 0 else f"exit code {ran.returncode}"
    last = ascii(said.strip().split("\n")[-1][:300]).strip("'\"")
    raise ModelError(
        f"{file}: the process that read it ended with {how}{': ' if last else ''}{last}",
        "save the weights alone where the file was made: torch.save(model.state_dict(), FILE)",
    )


def _out_of_time(file: Path, seconds: int) -> ModelError:
    return ModelError(
        f"{file}: reading it took more than {seconds} seconds of processor time and was stopped; "
        "weights of this size take far less",
        "get the file again from someone you trust, as safetensors if there is one",
    )


_WEIGHTS_ONLY = (
    "where you made the file, save the weights alone: torch.save(model.state_dict(), FILE); "
    "if it comes from someone else, do not open it elsewhere either"
)
_HINTS = {
    "code": _WEIGHTS_ONLY,
    "legacy": "where you made the file, save it again with today's torch: "
    "torch.save(model.state_dict(), FILE)",
    "damaged": "copy it again from where it was made",
    "empty": "save the weights where the model is: torch.save(model.state_dict(), FILE)",
    "several": "say which: --key NAME",
    "key": "give one of these as --key, or leave it away",
    "memory": "get the file again from someone you trust, as safetensors if there is one",
}


def _refusal(file: Path, kind: str, error: str, limits: Limits) -> ModelError:
    if kind == "memory":
        error = (
            f"reading it needs more than {limits.memory_bytes / _GIB:,.1f} GiB, "
            "more than such a file can hold; it was stopped"
        )
    return ModelError(f"{file}: {error}", _HINTS[kind])


def _environment() -> dict[str, str]:
    """No secrets and no switches: only what a process needs to start."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    root = str(Path(mule.__file__).parents[1])
    return kept | {"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
