"""What times of decoding come to: rates, the limits that memory sets, and the gain of a cache."""

from __future__ import annotations

import statistics
from typing import Any

from mule.lab.decode_ways import Way
from mule.models import cost
from mule.models.decoder import Decoder


def step_figures(repetitions: list[list[float]], batch: int) -> dict[str, Any]:
    """Median time of a token, and tokens a second by that: mean and deviation over repetitions."""
    medians = [statistics.median(seconds) for seconds in repetitions]
    rates = [batch / median for median in medians]
    return {
        "repetitions": len(repetitions),
        "tpot_s": statistics.median(medians),
        "decode_tokens_per_second": statistics.mean(rates),
        "decode_std": statistics.stdev(rates) if len(rates) > 1 else 0.0,
    }


def step_weight_bytes(model: Decoder, num_rows: int) -> float:
    """Bytes of weights that one decoding step of so many rows reads.

    Of an untied embedding only rows are looked up. Of E experts, k a token, those that any row
    chooses: at even routing the share 1 - (1 - k / E) ** rows.
    """
    config, total = model.config, 0.0
    for name, weight in model.named_parameters():
        if name == "model.embed_tokens.weight" and not config.tie_embeddings:
            continue
        share = 1.0
        if config.moe is not None and ".experts." in name:
            share -= (1 - config.moe.experts_per_token / config.moe.num_experts) ** num_rows
        total += share * weight.nbytes
    return total


def step_limits(
    model: Decoder, bandwidth: float, row: dict[str, Any], *, cached: bool
) -> dict[str, Any]:
    """What memory allows a row at most, and how much of its bandwidth a step uses."""
    batch, size = row["batch"], model.lm_head.weight.element_size()
    read = step_weight_bytes(model, batch)
    if cached:  # states are read and written
        read += batch * cost.cache_bytes(model.config, row["context"], size)
        read += batch * cost.state_bytes(model.config, size)
    return {
        "step_bytes": round(read),
        "share_of_bandwidth": read / row["tpot_s"] / bandwidth,
        "ceiling_tokens_per_second": batch * bandwidth / read,
    }


def cache_figures(model: Decoder, way: Way, batch: int) -> dict[str, int]:
    """What the cache takes in memory, and what the formula says."""
    config, size = model.config, model.lm_head.weight.element_size()
    if way.rolls:
        row_bytes = cost.cache_bytes(config, way.cache_tokens, size)
    else:
        row_bytes = way.cache_tokens * cost.kv_bytes_per_token(config, size)
    return {
        "cache_tokens": way.cache_tokens,
        "cache_bytes": way.cache_bytes,
        "cache_formula_bytes": batch * row_bytes,
    }


def card(model: Decoder) -> dict[str, Any]:
    """The model in figures that do not depend on the machine."""
    config, size = model.config, model.lm_head.weight.element_size()
    return {
        "family": config.family,
        "params": cost.total_params(config),
        "weight_bytes": sum(weight.nbytes for weight in model.parameters()),
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "kv_bytes_per_token": cost.kv_bytes_per_token(config, size),
        "state_bytes": cost.state_bytes(config, size),
    }


def gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How many times faster the cache is, and what memory and the measured forward pass predict.

    Without a cache a token takes the forward pass of its text, at the prefill's rate. With one it
    takes the longer of what memory needs to give weights and cache once, and of the arithmetic.
    """
    found = []
    for row in (row for row in rows if row["cached"]):
        place = {key: row[key] for key in ("batch", "context")}
        other = [r for r in rows if not r["cached"] and place.items() <= r.items()]
        if not other:
            continue
        rate, batch = row["prefill_tokens_per_second"], row["batch"]
        step_s = max(batch / row["ceiling_tokens_per_second"], batch / rate)
        measured = other[0]["tpot_s"] / row["tpot_s"]
        predicted = batch * (row["context"] - 1) / rate / step_s
        found.append(
            place | {"gain": measured, "predicted": predicted, "share": measured / predicted}
        )
    return found
