"""Number formats and devices by name."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def set_up_torch(threads: int) -> None:
    """Threads and matmul precision of this process; the same on every start of a run."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
