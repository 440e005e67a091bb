"""Compiling the C++ beside this file, once a machine, and loading it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from mule import fsio, machine, progress
from mule.errors import MuleError

_FOLDER = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_COMPILE_S = 300


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, and a note that says why, where they cannot be had.

    Calls release the interpreter's lock. OpenMP's threads are those of torch, which must have been
    imported: two runtimes would fight for the cores.
    """
    if platform.system() != "Linux":
        return None  # elsewhere OpenMP is not where g++ looks for it
    try:
        return _loaded(_compiled())
    except (MuleError, OSError) as error:
        progress.note(f"decoding goes through torch, more slowly: {error}", "warning")
        return None


def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.mule_sizes.restype, loaded.mule_sizes.argtypes = ctypes.c_int64, [ctypes.c_int64]
    loaded.mule_forward.argtypes = [ctypes.c_void_p] * 3
    return loaded


def _compiled() -> Path:
    """The library for these sources, this processor and this compiler, made if it is not there."""
    sources = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])
    compiler = shutil.which(os.environ.get("CXX", "g++")) or ""
    parts = [machine.cpu_model(), platform.machine(), compiler, *_FLAGS]
    content = "\n".join(parts).encode() + b"".join(file.read_bytes() for file in sources)
    name = f"decoder-{hashlib.sha256(content).hexdigest()[:20]}.so"
    path = machine.cache_dir() / "native" / name
    if path.exists():
        return path
    if problem := machine.cpp_compiler_problem():
        raise MuleError(problem, "install g++")
    with (
        progress.task("Compiling the decoder for this processor"),
        fsio.stream_file(path) as temporary,
    ):
        command = [compiler, *_FLAGS, str(_FOLDER / "decoder.cpp"), "-o", str(temporary)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_S)
        if ran.returncode:
            raise MuleError(f"{compiler} failed: {ran.stderr.strip()[:500]}", "install g++ 12")
    return path
