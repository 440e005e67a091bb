"""The mixture of experts. Source: Shazeer et al. 2017; Fedus et al. 2021.

Shapes: N tokens, k experts of each, E experts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mule.models.capacity import assign_within_capacity
from mule.models.config import ModelConfig, Routing
from mule.models.experts import apply_experts
from mule.models.mlp import GatedMLP


class Routed(NamedTuple):
    """What a layer's router did with the tokens that count, all of it summed over them."""

    losses: (
        torch.Tensor
    )  # (2,) fp32, with a gradient: auxiliary loss and z-loss, before their weights
    wanted: torch.Tensor  # (E,) int64: tokens that chose the expert, whether it had room or not
    # (5,) fp32: the tokens themselves; assignments dropped, and rerouted; the router's entropy, of
    # log E; the probability of the first expert
    figures: torch.Tensor


@dataclasses.dataclass(frozen=True)
class RoutingPass:
    """A pass in training: which tokens count (B, T) bool, and what the router of each block did."""

    counted: torch.Tensor
    routed: dict[int, Routed] = dataclasses.field(default_factory=dict)


class Router(nn.Module):
    """A score for each expert; not a linear layer that an adapter or a quantiser would take."""

    def __init__(self, num_experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, D) -> logits (N, E), in fp32 whatever the weights are."""
        return F.linear(x.float(), self.weight.float())


class Experts(nn.Module):
    """The experts' matrices, stacked: (E, 2 F, D) gate above up, and (E, D, F) down."""

    def __init__(self, num_experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))


class MoE(nn.Module):
    """The weighted sum of the k experts that a router chooses for each token, of any number of tokens
    each; and of an expert that every token passes, where there is one.

    In training `routing` may limit and balance the experts; evaluation, decoding and exports know
    nothing of it.
    """

    routing: Routing | None = None
    bias: torch.Tensor  # (E,) fp32, on the scores that experts are chosen by, in training only

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.gate = Router(moe.num_experts, config.hidden_size)
        self.experts = Experts(moe.num_experts, config.hidden_size, moe.intermediate_size)
        self.shared_expert = _shared_expert(config)
        self.num_experts, self.top_k = moe.num_experts, moe.experts_per_token
        self.renormalize = moe.renormalize

    def set_routing(self, routing: Routing) -> None:
        """How training routes; the bias begins at 0."""
        self.routing = routing
        bias = torch.zeros(self.num_experts, device=self.gate.weight.device)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])
        probs = self.gate(flat).softmax(-1)
        _, chosen = probs.topk(self.top_k, dim=-1)
        return self._computed(flat, self._weights(probs, chosen), chosen).view_as(x)

    def train_forward(self, x: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, Routed]:
        """As `forward`, by the rules of `routing`; `counted` (B, T) bool leaves padding out.

        Padding passes no expert but the shared one: nothing depends on it.
        """
        routing = self.routing
        assert routing is not None
        flat, counts = x.reshape(-1, x.shape[-1]), counted.flatten()
        logits = self.gate(flat)
        probs = logits.softmax(-1)
        scores = probs.detach()
        if routing.balance == "bias":
            scores = scores + self.bias
        _, wanted = scores.topk(self.top_k, dim=-1)
        chosen, kept = wanted, counts[:, None].expand_as(wanted)
        if routing.capacity_factor is not None:
            chosen, kept = assign_within_capacity(
                scores,
                probs.detach(),
                counts,
                self.top_k,
                routing.capacity_factor,
                routing.overflow == "reroute",
            )
        assigned = chosen.where(kept, self.num_experts)
        y = self._computed(flat, self._weights(probs, chosen), assigned).view_as(x)
        return y, self._routed(logits, probs, wanted, chosen, kept, counts)

    def _weights(self, probs: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Of the chosen experts, (N, k) fp32. What is dropped takes its weight with it."""
        weights = probs.gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.renormalize else weights

    def _computed(
        self, flat: torch.Tensor, weights: torch.Tensor, assigned: torch.Tensor
    ) -> torch.Tensor:
        weights, experts = weights.to(flat.dtype), self.experts
        y = apply_experts(flat, weights, assigned, experts.gate_up_proj, experts.down_proj)
        return y if self.shared_expert is None else y + self.shared_expert(flat)

    def _routed(
        self,
        logits: torch.Tensor,
        probs: torch.Tensor,
        wanted: torch.Tensor,
        chosen: torch.Tensor,
        kept: torch.Tensor,
        counts: torch.Tensor,
    ) -> Routed:
        """The losses and figures of a pass; wanted, chosen and kept (N, k), counts (N,) bool.

        The auxiliary loss is E / k * sum over the experts of f * P, which is 1 at even routing: f the
        tokens that want the expert, P its mean probability (Fedus et al. 2021, equations 4 to 6).
        """
        num_experts, mask = self.num_experts, counts[:, None]
        tokens = mask.sum(dtype=torch.float32)
        safe = tokens.clamp(min=1.0)  # a process may have no rows
        experts = torch.arange(num_experts, device=probs.device)
        num_wanted = ((wanted[..., None] == experts) & mask[..., None]).sum((0, 1))
        mean_probs = (probs * mask).sum(0) / safe
        auxiliary = (num_wanted * mean_probs).sum() * (num_experts / self.top_k)
        z = (logits.logsumexp(-1).square() * counts).sum()
        p = probs.detach()
        least = p.gather(1, p.topk(self.top_k, dim=-1).indices[:, -1:])
        is_elsewhere = kept & (p.gather(1, chosen) < least)
        entropy = -(p * (p + 1e-20).log() * mask).sum() / math.log(max(num_experts, 2))
        figures = (
            tokens,
            (mask & ~kept).sum(dtype=torch.float32),
            is_elsewhere.sum(dtype=torch.float32),
            entropy,
            (p.amax(-1) * counts).sum(),
        )
        return Routed(torch.stack((auxiliary, z)), num_wanted, torch.stack(figures))


def _shared_expert(config: ModelConfig) -> GatedMLP | None:
    assert config.moe is not None
    inner = config.moe.shared_intermediate_size
    return GatedMLP(dataclasses.replace(config, intermediate_size=inner)) if inner else None
