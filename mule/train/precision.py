"""Number formats and devices by name."""

from __future__ import annotations

import torch
from torch import nn

from mule.errors import ModelError

# Of the working weights; fp8 casts them for its products only.
DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
}


def check_fits_fp16(model: nn.Module) -> None:
    """ModelError when a weight is beyond fp16, as those of a model trained in bf16 can be."""
    for name, weight in model.named_parameters():
        beyond = int((~torch.isfinite(weight.detach().half())).sum())
        if beyond:
            raise ModelError(
                f"train.precision = fp16 cannot hold {beyond:,} of the {weight.numel():,} values of "
                f"{name}: fp16 ends at {torch.finfo(torch.float16).max:,.0f}",
                "set train.precision=bf16, or fp32 where bf16 is slow",
            )


def set_up_torch(threads: int) -> None:
    """Threads and matmul precision of this process; the same on every start of a run."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
