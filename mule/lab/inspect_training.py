"""What a user's module does in training: one update without NaN, a loss that falls, and which lines
wait for the processor, change shapes with the data, compute in float64 or write in place."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mule.lab.inspect_subject import Outcome, Subject, lines_from, one_line

_UPDATES = 12
_FALLS = 0.95  # of the first loss, after the updates
_SHAPED_BY_DATA = ("nonzero", "masked_select", "unique", "_unique2", "repeat_interleave")
_ITEM = "_local_scalar_dense"


class OpWatch(TorchDispatchMode):
    """Notes the user's line of every operation that a compiler or an accelerator stumbles over."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject
        self.found: dict[str, dict[str, str]] = {}  # kind -> place -> operation

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == _ITEM:
            self._note("item", name)
        elif name in _SHAPED_BY_DATA or (name == "index" and _has_mask(args)):
            self._note("shape", name)
        if isinstance(given, torch.Tensor) and given.dtype == torch.float64 and name != _ITEM:
            self._note("float64", name)
        if name in ("copy_", "index_copy_", "index_put_", "scatter_", "slice_scatter"):
            self._note("written", name)
        return given

    def _note(self, kind: str, name: str) -> None:
        place = self.subject.place(lines_from(sys._getframe(2)))
        if place is not None:
            self.found.setdefault(kind, {}).setdefault(place, name)


def _has_mask(args: tuple[Any, ...]) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in indices)


def check_operations(subject: Subject) -> Outcome:
    """One forward pass in training mode, every operation looked at."""
    outcome = Outcome()
    subject.model.train()
    before = _versions(subject)
    watch = OpWatch(subject)
    with watch:
        subject.logits(subject.ids(2, 16, seed=11))
    subject.model.eval()
    _tell_operations(subject, watch, outcome)
    changed = [name for name, version in _versions(subject).items() if before.get(name) != version]
    if changed:
        places = list(watch.found.get("written", {}))
        outcome.add(
            "warning",
            f"forward writes to buffers in training: {', '.join(changed[:3])}",
            "no cache in training: write only when decoding; what is changed in place breaks "
            "recomputation and makes updates depend on each other",
            places[0] if places else None,
        )
    outcome.facts["buffers_written"] = ", ".join(changed)
    return outcome


def _versions(subject: Subject) -> dict[str, int]:
    return {name: one._version for name, one in subject.model.named_buffers()}


def _tell_operations(subject: Subject, watch: OpWatch, outcome: Outcome) -> None:
    source = subject.file.read_text(encoding="utf-8").splitlines()
    for place in watch.found.get("item", {}):
        found, change = _of_item(_text_at(source, place, subject))
        outcome.add("warning", found, change, place)
    for place, name in watch.found.get("shape", {}).items():
        outcome.add(
            "warning",
            f"{name} makes a tensor whose size depends on the values",
            "compute with a mask of fixed shape (torch.where, one_hot), or sort and use "
            "F.grouped_mm for experts",
            place,
        )
    for place, name in watch.found.get("float64", {}).items():
        outcome.add(
            "warning",
            f"computes in float64 ({name})",
            "use torch.float32: float64 is 32 times slower or worse on most accelerators, and mps "
            "has none",
            place,
        )
    for kind in ("item", "shape", "float64"):
        outcome.facts[f"lines_{kind}"] = len(watch.found.get(kind, {}))


def _text_at(source: list[str], place: str, subject: Subject) -> str:
    name, _, number = place.rpartition(":")
    return source[int(number) - 1].strip() if name == subject.file.name else ""


def _of_item(line: str) -> tuple[str, str]:
    """What a line that waits for a value does, and what to write in its place."""
    if re.match(r"(el)?if\b|while\b|assert\b", line):
        return (
            "a branch depends on a tensor's values",
            "compute both and choose with torch.where, or branch on a Python number",
        )
    if ".tolist(" in line:
        return ".tolist() waits for the values", "keep the tensor; index with it"
    if ".item(" in line:
        return ".item() waits for the value", "keep the tensor, of no dimension"
    if re.match(r"for\b", line):
        return "a loop over a tensor's values", "one operation over all of them, of fixed shape"
    return (
        "a tensor's value becomes a Python number",
        "keep the tensor: a number makes the processor wait and the compiler stop",
    )


# ---------------------------------------------------------------- updates


def check_training(subject: Subject) -> Outcome:
    """AdamW on one batch again and again: finite at every update, and the loss falls."""
    outcome = Outcome()
    model = copy.deepcopy(subject.model).train()
    ids = subject.ids(4, 33, seed=12)
    width = max(one.shape[-1] for one in model.parameters() if one.dim() > 1)
    rate = 3e-3 if width <= 512 else 1e-3
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    torch.manual_seed(0)
    losses: list[float] = []
    for _ in range(_UPDATES):
        loss = _loss(subject, model, ids)
        losses.append(float(loss.detach()))
        if not _update(subject, loss, optimizer, weights, outcome):
            outcome.facts["loss"] = " -> ".join(f"{one:.3f}" for one in (losses[0], losses[-1]))
            return outcome
    outcome.facts |= {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "loss_falls": losses[-1] < _FALLS * losses[0],
    }
    if not outcome.facts["loss_falls"]:
        outcome.add(
            "fault",
            f"the loss on one repeated batch does not fall: {losses[0]:.3f} -> {losses[-1]:.3f} in "
            f"{_UPDATES} updates of AdamW at {rate:g}",
            "see that no .detach(), no_grad or frozen weight cuts the gradient off",
        )
    return outcome


def _loss(subject: Subject, model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = subject.logits(ids[:, :-1], model)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def _update(
    subject: Subject,
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    weights: list[torch.nn.Parameter],
    outcome: Outcome,
) -> bool:
    """Whether the update could be made."""
    if not bool(loss.isfinite()):
        outcome.add("fault", f"the loss is {float(loss.detach())}", "see the layers' scales")
        return False
    optimizer.zero_grad()
    try:
        loss.backward()
    except RuntimeError as error:
        _tell_backward(subject, error, outcome)
        return False
    if any(one.grad is not None and not bool(one.grad.isfinite().all()) for one in weights):
        outcome.add(
            "fault",
            "a gradient is NaN or infinite in training",
            "mask with -inf before softmax or exp, never after; guard sqrt and division at 0",
        )
        return False
    optimizer.step()
    return True


def _tell_backward(subject: Subject, error: RuntimeError, outcome: Outcome) -> None:
    if "modified by an inplace operation" not in str(error):
        outcome.add(
            "fault",
            f"the backward pass fails: {one_line(error)}",
            "every operation between ids and logits must be differentiable in the weights",
        )
        return
    outcome.add(
        "fault",
        "the backward pass fails: a tensor it needs was changed in place",
        "write x = x + y in place of x += y, and x.masked_fill in place of x.masked_fill_",
        _inplace_line(subject),
    )


def _inplace_line(subject: Subject) -> str | None:
    """The first line of the user's that changes an activation in place."""
    found: list[str] = []

    class Writes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func.overloadpacket.__name__
            place = subject.place(lines_from(sys._getframe(1)))
            if name.endswith("_") and not name.startswith("_") and place is not None:
                found.append(place)
            return func(*args, **(kwargs or {}))

    subject.model.train()
    with Writes():
        subject.logits(subject.ids(2, 16, seed=11))
    subject.model.eval()
    return found[0] if found else None


def check_bf16(subject: Subject) -> Outcome:
    """The same forward pass under bf16 autocast, as campaigns train on accelerators."""
    outcome = Outcome()
    ids = subject.ids(1, 16, seed=13)
    with torch.no_grad():
        exact = subject.logits(ids)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                rounded = subject.logits(ids).float()
        except Exception as error:
            outcome.add(
                "fault",
                f"fails in bf16: {type(error).__name__}: {one_line(error)}",
                "make new tensors in the type of an input: torch.zeros(..., dtype=x.dtype), x.new_zeros",
                subject.place_of(error),
            )
            return outcome
    if not bool(rounded.isfinite().all()):
        outcome.add("fault", "NaN or infinite logits in bf16", "mask with -inf, not with -1e38")
    apart = float((exact - rounded).abs().max()) / max(1e-6, float(exact.abs().max()))
    outcome.facts["bf16_apart"] = apart
    return outcome
