"""What training computes in C++ on a processor (mule/native/training.cpp)."""

from __future__ import annotations

import ctypes
import functools

import torch

from mule.native import build

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_WHAT = "attention, experts, state spaces and the loss"
_WITHOUT = f"{_WHAT} go through torch in training, more slowly"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, and a note that says why, where they cannot be had."""
    loaded = build.load(build.FOLDER / "training.cpp", _WHAT, _WITHOUT)
    if loaded is not None:
        for kind in ("attention", "convolution", "decay", "experts"):
            if room := getattr(loaded, f"mule_{kind}_room", None):  # experts': with bf16 products
                room.restype = _LONG
        loaded.mule_softmax_nll.argtypes = [
            *(_POINTER, _LONG, _LONG, _LONG, _POINTER, _FLOAT, _FLOAT, _POINTER, _LONG)
        ]
    return loaded


@torch.compiler.assume_constant_result  # a compiled graph asks `serves`, and cannot look into a library
def _is_there() -> bool:
    return library() is not None


def serves(tensor: torch.Tensor) -> bool:
    """Whether there is C++ for tensors of this kind."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        and _is_there()
    )
