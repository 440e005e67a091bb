"""Whether a user's forward takes ids (B, T) and gives logits (B, T, V), at which shapes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mule.lab.inspect_subject import Outcome, Refused, Subject, find_logits, one_line

TARGETS = ("targets", "labels", "target", "label")
# What an argument without a default is filled with, by its name.
_ROLES: dict[str, Any] = {
    **dict.fromkeys(("positions", "position_ids", "pos", "pos_ids"), "positions"),
    **dict.fromkeys(("input_pos", "cache_position"), "places"),
    **dict.fromkeys(("start_pos", "offset", "past_length"), 0),
    **dict.fromkeys(("attention_mask", "padding_mask"), "ones"),
    **dict.fromkeys(("mask", "attn_mask", "cache", "kv_cache", "past_key_values", "past"), None),
    **dict.fromkeys(("segments", "segment_ids"), "ones"),
    **dict.fromkeys(TARGETS, "targets"),
}
_SHAPES = ((1, 1), (1, 8), (3, 24), (2, 32))  # rows, tokens
_ADD_TARGETS = "return logits of every position; Mule's loss takes them all"


def arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The arguments of forward by name, the ids left out."""
    found = inspect.signature(model.forward).parameters
    plain = {
        name: one
        for name, one in found.items()
        if one.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    return dict(list(plain.items())[1:])


def prepare(model: nn.Module, settings: dict[str, Any]) -> tuple[int, nn.Embedding | None]:
    """The size of the vocabulary, and the embedding of the ids; None where there is none."""
    embeddings = [one for one in model.modules() if isinstance(one, nn.Embedding)]
    named = [value for key, value in settings.items() if "vocab" in key and isinstance(value, int)]
    rows = max((one.num_embeddings for one in embeddings), default=0)
    vocab_size = named[0] if named else rows or 256
    whole = [one for one in embeddings if one.num_embeddings >= vocab_size]
    return vocab_size, whole[0] if whole else None


def check_forward(subject: Subject) -> Outcome:
    """Find how forward is called; every later check calls it so."""
    outcome = Outcome()
    known = arguments(subject.model)
    needed = [name for name, one in known.items() if one.default is inspect.Parameter.empty]
    if strange := [name for name in needed if name not in _ROLES]:
        raise Refused(
            f"forward needs {', '.join(strange)} beside the ids, and Mule does not know what it is",
            f"give it a default: {strange[0]}=None",
        )
    base = {name: _ROLES[name] for name in needed}
    told = [name for name in TARGETS if name in known and name not in base]
    for further in ({}, *({name: "targets"} for name in told)):
        subject.keywords = base | further
        ids = subject.ids(2, 16)
        with torch.no_grad():
            given = subject.call(ids)
        if (logits := find_logits(given, *ids.shape)) is not None:
            break
    else:
        raise Refused(
            f"forward gives {_described(given)} for ids (2, 16), not logits (2, 16, V)",
            "return logits (B, T, V), alone, first in a tuple, or as `.logits`",
        )
    outcome.facts |= {
        "gives": _described(given),
        "called_with": ", ".join(["ids", *subject.keywords]),
        "vocab_size": logits.shape[-1],
        "keywords": subject.keywords,
        "arguments": list(known),
    }
    if further:
        outcome.add(
            "note",
            f"forward gives all logits only when {next(iter(further))} are given",
            _ADD_TARGETS + "; keep the short way for decoding",
            _forward_place(subject),
        )
    _judge_values(subject, logits, outcome)
    return outcome


def _judge_values(subject: Subject, logits: torch.Tensor, outcome: Outcome) -> None:
    """Whether these are logits over the vocabulary, and finite."""
    size, place = logits.shape[-1], _forward_place(subject)
    if not bool(logits.isfinite().all()):
        outcome.add(
            "fault", "forward gives NaN or infinite logits", "see the layers' scales", place
        )
    elif float(logits.min()) >= 0 and torch.allclose(
        logits.sum(-1), torch.ones(()), atol=1e-3, rtol=0
    ):
        outcome.add(
            "fault",
            "forward gives probabilities: every row adds up to 1",
            "return what goes into softmax; the loss takes logits",
            place,
        )
    if size < subject.vocab_size:
        outcome.add(
            "fault",
            f"forward gives {size} values a token, fewer than the {subject.vocab_size} ids",
            "return the output of the head, not hidden states",
            place,
        )


def _forward_place(subject: Subject) -> str | None:
    code = getattr(type(subject.model).forward, "__code__", None)
    return subject.place([(code.co_filename, code.co_firstlineno)]) if code else None


def check_shapes(subject: Subject) -> Outcome:
    """Run forward at several numbers of rows and tokens, and see that rows keep to themselves."""
    outcome = Outcome()
    ran = []
    whole = [(1, subject.most_tokens)] if subject.most_tokens else []
    for rows, tokens in (*_SHAPES, *whole):
        try:
            with torch.no_grad():
                subject.logits(subject.ids(rows, tokens))
            ran.append(f"{rows}x{tokens}")
        except Exception as error:
            told = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
            outcome.add(
                "fault" if tokens > 1 else "warning",
                f"fails for ids ({rows}, {tokens}): {told}{one_line(error)}",
                "take B and T from the ids' shape; no size may be written into the module",
                subject.place_of(error),
            )
    outcome.facts["ran_at"] = ", ".join(ran)
    _check_rows(subject, outcome)
    return outcome


def _check_rows(subject: Subject, outcome: Outcome) -> None:
    """What stands in one row must not change another's logits."""
    ids = subject.ids(2, 16, seed=1)
    other = torch.cat((ids[:1], subject.ids(1, 16, seed=2)))
    training = subject.model.training
    subject.model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        first = subject.logits(ids)[0]
        torch.manual_seed(0)
        second = subject.logits(other)[0]
    subject.model.train(training)
    apart = float((first - second).abs().max())
    outcome.facts["rows_apart"] = apart <= 1e-4 * max(1.0, float(first.abs().max()))
    if not outcome.facts["rows_apart"]:
        outcome.add(
            "fault",
            f"one row of a batch changes another's logits (by {apart:.2g})",
            "nothing may be normalised, routed or capped over the rows of a batch: no BatchNorm; an "
            "expert's capacity counts within a row",
        )


def _described(given: Any) -> str:
    if isinstance(given, torch.Tensor):
        return f"a tensor {tuple(given.shape)}"
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {', '.join(_described(one) for one in given)}"
    if hasattr(given, "logits"):
        return f"a {type(given).__name__} with logits {tuple(given.logits.shape)}"
    return "nothing" if given is None else f"a {type(given).__name__}"
