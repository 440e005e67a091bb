"""The optimizer: trained parameters in flat buffers, each group updated by the rule of its kind.

The gradient norm is one reduction, and the sum over processes one message; see mule/train/flat.py
for the buffers and mule/train/rules.py for the rules.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from mule.config.schema import OptimSection
from mule.train.distributed import Group
from mule.train.flat import NUM_FIGURES, Flat
from mule.train.rules import RULES, AdamW, Rule

_FP32 = (".A_log", ".dt_bias", ".D")  # of state-space layers: what decides how fast they forget
_NOT_DECAYED = ("embed_tokens", ".conv1d.", *_FP32)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay acts on a parameter: on matrices only, never on embeddings, nor on the
    convolutions and decays of state-space layers."""
    is_embedding = getattr(parameter, "is_embedding", False)  # of a module of the user's
    return parameter.dim() >= 2 and not (is_embedding or any(part in name for part in _NOT_DECAYED))


def stays_fp32(name: str) -> bool:
    """Whether a parameter is computed with in fp32, whatever the precision of the others."""
    return name.endswith(_FP32)


class Optimizer:
    """Takes the model's trainable parameters over: after this, they live in flat buffers of `dtype`.

    The rule of `optim.kind` updates the matrices that it takes; AdamW updates everything else, and
    without decay what is not a matrix, and embeddings. What `stays_fp32` is not in `dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimSection,
        *,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:
        self.num_updates = 0
        self._ema_decay = optim.ema_decay
        self._summed = False  # whether this update's gradients are in the sums
        self._sums: torch.Tensor | None = None  # the groups' grad_sum, one after the other
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        decayed = [item for item in trained if decays(*item)]
        kept = [item for item in trained if not decays(*item) and not stays_fp32(item[0])]
        exact = [item for item in trained if stays_fp32(item[0])]
        rule, decay = RULES[optim.kind], optim.weight_decay
        taken = [item for item in decayed if rule.takes(*item)]
        left = [item for item in decayed if not rule.takes(*item)]
        self._rules: list[Rule] = []
        for kind, named, strength in (
            (rule, taken, decay),
            (AdamW, left, decay),
            (AdamW, kept, 0),
            (AdamW, exact, 0),
        ):
            if named:
                width = torch.float32 if named is exact else dtype
                flat = Flat(named, width, averaged=optim.ema_decay is not None)
                once = compiled and width == dtype  # another type would be compiled for again
                self._rules.append(kind(flat, optim, strength, once))

    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to fp32 sums and clear them."""
        if self._sums is None:
            self._sums = self._make_sums()
        for flat in self._flats():
            assert flat.grad_sum is not None
            flat.grad_sum.add_(flat.grad)
            flat.grad.zero_()
        self._summed = True

    def sum_over(self, group: Group, figures: torch.Tensor) -> None:
        """Sum the accumulated gradients, and `figures` (n,) fp32 in place, over all processes.

        One message, in fp32 whatever the weights are; an integer is exact up to 2**24.
        """
        assert self._summed and self._sums is not None and len(figures) <= NUM_FIGURES
        room = self._sums[: len(figures)]
        room.copy_(figures)
        group.sum_(self._sums)
        figures.copy_(room)

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, fp32 scalar."""
        norms = [
            torch.linalg.vector_norm(self._gradient(flat), dtype=torch.float32)
            for flat in self._flats()
        ]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """Update weights and averages from the gradients times `grad_scale`; clear the gradients."""
        self.num_updates += 1
        for rule in self._rules:
            rule.update(self._gradient(rule.flat), lr, grad_scale, self.num_updates)
            if self._ema_decay is not None and rule.flat.average is not None:
                rule.flat.average.lerp_(rule.flat.master, 1 - self._ema_decay)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Clear the gradients in place; they stay views of the flat buffers."""
        for flat in self._flats():
            flat.grad.zero_()
            if flat.grad_sum is not None:
                flat.grad_sum.zero_()
        self._summed = False

    def master_weights(self) -> dict[str, torch.Tensor]:
        """fp32 masters of the trained parameters, by name."""
        return {name: flat.view(flat.master, name) for flat in self._flats() for name in flat.spans}

    def ema_weights(self) -> dict[str, torch.Tensor]:
        """fp32 moving averages of the masters, by name; empty without optim.ema_decay."""
        return {
            name: flat.view(flat.average, name)
            for flat in self._flats()
            if flat.average is not None
            for name in flat.spans
        }

    def moments(self) -> dict[str, torch.Tensor]:
        """All state beside the masters, as `<kind>.<name>`: moments by their rule, and `ema`."""
        moments = {
            f"{kind}.{name}": tensor
            for rule in self._rules
            for name in rule.flat.spans
            for kind, tensor in rule.moments(name).items()
        }
        return moments | {f"ema.{name}": tensor for name, tensor in self.ema_weights().items()}

    @torch.no_grad()
    def refresh_working_weights(self) -> None:
        """Cast the masters to the working weights, after masters were loaded."""
        for flat in self._flats():
            flat.weight.copy_(flat.master)

    def digest(self) -> int:
        """A number (under 2**62) that changes with any bit of masters, moments and averages."""
        sums = [t.view(torch.int32).sum(dtype=torch.int64) for t in self.state()]
        return (
            sum(value * (2 * i + 1) for i, value in enumerate(torch.stack(sums).tolist())) % 2**62
        )

    def state_bytes(self) -> int:
        """Memory of masters, moments and averages."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state())

    def _flats(self) -> Iterator[Flat]:
        return (rule.flat for rule in self._rules)

    def state(self) -> Iterator[torch.Tensor]:
        """Every flat buffer that an update carries over to the next."""
        for rule in self._rules:
            yield from (rule.flat.master, *rule.buffers.values())
        yield from (flat.average for flat in self._flats() if flat.average is not None)

    def _make_sums(self) -> torch.Tensor:
        """One fp32 buffer for the sums of all groups, after room for figures."""
        size = NUM_FIGURES + sum(flat.grad.numel() for flat in self._flats())
        sums = torch.zeros(size, device=self._rules[0].flat.grad.device)
        start = NUM_FIGURES
        for flat in self._flats():
            flat.grad_sum = sums[start : start + flat.grad.numel()]
            start += flat.grad.numel()
        return sums

    def _gradient(self, flat: Flat) -> torch.Tensor:
        if self._summed and flat.grad_sum is not None:
            return flat.grad_sum
        return flat.grad
