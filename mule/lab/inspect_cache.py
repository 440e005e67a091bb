"""Whether a user's module decodes with a cache, and whether cached logits equal the uncached ones.

Four protocols are tried: a cache that comes back and is handed in again (transformers, and most
nanoGPT forks), a cache object that the module makes, positions with caches inside the module
(Llama's start_pos, gpt-fast's input_pos), and a flag alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from mule.lab.inspect_forward import arguments
from mule.lab.inspect_subject import Outcome, Subject, find_logits, one_line

CACHES = ("past_key_values", "past_key_value", "kv_caches", "kv_cache", "caches", "cache", "past")
CACHES += ("layer_past", "past_kv", "inference_params", "states", "state", "memory")
FLAGS = ("use_cache", "use_kv_cache", "return_cache", "with_cache", "use_kvcache")
POSITIONS = ("start_pos", "input_pos", "cache_position", "position_ids", "positions", "pos")
_MAKERS = ("new_cache", "make_cache", "init_cache", "create_cache", "setup_cache", "setup_caches")
_MAKERS += ("set_kv_cache", "init_kv_cache", "setup_kv_cache", "allocate_inference_cache")
_RESETS = ("reset_cache", "reset_kv_cache", "clear_cache", "clear_kv_cache", "reset_caches")
_PREFILL, _STEPS = 8, 4
_TOLERANCE = 1e-3  # of the greatest logit, in fp32
_ADD = (
    "give forward a cache: keys and values written at the new positions of a buffer of fixed size, "
    "positions counted on; docs/lab.md shows one"
)


class _Undrivable(Exception):
    """The arguments are there, but no way of using them was found."""


def check_cache(subject: Subject) -> Outcome:
    """Prefill 8 tokens and decode 4, one at a time; compare with the whole text at once."""
    outcome = Outcome()
    known = arguments(subject.model)
    found = [name for name in known if name in (*CACHES, *FLAGS, *POSITIONS)]
    offers = [name for name in found if name in (*CACHES, *FLAGS)]
    inner = any(name in ("start_pos", "input_pos", "cache_position") for name in found)
    outcome.facts["cache"] = bool(offers or inner)
    if not outcome.facts["cache"]:
        outcome.add(
            "warning", "no cache: forward takes the ids alone, so decoding recomputes", _ADD
        )
        return outcome
    outcome.facts["cache_arguments"] = ", ".join(found)
    ids = subject.ids(1, _PREFILL + _STEPS, seed=10)
    with torch.no_grad():
        whole = subject.logits(ids)[:, _PREFILL - 1 :]
        try:
            cached = _decode(subject, ids, found)
        except _Undrivable as error:
            outcome.add("warning", f"the cache could not be tried: {error}", _HOW)
            return outcome
        except Exception as error:
            outcome.add(
                "fault",
                f"decoding with the cache fails: {type(error).__name__}: {one_line(error)}",
                "a single new token (B, 1) must be taken after a prefill; see the mask and positions",
                subject.place_of(error),
            )
            return outcome
    _compare(subject, whole, cached, outcome)
    return outcome


_HOW = (
    "return (logits, cache) and take that cache back, or make one with new_cache(batch_size, "
    "max_tokens)"
)


def _compare(subject: Subject, whole: torch.Tensor, cached: torch.Tensor, outcome: Outcome) -> None:
    apart = (whole - cached).abs().amax(-1)[0]
    limit = _TOLERANCE * max(1.0, float(whole.abs().max()))
    outcome.facts["cache_max_error"] = float(apart.max())
    outcome.facts["cached_equals_uncached"] = bool(apart.max() <= limit)
    if outcome.facts["cached_equals_uncached"]:
        return
    first = int((apart > limit).nonzero()[0])
    if first == 0:
        when, why = "already after the prefill", "the prefill itself: its mask and positions"
    elif first == 1:
        when = "from the first token decoded alone"
        why = (
            "the usual causes: positions that begin at 0 again (rotary angles and position "
            "embeddings need the number of cached tokens added), or is_causal=True with one query, "
            "which then sees the first key only"
        )
    else:
        when = f"from decoded token {first} on"
        why = "the cache does not grow: append to it, or write at the next place"
    outcome.add(
        "fault",
        f"cached logits differ from uncached ones by {float(apart.max()):.2g} {when}",
        why,
        _cache_line(subject),
    )


def _cache_line(subject: Subject) -> str | None:
    """Where the user's file joins or writes what is kept: the first such line."""
    joins = ("torch.cat", "index_copy", "copy_(", "] =")
    for number, line in enumerate(subject.file.read_text(encoding="utf-8").splitlines(), 1):
        if any(word in line for word in joins) and ("cache" in line or "past" in line):
            return subject.place([(str(subject.file), number)])
    return None


# ---------------------------------------------------------------- driving it


def _decode(subject: Subject, ids: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Logits of the last prefilled and of each decoded token, (1, 1 + steps, V)."""
    cache_name = next((name for name in CACHES if name in names), None)
    model = copy.deepcopy(subject.model)
    for reset in _RESETS:
        if callable(method := getattr(model, reset, None)) and not _needed(method):
            method()
    cache = _made(model, ids.shape[0])
    rows = []
    ends = [_PREFILL, *range(_PREFILL + 1, ids.shape[1] + 1)]
    for first, end in zip([0, *ends], ends):
        given, returned = _step(
            subject, model, ids[:, first:end], names, (first, cache_name, cache)
        )
        cache = cache if returned is None else returned
        if cache is None and cache_name is not None:
            raise _Undrivable(f"forward takes {cache_name}, but gives none back with it")
        rows.append(given[:, -1])
    return torch.stack(rows, dim=1)


def _step(
    subject: Subject,
    model: Any,
    ids: torch.Tensor,
    names: list[str],
    state: tuple[int, str | None, Any],
) -> tuple[torch.Tensor, Any]:
    """The logits of new ids at position `at`, and the cache that came back."""
    at, cache_name, cache = state
    more = {name: True for name in FLAGS if name in names}
    more |= {name: _positions(name, at, ids) for name in POSITIONS if name in names}
    if cache_name is not None:
        more[cache_name] = cache
    given = subject.call(ids, model, **more)
    logits = find_logits(given, *ids.shape)
    if logits is None and isinstance(given, (tuple, list)):
        logits = next((one for one in given if isinstance(one, torch.Tensor)), None)
    if logits is None:
        logits = given if isinstance(given, torch.Tensor) else None
    if logits is None:
        raise _Undrivable("no logits came with it")
    logits = logits.view(ids.shape[0], -1, logits.shape[-1])
    return logits, _returned(given)


def _positions(name: str, at: int, ids: torch.Tensor) -> Any:
    if name == "start_pos":
        return at
    places = torch.arange(at, at + ids.shape[1])
    return places if name in ("input_pos", "cache_position") else places.expand_as(ids)


def _returned(given: Any) -> Any:
    """The cache in what forward gave: what is neither logits nor a loss."""
    for name in CACHES:
        if getattr(given, name, None) is not None:
            return getattr(given, name)
        if isinstance(given, dict) and given.get(name) is not None:
            return given[name]
    if isinstance(given, (tuple, list)):
        rest = [one for one in given[1:] if one is not None and not isinstance(one, (int, float))]
        rest = [one for one in rest if not (isinstance(one, torch.Tensor) and one.dim() < 3)]
        return rest[-1] if rest else None
    return None


def _made(model: Any, rows: int) -> Any:
    """What the module's own function for a new cache gives; None where it has none."""
    for name in _MAKERS:
        method = getattr(model, name, None)
        if callable(method):
            return method(**_sizes(method, rows))
    return None


def _sizes(method: Callable[..., Any], rows: int) -> dict[str, Any]:
    """Values for the arguments that a function for a new cache needs, by their names."""
    found: dict[str, Any] = {}
    for name in _needed(method):
        lower = name.lower()
        if "batch" in lower or lower in ("b", "bsz", "rows"):
            found[name] = rows
        elif "dtype" in lower:
            found[name] = torch.float32
        elif "device" in lower:
            found[name] = torch.device("cpu")
        else:
            found[name] = 64
    return found


def _needed(method: Callable[..., Any]) -> list[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, one in inspect.signature(method).parameters.items()
        if one.default is inspect.Parameter.empty and one.kind not in kinds
    ]
