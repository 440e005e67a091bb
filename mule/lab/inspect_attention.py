"""Grouped-query attention in a user's module: read from the shapes of its projections."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from mule.lab.inspect_subject import Outcome, Subject

_QUERY = re.compile(r"(^|\.)(q_proj|wq|w_q|query|to_q|q|q_linear|W_query)$")
_KEY = re.compile(r"(^|\.)(k_proj|wk|w_k|key|to_k|k|k_linear|W_key)$")
_FUSED = re.compile(r"(^|\.)(qkv_proj|c_attn|qkv|wqkv|Wqkv|query_key_value|in_proj|attn)$")
_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "nhead", "heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "n_query_groups")
KV_HEADS += ("kv_heads", "num_kv_groups")
_SHARE = (
    "project fewer key and value heads and let query heads share them: "
    "scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)"
)


def check_attention(subject: Subject) -> Outcome:
    """Query and key heads, and whether there may be fewer of the latter."""
    outcome = Outcome()
    rows = _projection_rows(subject.model)
    if rows is None:
        outcome.facts["attention"] = "no projections of queries and keys were recognised"
        return outcome
    query, key, name = rows
    heads, kv_heads = _number(subject, _HEADS), _number(subject, KV_HEADS)
    setting = next((one for one in KV_HEADS if one in subject.settings), None)
    outcome.facts |= {
        "attention": _kind(query, key),
        "query_rows": query,
        "key_rows": key,
        "num_heads": heads,
        "num_kv_heads": round(heads * key / query) if heads else kv_heads,
        "found_in": name,
    }
    if key < query:
        return outcome
    if kv_heads is not None or setting:
        outcome.add(
            "note",
            "MHA: as many key as query heads; the module has a setting for fewer",
            f"for GQA set {setting or _named(subject, KV_HEADS)}=... below the number of heads",
        )
    else:
        outcome.add("note", f"MHA: {name} gives as many key as query rows ({key})", _SHARE)
    return outcome


def _kind(query: int, key: int) -> str:
    return "MHA" if key == query else f"GQA, {query / key:g} query heads to a key head"


def _projection_rows(model: nn.Module) -> tuple[int, int, str] | None:
    """(rows of queries, of keys, which layer) of the first attention found."""
    linear = {
        name: one.out_features for name, one in model.named_modules() if isinstance(one, nn.Linear)
    }
    for name, query in linear.items():
        if not _QUERY.search(name):
            continue
        stem = name.rpartition(".")[0]
        for other, key in linear.items():
            if other.rpartition(".")[0] == stem and _KEY.search(other):
                return query, key, f"{name} and {other.rpartition('.')[2]}"
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim, module.kdim or module.embed_dim, name
        if isinstance(module, nn.Linear) and _FUSED.search(name):
            extra = module.out_features - module.in_features
            if extra > 0 and extra % 2 == 0 and extra // 2 <= module.in_features:
                return module.in_features, extra // 2, name
    return None


def _number(subject: Subject, names: tuple[str, ...]) -> int | None:
    """A number that the settings, a module or a config in it has under one of these names."""
    places: list[Any] = [subject.settings]
    for module in subject.model.modules():
        places += [vars(module), *(_fields(one) for one in vars(module).values())]
    for place in places:
        for name in names:
            if isinstance(value := place.get(name), int):
                return value
    return None


def _fields(one: Any) -> dict[str, Any]:
    return getattr(one, "__dict__", {}) if type(one).__module__ not in ("builtins", "torch") else {}


def _named(subject: Subject, names: tuple[str, ...]) -> str:
    for module in subject.model.modules():
        for place in (vars(module), *(_fields(one) for one in vars(module).values())):
            for name in names:
                if name in place:
                    return name
    return names[0]
