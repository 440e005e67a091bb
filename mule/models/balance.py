"""What the routers of a mixture's layers did in training, and what keeps their experts equally busy.

Sources: Fedus et al. 2021, equations 4 to 6 (the auxiliary loss); Zoph et al. 2022, equation 5 (the
z-loss); Wang et al. 2024, algorithm 1 (a bias in place of a loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mule.models.config import Routing
from mule.models.moe import MoE, Routed

# Sums a tensor over all processes in place.
SumOver = Callable[[torch.Tensor], None]


class _Tally:
    """Sums over tokens, a row for each layer: `wanted` (L, E) int64, and the figures (L, 7) fp32 of
    `Routed` with the two losses behind them."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.wanted = torch.zeros(num_layers, num_experts, dtype=torch.int64)
        self.figures = torch.zeros(num_layers, 7)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.wanted, self.figures

    def to(self, device: torch.device) -> None:
        self.wanted, self.figures = self.wanted.to(device), self.figures.to(device)

    def add(self, wanted: torch.Tensor, figures: torch.Tensor) -> None:
        self.wanted += wanted
        self.figures += figures

    def clear(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()

    def sum_over(self, sum_: SumOver, *, is_first: bool) -> None:
        """Give the sums of all processes to the first, and nothing to the others."""
        for tensor in self.tensors():
            sum_(tensor)
        if not is_first:
            self.clear()


class Balance:
    """The balance of all layers that route, over an update and over what is reported at a time."""

    def __init__(self, layers: Mapping[int, MoE], routing: Routing) -> None:
        self._layers, self._routing = dict(layers), routing
        for layer in self._layers.values():
            layer.set_routing(routing)
        num_experts = next(iter(self._layers.values())).num_experts
        self._update = _Tally(len(self._layers), num_experts)
        self._since = _Tally(len(self._layers), num_experts)  # the last report
        self._targets_per_token = 1.0

    @property
    def _device(self) -> torch.device:
        """Where the model is, and what processes sum."""
        return next(iter(self._layers.values())).bias.device

    def begin(self, targets_per_token: float) -> None:
        """Before an update, whose targets and tokens that count have this ratio.

        What an attempt at it that failed, or a trial, has left is forgotten.
        """
        self._targets_per_token = targets_per_token
        self._update.clear()

    def add(self, routed: Mapping[int, Routed]) -> torch.Tensor:
        """Count a pass; its losses, a scalar to be added to the summed loss of the targets.

        The mean over the update's targets then has the mean of the z-losses over its tokens, however
        it is cut. The auxiliary loss is a product of two means over tokens: those of a micro-batch,
        and of a process; the update's is the mean of these products, weighted by tokens.
        """
        parts = list(routed.values())
        losses = torch.stack([part.losses for part in parts])  # (layers, 2)
        figures = torch.stack([part.figures for part in parts])
        self._update.to(losses.device)
        upper = slice(-len(parts), None)  # blocks below are frozen
        self._update.wanted[upper] += torch.stack([part.wanted for part in parts])
        self._update.figures[upper] += torch.cat((figures, losses.detach()), dim=1)
        auxiliary, z = losses.sum(0).unbind()
        weighted = z * self._routing.z_loss
        if self._routing.balance == "aux":
            weighted = weighted + auxiliary * self._routing.aux_loss
        return weighted * self._targets_per_token

    @torch.no_grad()
    def applied(self, sum_: SumOver) -> None:
        """After an update that was applied: count it, and move the biases against the imbalance."""
        wanted, figures = self._update.tensors()
        self._since.to(wanted.device)
        self._since.add(wanted, figures)
        if self._routing.balance == "bias":
            sum_(wanted)
            short = wanted.float().mean(1, keepdim=True) - wanted
            for layer, step in zip(self._layers.values(), short.sign(), strict=True):
                layer.bias += self._routing.bias_rate * step.to(layer.bias.device)
        self._update.clear()

    def report(self, sum_: SumOver) -> dict[str, Any]:
        """What the row `moe` of a run's metrics says, of all processes; counting begins anew.

        A list has an entry for each block in `layers`: frozen ones are left out. `max_violation` is by
        how much the busiest expert exceeds the mean, as a share of it (MaxVio of Wang et al. 2024);
        `dropped` and `rerouted` are shares of all assignments, the latter those that are not the
        router's first k. Losses are as they are before their weights, entropy is a share of log E.
        """
        self._since.to(self._device)
        for tensor in self._since.tensors():
            sum_(tensor)
        biases = torch.stack([layer.bias for layer in self._layers.values()]).cpu()
        wanted, figures = (tensor.cpu() for tensor in self._since.tensors())
        seen = figures[:, 0] > 0
        biases, wanted, figures = biases[seen], wanted[seen], figures[seen].double()
        self._since.clear()
        tokens, dropped, rerouted, entropy, confidence, auxiliary, z = figures.T
        assignments = wanted.sum(1)
        columns = {
            "max_violation": wanted.amax(1) / wanted.double().mean(1) - 1,
            "dropped": dropped / assignments,
            "rerouted": rerouted / assignments,
            "entropy": entropy / tokens,
            "confidence": confidence / tokens,
            "aux_loss": auxiliary / tokens,
            "z_loss": z / tokens,
            "bias_range": biases.amax(1) - biases.amin(1),
        }
        return {
            "layers": [layer for layer, is_seen in zip(self._layers, seen.tolist()) if is_seen],
            "tokens_per_expert": wanted.tolist(),
            **{key: column.tolist() for key, column in columns.items()},
        }

    def state(self, sum_: SumOver, *, is_first: bool) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: the biases, and what has been counted since the last report.

        All processes call it; the counts are the first one's from then on.
        """
        self._since.to(self._device)
        self._since.sum_over(sum_, is_first=is_first)
        biases = torch.stack([layer.bias for layer in self._layers.values()])
        wanted, figures = self._since.tensors()
        return {"bias": biases.cpu(), "wanted": wanted.cpu(), "figures": figures.cpu()}

    def empty_state(self) -> dict[str, torch.Tensor]:
        """What `state` gives, to be filled."""
        state = self.state(lambda tensor: None, is_first=True)
        return {name: torch.zeros_like(tensor) for name, tensor in state.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor], *, is_first: bool) -> None:
        """Go on from a checkpoint's `state`."""
        for layer, bias in zip(self._layers.values(), state["bias"], strict=True):
            layer.bias.copy_(bias)
        self._since.clear()
        if is_first:
            for tensor, kept in zip(
                self._since.tensors(), (state["wanted"], state["figures"]), strict=True
            ):
                tensor.copy_(kept)
