"""A limit to the tokens of an expert: who passes it, who is turned away, and who goes elsewhere.

Source: Fedus et al. 2021, section 2.2 (capacity). Differs: the lightest assignments are turned away,
not the last ones of the batch; and they may go to the next expert that has room.
"""

from __future__ import annotations

import math

import torch


@torch.library.custom_op("mule::assign_within_capacity", mutates_args=())
def assign_within_capacity(
    scores: torch.Tensor,
    probs: torch.Tensor,
    counted: torch.Tensor,
    top_k: int,
    factor: float,
    reroute: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts (N, k) int64 of each token, and whether they have room for it (N, k) bool.

    Each of the E experts takes factor * k / E of the `counted` (N,) tokens, rounded up. A token wants
    the experts of its highest `scores` (N, E); those with the highest `probs` (N, E) are taken first.
    With `reroute` what found no room goes on to the token's next expert, and the heaviest of those
    are taken where there is room left.
    """
    num_experts = scores.shape[1]
    ranking = scores.argsort(dim=1, descending=True, stable=True)
    tokens = int(counted.sum())
    room = torch.full((num_experts,), math.ceil(factor * tokens * top_k / num_experts))
    room = room.to(scores.device)
    experts = ranking[:, :top_k].contiguous()
    kept = _admitted(experts, probs, counted[:, None].expand_as(experts), room)
    if not reroute:
        return experts, kept
    tried = torch.full((len(scores), 1), top_k, device=scores.device)  # of a token's ranking
    while True:
        # The places of a token that are still empty ask for its next experts, one each.
        empty = ~kept & counted[:, None]
        turn = tried + empty.cumsum(1) - 1
        asking = empty & (turn < num_experts)
        if not asking.any():
            return experts, kept
        wanted = ranking.gather(1, turn.clamp(0, num_experts - 1))
        experts = torch.where(asking, wanted, experts)
        kept = kept | _admitted(experts, probs, asking, room)
        tried = tried + empty.sum(1, keepdim=True)


@assign_within_capacity.register_fake
def _(scores, probs, counted, top_k, factor, reroute):  # type: ignore[no-untyped-def]
    shape = (scores.shape[0], top_k)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape, dtype=torch.bool)


def _admitted(
    experts: torch.Tensor, probs: torch.Tensor, asking: torch.Tensor, room: torch.Tensor
) -> torch.Tensor:
    """Who of those that are `asking` (N, k) gets in, the heaviest first; `room` (E,) shrinks by them."""
    places = asking.flatten().nonzero().flatten()
    wanted = experts.flatten()[places]
    weights = probs.gather(1, experts).flatten()[places]
    by_weight = weights.argsort(descending=True, stable=True)
    order = by_weight[wanted[by_weight].argsort(stable=True)]  # by expert, then by weight
    sorted_experts = wanted[order]
    counts = torch.bincount(sorted_experts, minlength=len(room))
    first = counts.cumsum(0) - counts  # where each expert's candidates begin
    rank = torch.arange(len(order), device=order.device) - first[sorted_experts]
    is_in = rank < room[sorted_experts]
    room -= torch.bincount(sorted_experts[is_in], minlength=len(room))
    admitted = torch.zeros(experts.numel(), dtype=torch.bool, device=experts.device)
    admitted[places[order[is_in]]] = True
    return admitted.view_as(experts)
