"""State-space layers' recurrences, forward and backward, beside a scan over the tokens in Python.

    python bench/lab_ssd.py          # the rows of `python bench/lab.py run ssd`, as JSON
    python bench/lab_ssd.py quick    # at a tiny size
    python bench/lab_ssd.py chunks   # Mamba-2 at several chunk sizes

The scan is what the recurrence says, a step a token, with what can be computed for all tokens at once
taken out of it; autograd does the rest. All compute the same, which is checked first.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mule.models.config import MambaConfig
from mule.models.selective_scan import selective_scan
from mule.models.ssd import Inputs, ssd
from mule.train.compiler import set_up_compiler

TARGET = 3.0  # times the scan's speed, at 1,024 tokens
TOKENS = 1024
STATES = 128  # of Mamba-2; and of Mamba-1:
FEW_STATES = 16
CHUNKS = (32, 64, 128, 256)

Run = Callable[..., torch.Tensor]


def rows(*, quick: bool = False) -> list[dict[str, Any]]:
    """A comparison each, as bench/lab.py shows them; a quick one compiles nothing."""
    set_up_compiler()
    tokens, widths = (48, (64,)) if quick else (TOKENS, (256, 768))
    found = []
    for hidden in widths:
        ways: dict[str, Run] = {"eager": chunked()}
        if not quick:
            ways["compiled"] = torch.compile(chunked(), dynamic=False)
        inputs = mamba2_inputs(1, tokens, hidden)
        found += _compared(f"Mamba-2 of width {hidden}", ways, scan_mamba2, inputs, TARGET)
    for hidden in widths:
        ways = {"eager": partial(pieces, fused=False)} if quick else {"compiled": pieces}
        inputs = mamba1_inputs(1, tokens, hidden)
        found += _compared(f"Mamba-1 of width {hidden}", ways, scan_mamba1, inputs, None)
    return found


def chunk_rows() -> list[dict[str, Any]]:
    """Seconds of Mamba-2's recurrence at each size of a chunk, forward and backward."""
    set_up_compiler()
    found = []
    for hidden in (256, 768):
        inputs = mamba2_inputs(4, TOKENS, hidden)
        ways = {f"{size} eager": chunked(size) for size in CHUNKS}
        ways |= {f"{size}": torch.compile(chunked(size), dynamic=False) for size in CHUNKS}
        times = _times(list(ways.values()), inputs)
        found.append({"hidden_size": hidden, **dict(zip(ways, times, strict=True))})
    return found


def mamba2_inputs(batch: int, tokens: int, hidden: int) -> Sequence[torch.Tensor]:
    """x, dt, A, B and C of a layer twice as wide as `hidden`, in heads of 64 channels."""
    heads = 2 * hidden // 64
    torch.manual_seed(3)
    x = torch.randn(batch, tokens, 1, heads, 64)
    dt = torch.rand(batch, tokens, 1, heads) * 0.1
    b, c = torch.randn(2, batch, tokens, 1, STATES) * STATES**-0.5
    return x, dt, -1 - 15 * torch.rand(1, heads), b, c


def mamba1_inputs(batch: int, tokens: int, hidden: int) -> Sequence[torch.Tensor]:
    """dt, dt x, A, B and C of a layer twice as wide as `hidden`."""
    torch.manual_seed(3)
    dt = torch.rand(batch, tokens, 2 * hidden) * 0.1
    b, c = torch.randn(2, batch, tokens, FEW_STATES)
    a = -torch.arange(1.0, FEW_STATES + 1).repeat(2 * hidden, 1)
    return dt, torch.randn(batch, tokens, 2 * hidden) * dt, a, b, c


def chunked(size: int = MambaConfig.chunk_size) -> Run:
    """Mamba-2 as Mule computes it."""
    return lambda *tensors: ssd(Inputs(*tensors), size)[0]


def scan_mamba2(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """A step a token; the state is (batch, groups, heads, channels, states)."""
    decays, added = (dt * a).exp()[..., None, None].unbind(1), (dt[..., None] * x).unbind(1)
    state = x.new_zeros(*x[:, 0].shape, b.shape[-1])
    found = []
    for decay, dtx, b_t, c_t in zip(decays, added, b.unbind(1), c.unbind(1), strict=True):
        state = state * decay + dtx[..., None] * b_t[:, :, None, None]
        found.append((state @ c_t[:, :, None, :, None])[..., 0])
    return torch.stack(found, 1)


def pieces(*tensors: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """Mamba-1 as Mule computes it, its kernels compiled."""
    dt, _, a, _, _ = tensors
    begins = torch.zeros(dt.shape[:2], dtype=torch.bool)
    return selective_scan(list(tensors), begins, a.new_zeros(len(dt), *a.shape), fused)[0]


def scan_mamba1(
    dt: torch.Tensor, dtx: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """A step a token; the state is (batch, channels, states)."""
    state = dt.new_zeros(len(dt), *a.shape)
    found = []
    for dt_t, dtx_t, b_t, c_t in zip(*(t.unbind(1) for t in (dt, dtx, b, c)), strict=True):
        state = state * (dt_t[..., None] * a).exp() + dtx_t[..., None] * b_t[:, None]
        found.append((state @ c_t[..., None])[..., 0])
    return torch.stack(found, 1)


def _compared(
    what: str,
    ways: dict[str, Run],
    scan: Run,
    inputs: Sequence[torch.Tensor],
    target: float | None,
) -> list[dict[str, Any]]:
    wanted = _pass(scan, inputs)
    for way in ways.values():
        for one, other in zip(_pass(way, inputs), wanted, strict=True):
            assert (one - other).norm() <= 1e-4 * other.norm()
    *times, scan_s = _times([*ways.values(), scan], inputs)
    return [
        {
            "what": f"{what}, {inputs[0].shape[1]:,} tokens, forward and backward, {mode}",
            "ours_s": ours_s,
            "other": "a sequential scan",
            "other_s": scan_s,
            "times": scan_s / ours_s,
            "target": target,
            "note": "",
        }
        for mode, ours_s in zip(ways, times, strict=True)
    ]


def _pass(run: Run, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The result and all gradients of a forward and backward pass."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]


def _times(ways: Sequence[Run], inputs: Sequence[torch.Tensor], repeats: int = 7) -> list[float]:
    """Medians in seconds, taking turns; the first passes are not counted."""
    times: list[list[float]] = [[] for _ in ways]
    for number in range(repeats + 2):
        for way, kept in zip(ways, times, strict=True):
            started_at = time.perf_counter()
            _pass(way, inputs)
            if number >= 2:
                kept.append(time.perf_counter() - started_at)
    return [statistics.median(kept) for kept in times]


if __name__ == "__main__":
    words = sys.argv[1:]
    print(json.dumps(chunk_rows() if words == ["chunks"] else rows(quick=words == ["quick"])))
