"""The table of `mule lab shapes`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.figures import in_bytes, short

if TYPE_CHECKING:
    from rich.console import Console

_DIMENSIONS = ("variant", "family", "blocks", "heads", "feed-forward", "off")
_FIGURES = (
    *("variant", "active", "without emb.", "total", "FLOPs/token", "KV/token", "state", "ceiling"),
)


def show_shapes(console: Console, result: dict[str, Any]) -> None:
    """Dimensions and figures of each variant; below, what they are of and what K-quants cannot hold."""
    width = sorted({row["hidden_size"] for row in result["rows"] if row["hidden_size"]})
    title = f"{result['quantity']}, width {' and '.join(map(str, width))}"
    render.print_table(console, title, _DIMENSIONS, [_dimensions(row) for row in result["rows"]])
    render.print_table(
        console, "\nWhat it takes", _FIGURES, [_figures(row) for row in result["rows"]]
    )
    rate = result["bandwidth_bytes_per_second"] / 1e9
    render.print_line(
        console,
        f"\n{result['vocab_size']:,} tokens in the vocabulary ({result['vocab_size_is']}), rows of "
        f"{result['max_seq_length']:,}. off: share by which the budget is missed. Bytes as in bf16; "
        f"states in fp32. ceiling: tokens/s of one text at {result['context']:,} tokens if memory "
        f"gives {rate:.1f} GB/s and nothing else takes time.",
    )
    for row in result["rows"]:
        for note in [*_beside(row), *row["k_quants"]]:
            render.print_line(console, f"{_name(row)}: {note}")


def _dimensions(row: dict[str, Any]) -> list[str]:
    if "module" in row:
        return [_name(row), row["module"], "-", "-", "-", f"{row['residual']:+.2%}"]
    return [
        _name(row),
        row["family"],
        _blocks(row),
        _heads(row),
        _feed_forward(row),
        f"{row['residual']:+.2%}",
    ]


def _figures(row: dict[str, Any]) -> list[str]:
    ceiling = row["decode_ceiling_tokens_per_second"]
    if "module" in row:
        counts = ("active_params", "active_params_without_embeddings", "total_params")
        return [_name(row), *(short(row[name]) for name in counts), *["not known"] * 4]
    return [
        _name(row),
        short(row["active_params"]),
        short(row["active_params_without_embeddings"]),
        short(row["total_params"]),
        short(row["flops_per_token"]),
        in_bytes(row["kv_bytes_per_token"]) if row["kv_bytes_per_token"] else "-",
        in_bytes(row["state_bytes"]) if row["state_bytes"] else "-",
        "-" if ceiling is None else short(ceiling),
    ]


def _name(row: dict[str, Any]) -> str:
    return f"{row['variant']} {row['size']}" if "size" in row else row["variant"]


def _blocks(row: dict[str, Any]) -> str:
    attending = row["attention_layers"]
    if attending in (0, row["num_layers"]):
        return str(row["num_layers"])
    return f"{row['num_layers']}, {attending} attend"


def _heads(row: dict[str, Any]) -> str:
    if not row["attention_layers"]:
        return f"{row['mamba']['num_heads']} x {row['mamba']['head_dim']} ({row['mamba']['kind']})"
    return f"{row['num_heads']}/{row['num_kv_heads']} x {row['head_dim']}"


def _feed_forward(row: dict[str, Any]) -> str:
    moe = row["moe"]
    if moe is None:
        return f"{row['intermediate_size']:,}"
    shared = moe["shared_intermediate_size"]
    told = f"{moe['experts_per_token']} of {moe['num_experts']} x {moe['intermediate_size']:,}"
    return f"{told} + {shared:,}" if shared else told


def _beside(row: dict[str, Any]) -> list[str]:
    zeros = row["null_layer_params"]
    if not zeros:
        return []
    return [f"its files hold {zeros:,} zeros more, an attention layer that other programs need"]
