"""Activation checkpointing: computing parts of a block again in the backward pass.

Source: Chen et al. 2016; selective as in Korthikanti et al. 2022, section 5, through PyTorch's
selective checkpoint contexts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

# It warns of operations in place, which blocks do not have: Mule's own are opaque to the compiler.
logging.getLogger("torch._higher_order_ops.wrap").addFilter(
    lambda record: "context_fn is passed" not in record.getMessage()
)

Recompute = Literal["none", "selective", "full"]
T = TypeVar("T")

_aten = torch.ops.aten
_KEPT = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten._scaled_mm.default}
_KEPT |= {
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math_for_mps",
    )
}

_CHEAP = ("mule::causal_conv", "mule::decayed")  # elementwise, but for their being in C++


def recomputed(kind: Recompute, block: Callable[..., T], *args: Any) -> T:
    """block(*args), of which the backward pass finds what `kind` keeps and computes the rest again.

    none keeps everything, selective the results of matrix products and attention, full the
    arguments only. The gradients are the same bits: random numbers are drawn again as they were.
    """
    if kind == "none":
        return block(*args)
    if kind == "full":
        return checkpoint(block, *args, use_reentrant=False)
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute: matrix products, attention, and most of Mule's own operations."""
    is_own = getattr(op, "namespace", "") == "mule" and not op.name().startswith(_CHEAP)
    if op in _KEPT or is_own:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
