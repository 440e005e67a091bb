"""Compiling a C++ source, once a machine, and loading it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from mule import fsio, machine, progress
from mule.errors import MuleError

FOLDER = Path(__file__).parent  # of the headers that sources share
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_COMPILE_S = 300


def is_possible() -> bool:
    """Whether sources can be compiled here."""
    return platform.system() == "Linux" and machine.has_cpp_compiler()


def load(source: Path, what: str, without: str) -> ctypes.CDLL | None:
    """The compiled functions of `source`; None, and a note that says why and what happens `without`
    them, where they cannot be had.

    Calls release the interpreter's lock. OpenMP's threads are those of torch, which must have been
    imported: two runtimes would fight for the cores.
    """
    if platform.system() != "Linux":
        return None  # elsewhere OpenMP is not where g++ looks for it
    try:
        return ctypes.CDLL(str(_compiled(source, what)))
    except (MuleError, OSError) as error:
        progress.note(f"{without}: {error}", "warning")
        return None


def _compiled(source: Path, what: str) -> Path:
    """The library for this source, this processor and this compiler, made if it is not there."""
    headers = sorted({*FOLDER.glob("*.h"), *source.parent.glob("*.h")})
    compiler = shutil.which(os.environ.get("CXX", "g++")) or ""
    parts = [machine.cpu_model(), platform.machine(), compiler, *_FLAGS]
    content = "\n".join(parts).encode() + b"".join(f.read_bytes() for f in [*headers, source])
    name = f"{source.stem}-{hashlib.sha256(content).hexdigest()[:20]}.so"
    path = machine.cache_dir() / "native" / name
    if path.exists():
        return path
    if problem := machine.cpp_compiler_problem():
        raise MuleError(problem, "install g++")
    with (
        progress.task(f"Compiling {what} for this processor"),
        fsio.stream_file(path) as temporary,
    ):
        command = [compiler, *_FLAGS, f"-I{FOLDER}", str(source), "-o", str(temporary)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
        if ran.returncode:
            raise MuleError(f"{compiler} failed: {ran.stderr.strip()[:500]}", "install g++ 12")
    return path
