"""A mixture's layer, forward and backward, beside the same layer with a Python loop over its experts.

    python bench/lab_moe.py          # the rows of `python bench/lab.py run moe`, as JSON
    python bench/lab_moe.py quick    # at a tiny size

The loop is the one that most code has (transformers' eager experts, LitGPT): each expert's tokens are
looked up, computed and added, and autograd does the rest. A third way, `F.grouped_mm`, is what a GPU
takes; on the CPU it is not compiled in fp32. All compute the same, which is checked first. In bf16 too
where the processor multiplies it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mule.models import native_experts
from mule.models.config import ModelConfig, MoEConfig
from mule.models.experts import _grouped
from mule.models.moe import MoE
from mule.train.compiler import set_up_compiler

TARGET = 2.0  # times the loop's speed, without dropping, at 8 experts
# name, tokens, hidden channels, channels inside an expert: a campaign's shape, and one of 125M active
SHAPES = (("10M", 4096, 256, 384), ("125M", 2048, 768, 1024))
QUICK = (("tiny", 64, 32, 32),)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class Loop(MoE):
    """The experts one by one, as a loop in Python."""

    def _computed(
        self, flat: torch.Tensor, weights: torch.Tensor, assigned: torch.Tensor
    ) -> torch.Tensor:
        y = torch.zeros_like(flat)
        for expert in range(self.num_experts):
            token, place = (assigned == expert).nonzero(as_tuple=True)
            both = F.linear(flat[token], self.experts.gate_up_proj[expert])
            gate, up = both.chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.experts.down_proj[expert])
            y.index_add_(0, token, out * weights[token, place, None].to(out.dtype))
        return y


class Grouped(MoE):
    """The experts by `F.grouped_mm`."""

    def _computed(
        self, flat: torch.Tensor, weights: torch.Tensor, assigned: torch.Tensor
    ) -> torch.Tensor:
        order = assigned.flatten().argsort(stable=True)
        ends = torch.bincount(assigned.flatten(), minlength=self.num_experts).cumsum(0)
        experts = self.experts
        return _grouped(flat, weights, order, ends, experts.gate_up_proj, experts.down_proj)


def rows(quick: bool) -> list[dict[str, Any]]:
    """A comparison each, as bench/lab.py shows them."""
    set_up_compiler()
    found = []
    shapes = [(*shape, kind) for kind in _precisions() for shape in (QUICK if quick else SHAPES)]
    for name, tokens, hidden, inner, precision in shapes:
        ours, loop, grouped = (
            layer(kind, hidden, inner).to(precision) for kind in (MoE, Loop, Grouped)
        )
        x = torch.randn(1, tokens, hidden).to(precision)
        repeats = 2 if quick else 7
        for other in (loop, grouped):
            _check_same(ours, other, x)
        what = f"8 experts, top 2, {tokens:,} tokens of {hidden} channels, experts {inner} wide"
        what += f", {NAMES[precision]}"
        compiled, loop_compiled = torch.compile(ours, dynamic=False), torch.compile(loop)
        for mode, one, other, label in (
            ("eager", ours, loop, "a loop over experts"),
            ("compiled", compiled, loop_compiled, "a loop over experts"),
            ("eager", ours, grouped, "F.grouped_mm"),
        ):
            ours_s, other_s = _times(one, other, x, repeats)
            found.append(
                {
                    "what": f"{name} shape, {what}, {mode}",
                    "ours_s": ours_s,
                    "other": label,
                    "other_s": other_s,
                    "times": other_s / ours_s,
                    "target": TARGET if "loop" in label else None,
                    "note": "",
                }
            )
    return found


def _precisions() -> list[torch.dtype]:
    """Those in which this machine multiplies by itself."""
    return [torch.float32, torch.bfloat16] if native_experts.multiplies_bf16() else [torch.float32]


def layer(kind: type[MoE], hidden: int, inner: int) -> MoE:
    """A layer of a fixed start, in evaluation's way: no limit, no losses."""
    config = ModelConfig(
        family="qwen3_moe",
        vocab_size=64,
        hidden_size=hidden,
        num_layers=1,
        num_heads=hidden // 32,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=inner,
        max_position_embeddings=64,
        moe=MoEConfig(8, 2, inner),
    )
    torch.manual_seed(3)
    made = kind(config)
    for name, parameter in made.named_parameters():
        nn.init.normal_(parameter, std=0.3 if "gate.weight" in name else 0.05)
    return made


def _pass(module: Callable[..., torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The result and all gradients of a forward and backward pass."""
    start = x.detach().clone().requires_grad_()
    y = module(start)
    y.backward(y.detach())
    assert start.grad is not None
    return [y.detach(), start.grad]


def _check_same(one: MoE, other: MoE, x: torch.Tensor) -> None:
    found = []
    for module in (one, other):
        module.zero_grad()
        passed = _pass(module, x)
        found.append(passed + [p.grad for p in module.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= TOLERANCES[x.dtype] * theirs.norm()


def _times(one: Any, other: Any, x: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Medians in seconds of both, taking turns; the first passes are not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):
        for module, kept in zip((one, other), times, strict=True):
            started_at = time.perf_counter()
            _pass(module, x)
            if number > 1:
                kept.append(time.perf_counter() - started_at)
    ours, others = (statistics.median(kept) for kept in times)
    return ours, others


if __name__ == "__main__":
    print(json.dumps(rows("quick" in sys.argv[1:]), indent=1))
