"""What a file says of its model, entry by entry: architecture, sizes, positions, scales, tokens.

llama.cpp computes what the entries say, so a wrong one damages a model whose weights are right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# The end of a key -> what it is called; in the order in which they are told.
_WORDS = {
    "general.architecture": "architecture",
    "block_count": "number of layers",
    "embedding_length": "hidden size",
    "feed_forward_length": "feed-forward size",
    "attention.head_count": "number of attention heads",
    "attention.head_count_kv": "number of key/value heads",
    "expert_count": "number of experts",
    "expert_used_count": "experts a token",
    "expert_feed_forward_length": "width of an expert",
    "expert_shared_feed_forward_length": "width of the shared expert",
    "ssm.conv_kernel": "length of Mamba's convolution",
    "ssm.inner_size": "channels of a Mamba layer",
    "ssm.state_size": "state of a Mamba channel",
    "ssm.time_step_rank": "time steps of a Mamba layer",
    "ssm.group_count": "groups of a Mamba layer",
    "rope.scaling.finetuned": "rotary positions",
    "attention.key_length": "head size",
    "attention.value_length": "head size of values",
    "vocab_size": "vocabulary size",
    "context_length": "context",
    "attention.layer_norm_rms_epsilon": "norm epsilon",
    "rope.freq_base": "RoPE base",
    "rope.freq_base_swa": "RoPE base of the layers with a window",
    "rope.dimension_count": "number of channels that RoPE turns",
    "rope.scaling.type": "RoPE scaling",
    "rope.scaling.factor": "RoPE scaling factor",
    "rope.scaling.original_context_length": "context before RoPE scaling",
    "rope.scaling.attn_factor": "attention factor of RoPE scaling",
    "attention.sliding_window": "sliding window",
    "attention.scale": "attention scale",
    "embedding_scale": "embedding scale",
    "residual_scale": "residual scale",
    "logit_scale": "logit scale",
    "final_logit_softcapping": "softcap of the logits",
    "tokenizer.ggml.model": "kind of tokenizer",
    "tokenizer.ggml.pre": "pre-tokenizer",
    "tokenizer.ggml.tokens": "tokens",
    "tokenizer.ggml.token_type": "types of the tokens",
    "tokenizer.ggml.scores": "scores of the tokens",
    "tokenizer.ggml.merges": "merges",
    "tokenizer.ggml.add_bos_token": "BOS",
    "tokenizer.ggml.add_eos_token": "EOS after a text",
    "tokenizer.ggml.add_space_prefix": "space before a text",
    "tokenizer.ggml.bos_token_id": "BOS",
    "tokenizer.ggml.eos_token_id": "EOS",
    "tokenizer.ggml.eot_token_id": "end-of-turn token",
    "tokenizer.ggml.eom_token_id": "end-of-message token",
    "tokenizer.ggml.unknown_token_id": "unknown token",
    "tokenizer.ggml.padding_token_id": "padding token",
    "tokenizer.chat_template": "chat template",
}
# Entries that llama.cpp does without: it takes this, or what the other entry says.
_DEFAULTS: dict[str, Any] = {
    "rope.freq_base": 10_000.0,
    "rope.freq_base_swa": 10_000.0,
    "rope.scaling.attn_factor": 1.0,
    "attention.sliding_window": 0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "rope.scaling.finetuned": True,
    "tokenizer.ggml.add_eos_token": False,
    "tokenizer.ggml.add_space_prefix": True,
}
_SAME_AS = {
    "attention.head_count_kv": "attention.head_count",
    "rope.dimension_count": "attention.key_length",
    "attention.value_length": "attention.key_length",
}
# Absent from the files of other programs, and found by llama.cpp itself; the stops are tried anyway.
_FOUND_OTHERWISE = frozenset(
    {
        *("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count"),
        *("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"),
        *("tokenizer.ggml.unknown_token_id", "tokenizer.ggml.padding_token_id"),
        *("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token"),
        *("tokenizer.ggml.scores", "tokenizer.ggml.token_type"),
    }
)
_ROUNDING = 1e-5  # of an entry of 32 bits
_SHOWN_CHARS = 40
_SHIFTS = (1, -1)
_BEGINNING_CHARS = 80  # of a template, where the one that writes BOS does it
_TOKENS, _MERGES, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.ggml.merges", "chat_template"


def wrong_entries(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    """Each entry that is not the model's, in words: what it is, and what it must be."""
    arch = expected["general.architecture"]
    ours = {key.removeprefix(f"{arch}."): value for key, value in expected.items()}
    theirs = {key.removeprefix(f"{arch}."): value for key, value in found.items()}
    if theirs.get("general.architecture") != arch:
        yield f"architecture {theirs.get('general.architecture')!r}, the model's is {arch!r}"
        return  # the other keys carry its name
    for end, words in _WORDS.items():
        if end not in theirs:
            yield from _missing(end, words, ours, theirs) if end in ours else ()
        elif _is_idle(end, ours):
            continue
        elif not _equal(theirs[end], ours.get(end, _absent(end, ours))):
            yield _different(end, words, ours, theirs)


def _is_idle(end: str, ours: Mapping[str, Any]) -> bool:
    """Whether nothing depends on an entry of this model, whatever the file says."""
    if end == "tokenizer.ggml.bos_token_id":
        used = "bos_token" in str(ours.get("tokenizer.chat_template"))
        return not used and not ours.get("tokenizer.ggml.add_bos_token")
    return end in _FOUND_OTHERWISE and end not in ours


def _absent(end: str, ours: Mapping[str, Any]) -> Any:
    """The value that an entry which the model does not need stands for."""
    neutral = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "logit_scale": 1.0}
    neutral |= dict.fromkeys(("expert_count", "expert_used_count"), 0)
    return (neutral | _DEFAULTS).get(end, ours.get(_SAME_AS.get(end, "")))


def _missing(
    end: str, words: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> Iterator[str]:
    default = theirs.get(_SAME_AS.get(end, ""), _DEFAULTS.get(end))
    if end in _FOUND_OTHERWISE or (default is not None and _equal(default, ours[end])):
        return
    taken = "" if default is None else f", and llama.cpp takes {default:g}"
    yield f"missing {words}: the file has none{taken}; the model has {_short(ours[end])} ({end})"


def _different(end: str, words: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    found, wanted = theirs[end], ours.get(end)
    if end in (_TOKENS, _MERGES) or isinstance(wanted, list):
        return _different_lists(words, found, wanted, shifts=end == _TOKENS)
    if end == "tokenizer.chat_template":
        return _different_templates(found, wanted)
    if end == "tokenizer.ggml.add_bos_token":
        return _different_bos(bool(found), theirs)
    tokens = ours.get(_TOKENS, [])
    if end.endswith("_token_id"):
        found, wanted = _token(found, tokens), _token(wanted, tokens)
        return f"wrong {words}: {found}, the model's is {wanted} ({end})"
    if wanted is None:
        return f"{words} {_short(found)}, and the model has none ({end})"
    if end in ("tokenizer.ggml.pre", "tokenizer.ggml.model"):
        return f"wrong {words}: {found!r}, the model's cuts text as {wanted!r} ({end})"
    return f"{words} {_short(found)}, the model has {_short(wanted)} ({end})"


def _different_lists(words: str, found: Any, wanted: Any, *, shifts: bool) -> str:
    if not isinstance(found, list) or not isinstance(wanted, list):
        return f"{words}: {_short(found)}, the model has {_short(wanted)}"
    differing = [i for i, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]]
    counts = f"{len(found):,} {words}, the model has {len(wanted):,}"
    if not differing:
        return counts
    at = differing[0]
    first = f"entry {at} is {_short(found[at])}, the model's {_short(wanted[at])}"
    for shift in _SHIFTS if shifts else ():
        moved = sum(a == b for a, b in zip(found[max(0, shift) :], wanted[max(0, -shift) :]))
        if moved > len(wanted) - len(differing):
            return f"vocabulary shifted by {abs(shift)}: {first}"
    if len(found) != len(wanted):
        return f"{counts}; {first}"
    return f"{words}: {len(differing):,} of {len(wanted):,} are others: {first}"


def _different_templates(found: Any, wanted: Any) -> str:
    if wanted is None:
        return "a chat template, and the model has none"
    same = next((i for i, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]), None)
    at = min(len(found), len(wanted)) if same is None else same
    start = max(0, at - _SHOWN_CHARS // 2)
    return (
        f"wrong chat template: from character {at} on it reads "
        f"{found[start : start + _SHOWN_CHARS]!r}, the model's {wanted[start : start + _SHOWN_CHARS]!r}"
    )


def _different_bos(adds: bool, theirs: Mapping[str, Any]) -> str:
    if not adds:
        return "no BOS: the model's texts begin with one, the file puts none (add_bos_token)"
    tokens, bos = theirs.get(_TOKENS, []), theirs.get("tokenizer.ggml.bos_token_id")
    text = tokens[bos] if isinstance(bos, int) and 0 <= bos < len(tokens) else None
    template = str(theirs.get("tokenizer.chat_template", ""))
    begins = template[:_BEGINNING_CHARS]
    if text and (text in begins or "bos_token" in begins):
        return (
            f"BOS twice: the file puts {text!r} before a text that begins with it (add_bos_token)"
        )
    return (
        f"a BOS too many: the file puts {text!r} before a text, the model does not (add_bos_token)"
    )


def _token(token: Any, tokens: list[str]) -> str:
    known = isinstance(token, int) and 0 <= token < len(tokens)
    return (
        "none" if token is None else f"token {token}" + (f" ({tokens[token]!r})" if known else "")
    )


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) or isinstance(wanted, float):
        numbers = isinstance(found, (int, float)) and isinstance(wanted, (int, float))
        return numbers and math.isclose(found, wanted, rel_tol=_ROUNDING, abs_tol=1e-12)
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        if any(isinstance(item, float) for item in [*found[:1], *wanted[:1]]):
            return all(_equal(a, b) for a, b in zip(found, wanted))
    return found == wanted


def _short(value: Any) -> str:
    """A value in a sentence; the number of a float as one would write it."""
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
