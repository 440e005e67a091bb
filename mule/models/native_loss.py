"""The loss of rows of logits in C++ (mule/native/softmax.h), on tensors where torch has them.

On a processor it takes a fifth of the time of what the compiler makes of `softmax_nll_`, and less of
what torch does operation by operation (docs/log.md).
"""

from __future__ import annotations

import torch

from mule.batch import IGNORE
from mule.models.native_training import library, serves

__all__ = ["serves", "softmax_nll_"]


def softmax_nll_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    grad_scale: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """`loss.softmax_nll_` of contiguous logits (N, V) and their targets (N,) int64."""
    functions = library()
    assert functions is not None and logits.is_contiguous()
    rows, size = logits.shape
    targets = targets.contiguous()
    if not bool((((targets >= 0) & (targets < size)) | (targets == IGNORE)).all()):
        raise IndexError(f"a target is beyond the {size:,} logits")
    nll = torch.empty(rows, dtype=torch.float32)
    functions.mule_softmax_nll(
        *(logits.data_ptr(), logits.dtype == torch.bfloat16, rows, size, targets.data_ptr()),
        1.0 if grad_scale is None else grad_scale.item(),
        *(softcap or 0.0, nll.data_ptr(), torch.get_num_threads()),
    )
    return nll.sum()
