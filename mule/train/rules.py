"""Update rules of the flat buffers: AdamW, Muon, and AdamW with moments in 8 bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from mule.adapters.nf4 import require_bitsandbytes
from mule.config.schema import OptimSection
from mule.train.flat import Flat

_BLOCK = 256  # elements that share a scale; fixed in bitsandbytes' kernels
_CACHED_ELEMENTS = 1 << 17  # of five arrays and as many temporaries; fastest (docs/log.md)
_MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as in bitsandbytes

Flats = tuple[torch.Tensor, ...]  # weight, master, first and second moment, gradient


@dataclass
class Rule(ABC):
    """How the parameters of one flat group are updated.

    `buffers` is the flat state by kind; digests, sizes and checkpoints are made from it.
    """

    flat: Flat
    optim: OptimSection
    weight_decay: float
    compiled: bool
    buffers: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    @abstractmethod
    def __post_init__(self) -> None:
        """Allocate the state."""

    @staticmethod
    @abstractmethod
    def takes(name: str, matrix: torch.Tensor) -> bool:
        """Whether this rule updates a decayed parameter; AdamW updates all others."""

    @abstractmethod
    def update(
        self, gradient: torch.Tensor, lr: float, grad_scale: float, num_updates: int
    ) -> None:
        """Update masters and working weights in place from the flat `gradient` times `grad_scale`.

        `num_updates` counts this one; the gradient may be overwritten.
        """

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        """Views of the state of one parameter, by kind."""
        return {kind: self.flat.view(buffer, name) for kind, buffer in self.buffers.items()}


class AdamW(Rule):
    """Loshchilov and Hutter 2019, algorithm 2, with PyTorch's decoupled form, in one pass."""

    def __post_init__(self) -> None:
        for kind in ("exp_avg", "exp_avg_sq"):
            self.buffers[kind] = torch.zeros_like(self.flat.master)

    @staticmethod
    def takes(name: str, matrix: torch.Tensor) -> bool:
        return True

    def update(
        self, gradient: torch.Tensor, lr: float, grad_scale: float, num_updates: int
    ) -> None:
        o, flat = self.optim, self.flat
        biases = (1 - o.beta1**num_updates, 1 - o.beta2**num_updates)
        scalars = torch.tensor(
            [lr, self.weight_decay, o.beta1, o.beta2, o.eps, *biases, grad_scale],
            device=flat.weight.device,
        )
        kernel = _compiled_adamw() if self.compiled else _adamw_by_blocks
        exp_avg, exp_avg_sq = self.buffers.values()
        kernel((flat.weight, flat.master, exp_avg, exp_avg_sq, gradient), scalars)


def _adamw(flats: Flats, scalars: torch.Tensor) -> None:
    """One update in place; `scalars` holds lr, decay, beta1, beta2, eps, bias1, bias2, clip."""
    weight, master, exp_avg, exp_avg_sq, grad = flats
    lr, decay, beta1, beta2, eps, bias1, bias2, clip = scalars.unbind()
    g = grad.float() * clip
    exp_avg.mul_(beta1).add_(g * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_((g * g).mul_(1 - beta2))
    denominator = (exp_avg_sq / bias2).sqrt_().add_(eps)
    master.mul_(1 - lr * decay).sub_((exp_avg / bias1).mul_(lr).div_(denominator))
    weight.copy_(master)


def _adamw_by_blocks(flats: Flats, scalars: torch.Tensor) -> None:
    """`_adamw`, to the same bits; what is made on the way stays in a processor's cache."""
    size = _CACHED_ELEMENTS if scalars.device.type == "cpu" else max(1, len(flats[0]))
    for block in zip(*(flat.split(size) for flat in flats), strict=True):
        _adamw(block, scalars)


@cache
def _compiled_adamw() -> Any:
    return torch.compile(_adamw, dynamic=True)


def matrices(name: str, weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The matrices of a weight of a block, as views: one, or of stacked experts each one's own, gate
    and up apart."""
    if weight.dim() == 2:
        yield weight
        return
    parts = 2 if name.endswith("gate_up_proj") else 1
    for expert in weight.unbind():
        yield from expert.chunk(parts)


class Muon(Rule):
    """Orthogonalised momentum for the blocks' matrices: torch.optim.Muon on views of the masters.

    Its updates are scaled to the length of AdamW's, so that learning rate and decay mean the same.
    Source: Jordan et al. 2024 (Muon); Liu et al. 2025 (Muon is scalable), equation 4.
    """

    def __post_init__(self) -> None:
        flat = self.flat
        self.buffers["momentum"] = torch.zeros_like(flat.master)
        self._matrices = [
            nn.Parameter(matrix, requires_grad=False) for matrix in self._views(flat.master)
        ]
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=0.0,  # each update brings its own
            weight_decay=self.weight_decay,
            momentum=self.optim.momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        for matrix, buffer in zip(
            self._matrices, self._views(self.buffers["momentum"]), strict=True
        ):
            self._muon.state[matrix]["momentum_buffer"] = buffer

    def _views(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        """Every matrix of a flat buffer."""
        for name in self.flat.spans:
            yield from matrices(name, self.flat.view(flat, name))

    @staticmethod
    def takes(name: str, matrix: torch.Tensor) -> bool:
        is_expert = matrix.dim() == 3 and ".experts." in name
        return (matrix.dim() == 2 or is_expert) and "layers." in name  # not the head

    def update(
        self, gradient: torch.Tensor, lr: float, grad_scale: float, num_updates: int
    ) -> None:
        scaled = gradient.float().mul_(grad_scale)  # in place where it is fp32 already
        for matrix, gradient in zip(self._matrices, self._views(scaled), strict=True):
            matrix.grad = gradient
        self._muon.param_groups[0]["lr"] = lr
        self._muon.step()
        for matrix in self._matrices:
            matrix.grad = None
        self.flat.weight.copy_(self.flat.master)


class AdamW8bit(Rule):
    """AdamW with both moments in 8 bits: bitsandbytes' blockwise update on the fp32 masters.

    Embeddings, norms and tensors of fewer than 4,096 elements keep fp32 moments.
    Source: Dettmers et al. 2022 (8-bit optimizers), sections 2.1 to 2.3.
    """

    def __post_init__(self) -> None:
        flat, device = self.flat, self.flat.master.device
        self._functional = require_bitsandbytes("optim.kind = adamw8bit", "optim.kind=adamw")
        self._maps = [
            self._functional.create_dynamic_map(signed).to(device) for signed in (True, False)
        ]
        counts = [-(-shape.numel() // _BLOCK) for _, shape in flat.spans.values()]
        ends = list(accumulate(counts))
        starts = (end - count for end, count in zip(ends, counts))
        self._blocks = dict(zip(flat.spans, map(slice, starts, ends)))
        for kind in ("exp_avg", "exp_avg_sq"):
            self.buffers[kind] = torch.zeros_like(flat.master, dtype=torch.uint8)
            self.buffers[f"{kind}_absmax"] = torch.zeros(ends[-1], device=device)

    @staticmethod
    def takes(name: str, matrix: torch.Tensor) -> bool:
        return matrix.numel() >= _MIN_8BIT_ELEMENTS

    def update(
        self, gradient: torch.Tensor, lr: float, grad_scale: float, num_updates: int
    ) -> None:
        o, flat = self.optim, self.flat
        for name in flat.spans:
            state = self.moments(name)
            self._functional.optimizer_update_8bit_blockwise(
                "adam",
                flat.view(gradient, name).float(),
                flat.view(flat.master, name),
                state["exp_avg"],
                state["exp_avg_sq"],
                beta1=o.beta1,
                beta2=o.beta2,
                beta3=0.0,
                alpha=0.0,
                eps=o.eps,
                step=num_updates,
                lr=lr,
                qmap1=self._maps[0],
                qmap2=self._maps[1],
                absmax1=state["exp_avg_absmax"],
                absmax2=state["exp_avg_sq_absmax"],
                weight_decay=self.weight_decay,
                gnorm_scale=grad_scale,
            )
        flat.weight.copy_(flat.master)

    def moments(self, name: str) -> dict[str, torch.Tensor]:
        return {
            kind: buffer[self._blocks[name]]
            if kind.endswith("_absmax")
            else self.flat.view(buffer, name)
            for kind, buffer in self.buffers.items()
        }


RULES: dict[str, type[Rule]] = {"adamw": AdamW, "muon": Muon, "adamw8bit": AdamW8bit}
