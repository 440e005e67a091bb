"""What every test of this folder has: the mark `gpu`, and a reason to be skipped without a card."""

from __future__ import annotations

import pytest
import torch

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA card, and this machine has none"
    ),
]
