"""Counting a user's parameters: all, and those that one token uses, measured by their gradients.

A mixture of experts is found by what it does. Over many single tokens an expert is a matrix, or a
slice of stacked matrices, that gets a gradient for some tokens and none for others.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mule.lab.inspect_subject import Outcome, Subject

_TOKENS = 24  # single tokens tried
_MAX_EXPERTS = 1024
_ROUTER = re.compile(r"(router|gate|gating|wg|switch)(\.|$)")


def check_parameters(subject: Subject) -> Outcome:
    """Total and active parameters, tied embeddings, experts and their router."""
    outcome = Outcome()
    model = subject.model
    weights = dict(model.named_parameters())
    total = sum(one.numel() for one in weights.values())
    embedding = subject.token_embedding.weight.numel() if subject.token_embedding else 0
    with filled_zeros(model):
        often = _gradients(subject, subject.ids(4, 64, seed=3), weights)
        single = [
            _gradients(subject, token.view(1, 1), weights)
            for token in subject.ids(1, _TOKENS, seed=4)[0]
        ]
    experts = _find_experts(weights, single)
    inactive = sum(layer.num_inactive() for layer in experts)
    outcome.facts |= {
        "total_params": total,
        "total_params_without_embeddings": total - embedding,
        "active_params": round(total - inactive),
        "active_params_without_embeddings": round(total - embedding - inactive),
        "tied_embeddings": _tied(subject),
        "head_params": _head_params(subject),
        "how_counted": f"gradients of {_TOKENS} single tokens; the embedding counts whole",
        "dtypes": ", ".join(sorted({str(one.dtype)[6:] for one in weights.values()})),
    }
    _tell_experts(subject, experts, outcome)
    _tell_unused(weights, often, experts, outcome)
    _tell_head(subject, outcome)
    if any(one.dtype == torch.float64 for one in [*weights.values(), *model.buffers()]):
        outcome.add("fault", "weights or buffers in float64", "make them in torch.float32")
    return outcome


# ---------------------------------------------------------------- gradients


@contextlib.contextmanager
def filled_zeros(model: nn.Module) -> Iterator[None]:
    """Matrices of zeros (projections that begin at 0) made small numbers meanwhile, so that
    gradients pass through them."""
    generator = torch.Generator().manual_seed(5)
    zeros = [one for one in model.parameters() if one.dim() > 1 and not bool(one.detach().any())]
    with torch.no_grad():
        for one in zeros:
            one.copy_(0.02 * torch.randn(one.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for one in zeros:
                one.zero_()


def _gradients(
    subject: Subject, ids: torch.Tensor, weights: dict[str, nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Which slices (along the first dimension) of each weight get a gradient, bool."""
    logits = subject.logits(ids)
    generator = torch.Generator().manual_seed(6)
    mixed = (logits * torch.randn(logits.shape, generator=generator)).sum()
    kept = [name for name, one in weights.items() if one.requires_grad]
    found = torch.autograd.grad(mixed, [weights[name] for name in kept], allow_unused=True)
    reached = {}
    for name, gradient in zip(kept, found, strict=True):
        weight = weights[name]
        if gradient is None:
            reached[name] = torch.zeros(len(weight) if weight.dim() else 1, dtype=torch.bool)
        else:
            reached[name] = gradient.reshape(len(weight) if weight.dim() else 1, -1).any(1)
    return reached


# ---------------------------------------------------------------- experts


@dataclass
class _Experts:
    """The experts of one layer: for each, how many parameters and for which tokens it is used."""

    name: str
    sizes: dict[Any, int] = field(default_factory=lambda: defaultdict(int))
    used: dict[Any, list[bool]] = field(default_factory=dict)

    def add(self, expert: int, size: int, tokens: list[bool]) -> None:
        """A weight of an expert's, and which of the single tokens reached it."""
        self.sizes[expert] += size
        before = self.used.get(expert, [False] * len(tokens))
        self.used[expert] = [a or b for a, b in zip(before, tokens, strict=True)]

    @property
    def per_token(self) -> float:
        return sum(sum(tokens) / len(tokens) for tokens in self.used.values())

    def num_inactive(self) -> float:
        """Parameters that a token leaves out, on average."""
        return sum(
            size * (1 - sum(self.used[key]) / len(self.used[key]))
            for key, size in self.sizes.items()
        )


def _find_experts(
    weights: dict[str, nn.Parameter], single: list[dict[str, torch.Tensor]]
) -> list[_Experts]:
    """The layers of experts, in order: stacked matrices, or modules numbered in a list."""
    layers: dict[str, _Experts] = {}
    for name in single[0]:
        reached = torch.stack([tokens[name] for tokens in single])  # (tokens, slices)
        if _is_stacked(weights[name]) and _varies(reached):
            stem = name.rpartition(".")[0]
            layer = layers.setdefault(stem, _Experts(stem))
            for expert, one in enumerate(weights[name]):
                layer.add(expert, one.numel(), reached[:, expert].tolist())
    for stem, members in _numbered(single[0]).items():
        reached = torch.tensor(
            [
                [any(bool(tokens[name].any()) for name in names) for names in members.values()]
                for tokens in single
            ]
        )
        if len(members) > 1 and _varies(reached):
            layer = layers.setdefault(stem, _Experts(stem))
            for place, (number, names) in enumerate(members.items()):
                size = sum(weights[name].numel() for name in names)
                layer.add(number, size, reached[:, place].tolist())
    return list(layers.values())


def _is_stacked(weight: torch.Tensor) -> bool:
    """Whether it can be matrices of experts, one above the other."""
    return weight.dim() == 3 and 1 < len(weight) <= _MAX_EXPERTS and min(weight.shape[1:]) > 1


def _varies(reached: torch.Tensor) -> bool:
    """Whether some of (tokens, experts) get a gradient for one token and none for another."""
    return bool((reached.any(0) & ~reached.all(0)).any())


def _numbered(names: dict[str, Any]) -> dict[str, dict[int, list[str]]]:
    """stem -> number -> weights, of all that is kept in lists: `experts.3.w1.weight`."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdigit():
                found[".".join(parts[:place])][int(part)].append(name)
    return found


def _tell_experts(subject: Subject, layers: list[_Experts], outcome: Outcome) -> None:
    outcome.facts["moe"] = bool(layers)
    if not layers:
        return
    first = layers[0]
    outcome.facts |= {
        "moe_layers": len(layers),
        "experts": len(first.sizes),
        "experts_per_token": round(sum(one.per_token for one in layers) / len(layers), 2),
        "experts_at": first.name,
        "router": _router(subject.model, len(first.sizes)),
    }
    if outcome.facts["router"] is None:
        outcome.add(
            "note",
            f"experts were found at {first.name}, but no router: no Linear of {len(first.sizes)} rows",
            "routing statistics need the router's logits; make it an nn.Linear",
        )


def _router(model: nn.Module, num_experts: int) -> str | None:
    """The name of the first layer that scores the experts."""
    rows = [
        name
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and len(weight) == num_experts and weight.shape[1] != num_experts
    ]
    named = [name for name in rows if _ROUTER.search(name)]
    return next(iter([*named, *rows]), None)


# ---------------------------------------------------------------- the rest


def _tied(subject: Subject) -> bool:
    """Whether the head's matrix is the embedding's."""
    embedding = subject.token_embedding
    if embedding is None:
        return False
    return any(
        isinstance(one, nn.Linear) and one.weight.data_ptr() == embedding.weight.data_ptr()
        for one in subject.model.modules()
    )


def _head_params(subject: Subject) -> int:
    """Of the last matrix that gives as many values as there are tokens; 0 where none does."""
    heads = [
        one.weight.numel()
        for one in subject.model.modules()
        if isinstance(one, nn.Linear) and one.out_features == subject.vocab_size
    ]
    return heads[-1] if heads else 0


def _tell_head(subject: Subject, outcome: Outcome) -> None:
    embedding = subject.token_embedding
    if embedding is None or outcome.facts["tied_embeddings"]:
        return
    share = embedding.weight.numel() / outcome.facts["total_params"]
    if share > 0.1:
        outcome.add(
            "note",
            f"embedding and head are not tied; each is {share:.0%} of the parameters",
            "tie them, or keep them apart in every variant: self.head.weight = self.embed.weight",
        )


def _tell_unused(
    weights: dict[str, nn.Parameter],
    often: dict[str, torch.Tensor],
    layers: list[_Experts],
    outcome: Outcome,
) -> None:
    """Weights that no token reaches."""
    stems = tuple(f"{layer.name}." for layer in layers)
    unused = [
        name
        for name, reached in often.items()
        if not bool(reached.any()) and not name.startswith(stems or ("\0",))
    ]
    outcome.facts["unused_params"] = sum(weights[name].numel() for name in unused)
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        outcome.add(
            "warning",
            f"no gradient reaches {', '.join(unused[:3])}{more} "
            f"({outcome.facts['unused_params']:,} parameters)",
            "use them in forward or remove them: DDP waits for gradients that never come",
        )
