"""The page of `mule lab check`: the verdict, the figures, then what to change and in which line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_STYLES = {"fault": "bold red", "warning": "yellow", "note": "cyan"}
_TITLES = {"fault": "Change first", "warning": "Costs speed or a feature", "note": "Good to know"}
_WIDTH = 108
_LABEL = 12


def show_lab_check(console: Console, result: dict[str, Any]) -> None:
    """The whole page; plain text where the console is no terminal."""
    from rich.text import Text

    style = "bold green" if result["ok"] else "bold red"
    console.print(Text.assemble((result["verdict"], style), f"   {result['module']}"))
    console.print()
    for label, text in _figures(result["facts"]):
        console.print(Text(f"{label:<{_LABEL}}{text}"), soft_wrap=True)
    reached = [one["check"] for one in result["checks"] if one["outcome"] == "good"]
    missed = [one["check"] for one in result["checks"] if one["outcome"] == "not reached"]
    if reached:
        console.print(Text(f"{'good':<{_LABEL}}{', '.join(reached)}"), soft_wrap=True)
    if missed:
        console.print(Text(f"{'not reached':<{_LABEL}}{', '.join(missed)}"), soft_wrap=True)
    for level, title in _TITLES.items():
        found = [one for one in result["findings"] if one["level"] == level]
        if found:
            console.print()
            console.print(Text(title, style="bold"))
            for one in found:
                _print_finding(console, one)


def _print_finding(console: Console, one: dict[str, Any]) -> None:
    from rich.text import Text

    place = f"{one['place']}  " if one["place"] else ""
    first, *more = textwrap.wrap(place + one["found"], _WIDTH) or [""]
    console.print(Text.assemble(("  - ", _STYLES[one["level"]]), first), soft_wrap=True)
    for line in [*more, *textwrap.wrap(f"-> {one['change']}", _WIDTH, subsequent_indent="   ")]:
        console.print(Text(f"    {line}"), soft_wrap=True)


def _figures(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The lines of what is known; a check that was not reached has none."""
    if "gives" in facts:
        yield "forward", f"({facts['called_with']}) gives {facts['gives']}"
    if "ran_at" in facts:
        yield "shapes", facts["ran_at"] or "none"
    if "total_params" in facts:
        yield "parameters", _parameters(facts)
    if facts.get("moe"):
        yield (
            "experts",
            f"{facts['experts']} in {facts['moe_layers']} layers, {facts['experts_per_token']:g} a "
            f"token (found by gradients at {facts['experts_at']}); router {facts['router']}",
        )
    if "causal" in facts:
        proven = f"proven by {facts['proven_by']}" if facts["causal"] else "NO"
        yield "causal", proven
    if "attention" in facts:
        heads = facts.get("num_heads")
        told = f" ({heads} heads, {facts['num_kv_heads']} of keys)" if heads else ""
        yield "attention", facts["attention"] + told
    if "cache" in facts:
        yield "cache", _cache(facts)
    if "first_loss" in facts:
        yield "training", f"loss {facts['first_loss']:.3f} -> {facts['last_loss']:.3f} on one batch"
    if "graphs" in facts:
        yield (
            "compile",
            f"graphs {facts['graphs']}, breaks {facts['graph_breaks']}, recompiles "
            f"{facts['recompiles_same_shape']} at one shape, {facts['recompiles_other_shapes']} at "
            "others",
        )


def _parameters(facts: dict[str, Any]) -> str:
    tied = "embedding and head tied" if facts["tied_embeddings"] else "not tied"
    return (
        f"{facts['active_params']:,} active of {facts['total_params']:,} ({tied}); without "
        f"embeddings {facts['active_params_without_embeddings']:,} of "
        f"{facts['total_params_without_embeddings']:,}"
    )


def _cache(facts: dict[str, Any]) -> str:
    if not facts["cache"]:
        return "none"
    if "cached_equals_uncached" not in facts:
        return f"{facts['cache_arguments']}; not tried"
    equal = "equal to" if facts["cached_equals_uncached"] else "DIFFERENT from"
    return (
        f"{facts['cache_arguments']}; cached logits {equal} uncached ones "
        f"(greatest difference {facts['cache_max_error']:.1e})"
    )
