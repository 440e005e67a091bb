"""The first call of torch's vector functions on a processor.

torch gives cos, exp, sqrt and others of contiguous tensors to MKL, which looks each function up when it
is first called. Where several threads make that first call together, one of them may compute its share
by the function of least accuracy, without a word: cosines off by up to 1.5e-4, once, in some processes
(https://github.com/pytorch/pytorch/issues/188792; torch 2.13 is built with such an MKL). A run resumed
in a new process would not have the bits of one that never stopped.
"""

from __future__ import annotations

import functools

import torch

# What torch hands over, of that which a language model or its training uses.
_FUNCTIONS = (
    *(torch.cos, torch.sin, torch.tan, torch.tanh, torch.atan, torch.asin, torch.acos),
    *(torch.exp, torch.expm1, torch.log, torch.log1p, torch.log2, torch.log10),
    *(torch.erf, torch.erfc, torch.erfinv, torch.lgamma, torch.sqrt),
)


@functools.cache
def settle_vector_math() -> None:
    """Call each function once, on one thread; later calls cost nothing."""
    for dtype in (torch.float32, torch.float64):
        one = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in _FUNCTIONS:
            function(one)
