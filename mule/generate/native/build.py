"""The decoder's C++, compiled once a machine."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from mule.native import build

_SOURCE = Path(__file__).parent / "decoder.cpp"
_WITHOUT = "decoding goes through torch, more slowly"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, and a note that says why, where they cannot be had."""
    loaded = build.load(_SOURCE, "the decoder", _WITHOUT)
    if loaded is not None:
        loaded.mule_sizes.restype, loaded.mule_sizes.argtypes = ctypes.c_int64, [ctypes.c_int64]
        loaded.mule_forward.argtypes = [ctypes.c_void_p] * 3
    return loaded
