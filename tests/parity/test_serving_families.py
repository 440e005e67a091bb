"""What serves every family, against the full forward pass of its modules."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mule.generate.forward import ModuleForward, Part
from mule.generate.native.decoder import NativeForward, can_be_native
from mule.models.folder import load_model
from tests.parity.tiny_families import MODELS, save_family

NAMES = (
    *("llama", "llama, llama3", "llama, longrope", "mistral", "qwen2", "qwen3, yarn", "gemma3"),
    *("gemma3, no window", "smollm3", "phi3, partial", "phi3, long", "granite, llama3"),
)
# What the C++ does not know: experts and state-space layers.
IN_TORCH = ("qwen3_moe", "granitemoeshared", "hybrid, experts", "jamba")
CUTS = (0, 40, 64, 65, 66, 70, 90)  # beyond the windows of 24 and the original contexts of 64


def test_every_family_is_served() -> None:
    assert {name.partition(",")[0] for name in NAMES + IN_TORCH} == {
        n.partition(",")[0] for n in MODELS
    }


@pytest.mark.parametrize("name", NAMES + IN_TORCH)
@torch.no_grad()
def test_pieces_of_a_text_give_the_logits_of_the_whole(tmp_path: Path, name: str) -> None:
    """Beside another conversation, whose next tokens come in the same calls."""
    save_family(tmp_path, name)
    model = load_model(tmp_path).eval()
    assert can_be_native(model) is (name in NAMES)
    generator = torch.Generator().manual_seed(1)
    ids, other = torch.randint(0, 600, (2, 90), generator=generator).tolist()
    logits = model(torch.tensor([ids]))[0]
    for kind in (NativeForward, ModuleForward) if name in NAMES else (ModuleForward,):
        forward = kind(model, 3, 100)
        forward.extend([Part(0, 0, other[:50], 90, False)])
        for n, (start, end) in enumerate(pairwise(CUTS)):
            beside = Part(0, 50 + n, other[50 + n : 51 + n], 90, True)
            _, found = forward.extend([beside, Part(2, start, ids[start:end], 90, True)])
            torch.testing.assert_close(found, logits[end - 1], atol=2e-5, rtol=0)
