"""Whether a token's logits depend on later tokens: proven by gradients, and tried by changing them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mule.lab.inspect_parameters import filled_zeros
from mule.lab.inspect_subject import Outcome, Subject

_TOKENS = 12
_PROBED = (0, 4, _TOKENS - 2)  # positions whose logits are looked at
_ATTENTION = ("scaled_dot_product_attention", "softmax", "flex_attention", "MultiheadAttention")
_MASK = (
    "give attention a causal mask: is_causal=True, or scores.masked_fill(mask, -inf) before softmax"
)
_TORCHS_MASK = (
    "hand it the causal mask: mask=nn.Transformer.generate_square_subsequent_mask(T), "
    "is_causal=True"
)


@dataclass
class _Proof:
    """What gradients show; `known` is false where there is no embedding to differentiate by."""

    known: bool = False
    leak: tuple[int, int] | None = None  # a position, and a later one that it depends on
    context: bool = False  # some position depends on an earlier one


def check_causality(subject: Subject) -> Outcome:
    """d logits[t] / d embedding[j] is 0 for every j > t, and not 0 for some j < t."""
    outcome = Outcome()
    with filled_zeros(subject.model):
        proof = _by_gradients(subject)
        changed = _by_change(subject)
        outcome.facts["proven_by"] = "changing later tokens (no embedding to differentiate by)"
        if proof.known:
            outcome.facts["proven_by"] = "gradients, and changing later tokens"
        outcome.facts["causal"] = not proof.leak and not changed
        if proof.leak:
            _tell_leak(subject, proof.leak, outcome)
        elif changed:
            _tell_change(changed, outcome)
        deaf = not proof.context and not proof.leak and not _heeds_the_past(subject)
    if deaf:
        outcome.add(
            "fault",
            "no token's logits depend on the tokens before it",
            "the mixer passes nothing on: see its mask (is it upside down?) and its output",
        )
    return outcome


def _by_gradients(subject: Subject) -> _Proof:
    kept: list[torch.Tensor] = []
    if subject.token_embedding is None:
        return _Proof()

    def keep(_: nn.Module, __: Any, given: torch.Tensor) -> None:
        kept.append(given)

    hook = subject.token_embedding.register_forward_hook(keep)
    try:
        logits = subject.logits(subject.ids(1, _TOKENS, seed=7))
    finally:
        hook.remove()
    if not kept or kept[0].dim() != 3 or not kept[0].requires_grad:
        return _Proof()
    proof = _Proof(known=True)
    for position in _PROBED:
        reached = _reached(logits, kept[0], position)
        if reached is None:
            continue
        later = reached[position + 1 :].nonzero()
        if len(later):
            proof.leak = (position, position + 1 + int(later[0]))
            return proof
        proof.context |= bool(reached[:position].any())
    return proof


def _reached(output: torch.Tensor, entered: torch.Tensor, position: int) -> torch.Tensor | None:
    """Which positions of `entered` (1, T, D) have a gradient from the output at `position`, (T,)."""
    part = output[:, position]
    generator = torch.Generator().manual_seed(8)
    mixed = (part * torch.randn(part.shape, generator=generator)).sum()
    (gradient,) = torch.autograd.grad(mixed, [entered], retain_graph=True, allow_unused=True)
    return None if gradient is None else gradient[0].any(-1)


def _by_change(subject: Subject) -> float:
    """The greatest change of earlier logits when the last third of the tokens is others; 0: none."""
    ids = subject.ids(1, _TOKENS, seed=9)
    other = ids.clone()
    other[:, -4:] = (other[:, -4:] + 1) % subject.vocab_size
    with torch.no_grad():
        before = subject.logits(ids)[:, :-4]
        apart = (before - subject.logits(other)[:, :-4]).abs().max()
    return float(apart) if float(apart) > 1e-4 * max(1.0, float(before.abs().max())) else 0.0


def _heeds_the_past(subject: Subject) -> bool:
    """Whether another first token changes later logits."""
    ids = subject.ids(1, _TOKENS, seed=9)
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % subject.vocab_size
    with torch.no_grad():
        return not torch.equal(subject.logits(ids)[:, 1:], subject.logits(other)[:, 1:])


def _tell_change(changed: float, outcome: Outcome) -> None:
    outcome.add(
        "fault",
        f"later tokens change earlier logits (by {changed:.2g}), though no gradient flows: a choice "
        "made over the whole sequence, as an expert's capacity or experts that choose their tokens",
        "let every token choose by itself; drop by router weight only in training",
    )


def _tell_leak(subject: Subject, leak: tuple[int, int], outcome: Outcome) -> None:
    position, later = leak
    name, module = _leaking_module(subject)
    told = f"not causal: the logits at position {position} depend on the token at {later}"
    if module is None:
        outcome.add("fault", told, _MASK)
        return
    outcome.add(
        "fault",
        f"{told}; it begins in {name} ({type(module).__name__})",
        _TORCHS_MASK if type(module).__module__.startswith("torch.") else _MASK,
        _line_in(subject, type(module), name),
    )


# ---------------------------------------------------------------- where it leaks


def _leaking_module(subject: Subject) -> tuple[str, nn.Module | None]:
    """Name and module of the innermost one that mixes later positions in; None: not found."""
    seen: dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]] = {}
    hooks = [
        module.register_forward_hook(_keeper(seen, name))
        for name, module in subject.model.named_modules()
        if name
    ]
    try:
        subject.logits(subject.ids(1, _TOKENS, seed=7))
    finally:
        for hook in hooks:
            hook.remove()
    leaking = [name for name, (_, entered, left) in seen.items() if _leaks(entered, left)]
    for name in leaking:
        if not any(other.startswith(f"{name}.") for other in leaking):
            return name, seen[name][0]
    return "", None


def _keeper(seen: dict[str, Any], name: str) -> Any:
    def keep(module: nn.Module, given: Any, left: Any) -> None:
        entered = given[0] if given else None
        left = left[0] if isinstance(left, tuple) and left else left
        tensors = isinstance(entered, torch.Tensor) and isinstance(left, torch.Tensor)
        if tensors and entered.requires_grad and entered.dim() == 3 and left.dim() == 3:
            if entered.shape[:2] == left.shape[:2] == (1, _TOKENS):
                seen[name] = (module, entered, left)

    return keep


def _leaks(entered: torch.Tensor, left: torch.Tensor) -> bool:
    try:
        reached = _reached(left, entered, 4)
    except RuntimeError:  # changed in place since
        return False
    return reached is not None and bool(reached[5:].any())


def _line_in(subject: Subject, cls: type, name: str) -> str | None:
    """Where a class of the user's attends: the call itself, or the head of its forward.

    Of torch's own class, the line in the user's file that calls it.
    """
    try:
        lines, first = inspect.getsourcelines(cls)
        file = inspect.getsourcefile(cls) or ""
    except (OSError, TypeError):
        return None
    if subject.place([(file, first)]) is None:
        parts = reversed(name.split("."))
        return next(filter(None, (_call_of(subject, part) for part in parts)), None)
    for number, line in enumerate(lines, first):
        if any(f"{word}(" in line for word in _ATTENTION):
            return subject.place([(file, number)])
    return subject.place([(file, first)])


def _call_of(subject: Subject, attribute: str) -> str | None:
    """The line that calls `self.<attribute>(...)`."""
    for node in ast.walk(ast.parse(subject.file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{attribute}":
            return subject.place([(str(subject.file), node.lineno)])
    return None
