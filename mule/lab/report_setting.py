"""The report's sections around the results: what was asked, how, the shapes, the limits."""

from __future__ import annotations

from typing import Any

from mule.config.search import searched_keys
from mule.lab.document import Block, Items, Section, Table, Text
from mule.lab.findings import Evidence
from mule.lab.records import Arm, Row
from mule.lab.techniques import ATTENTION, MIXERS, contrasts, own_module, traits_of
from mule.lab.wording import MISSING, counted, number, plus_minus, short
from mule.plan.starvation import FEWEST_UPDATES

_PLENTY = 20  # tokens a parameter: about where a dense model's compute is best spent
_SHOWN_SETTINGS = (
    ("train.precision", "precision"),
    ("optim.kind", "optimizer"),
    ("optim.learning_rate", "learning rate"),
    ("optim.schedule", "schedule"),
    ("optim.warmup_steps", "warm-up updates"),
    ("optim.weight_decay", "weight decay"),
    ("optim.max_grad_norm", "gradient clipping"),
    ("train.dropout", "dropout"),
)


def in_short(evidence: Evidence) -> Section:
    """The conclusion in words, drawn from the statistics alone."""
    found = evidence.found
    items = [*_winners(evidence), *(f"{row['told']}." for row in found["differences"])]
    judged = [row for row in found["differences"] if row["verdict"] != "not known"]
    if judged and all(row["verdict"] == "no measurable difference" for row in judged):
        items.append(
            "No technique makes a measurable difference here: with these seeds, at this size and "
            "length of training, the data does not tell the variants apart."
        )
    items += _speed_in_words(found)
    blocks: list[Block] = [Items(items)]
    blocks += [Text(f"{w[0].upper()}{w[1:]}.", "warning") for w in found["warnings"]]
    return Section("In short", blocks)


def question(evidence: Evidence) -> Section:
    """What the campaign set out to compare."""
    study, asked = evidence.study, evidence.study.asked
    planned = [f"{c.technique} ({c.first} → {c.second})" for c in contrasts(study)]
    budget = asked.get("budget") or {}
    equal = budget.get("mode", "active_params").replace("_", " ")
    amount = budget.get("active_params") or budget.get("flops_per_token")
    told = f"How do the variants {', '.join(evidence.found['variants'])} compare"
    if asked:
        sizes = ", ".join(str(size) for size in asked.get("sizes") or [])
        told += f" at equal {equal} ({sizes or amount or 'as given'})"
    told += (
        ", trained alike? Measured: the loss on a test set that was not looked at before the end, "
        "training and decoding speed, memory and stability."
    )
    blocks: list[Block] = [Text(told)]
    if planned:
        blocks.append(Text("The comparisons planned, one technique each:"))
        blocks.append(Items(planned))
    if text := asked.get("question") or asked.get("description"):
        blocks.append(Text(str(text), "note"))
    return Section("What was asked", blocks)


def setup(evidence: Evidence) -> Section:
    """What was the same for all, what differed, and on what machine."""
    study = evidence.study
    result = study.results[0].record
    settings = next((arm.settings for arm in study.arms if arm.settings), {})
    searched = searched_keys(study.asked.get("search") or {})
    rows = [["tokens of a run", _spread([r.record["tokens"] for r in study.results])]]
    rows.append(["updates of a run", _spread([r.record["steps"] for r in study.results])])
    rows.append(["tokens per update", _per_update(result)])
    rows.append(["sequence length", number(_setting(settings, "data.max_seq_length"))])
    rows.append(["seeds", ", ".join(str(seed) for seed in study.seeds)])
    rows += [["training data", _sources(evidence)], ["tokenizer", _tokenizer(evidence)]]
    rows.append(["test set", f"{number(result['test'].get('num_tokens'))} tokens"])
    rows.append(
        ["validation set", f"{number((result.get('valid') or {}).get('num_tokens'))} tokens"]
    )
    rows += [
        [called, "searched" if key in searched else _shown(settings, key)]
        for key, called in _SHOWN_SETTINGS
    ]
    rows += [["machine", _machine(evidence)], ["software", _software(evidence)]]
    told = (
        "Every variant saw the same tokens in the same order, with the same tokenizer, sequence "
        "length, tokens per update and optimizer; a seed sets the initial weights and the order of "
        "the data, and is the same seed in every variant, which makes the comparisons paired."
    )
    if searched:
        told += " What was searched for each variant apart is in the next section."
    if any(result.run is None for result in study.results):
        told += " Runs whose folder is missing could not be checked for that."
    if evidence.found["warnings"]:
        told += " What departs from this is in the warnings above."
    table = Table("The same for all variants.", ["setting", "value"], rows, words=(1,))
    return Section("Setup", [Text(told), table])


def shapes(evidence: Evidence) -> Section:
    """The variants' dimensions, sizes and residuals."""
    rows = [_shape_row(evidence, arm) for arm in evidence.study.arms]
    columns = ["variant", "made of", "layers", "width", "heads / kv", "feed-forward", "active"]
    columns += ["active, no embeddings", "total", "FLOPs/token", "residual"]
    caption = (
        "Parameters a token passes (active) and all of them (total). Residual: by how much the solved "
        "shape misses the budget."
    )
    blocks: list[Block] = [Table(caption, columns, rows, words=(1,))]
    notes = [note for arm in evidence.study.arms for note in _shape_notes(evidence, arm)]
    return Section("Shapes", [*blocks, Items(notes)] if notes else blocks)


def limits(evidence: Evidence) -> Section:
    """What this study cannot say."""
    study, found = evidence.study, evidence.found
    items = []
    ratios = [
        result.record["tokens"] / active
        for result in study.results
        if (active := result.record["shape"].get("active_params"))
    ]
    if ratios:
        few = " That is little: architectures may rank otherwise when trained longer."
        items.append(
            f"Each model saw {number(min(ratios), 2)} to {number(max(ratios), 2)} tokens per active "
            f"parameter; about {_PLENTY} is where a dense model's compute is best spent (Hoffmann et "
            f"al., 2022).{few if min(ratios) < _PLENTY else ''}"
        )
    else:
        items.append("Tokens per parameter are not known: the results lack active_params.")
    is_searched = bool(searched_keys(study.asked.get("search") or {}))
    others = "optimizer settings that were not searched" if is_searched else "optimizer settings"
    items.append(
        f"{counted(len(study.seeds), 'seed')} of initial weights and data order. Other data, "
        f"tokenizers and {others} are not varied, and no interval here speaks of them."
    )
    sizes = ", ".join(found["sizes"]) or short(study.arms[0].shape.get("active_params"))
    items.append(f"Sizes: {sizes} active parameters. What holds at one size need not at another.")
    steps = min(result.record["steps"] for result in study.results)
    starved = f", below {FEWEST_UPDATES:,}: step-starved" if steps < FEWEST_UPDATES else ""
    items.append(f"{steps:,} updates{starved}.")
    items.append(
        "The intervals assume that differences between seeds are normally distributed. Ranks are not "
        "tested: only the planned comparisons are, together, by Holm's method."
    )
    return Section("Limits of this study", [Items(items)])


def missing(evidence: Evidence) -> Section:
    """What the campaign was asked for and has not measured."""
    found = evidence.found["missing"]
    if not found:
        return Section("Missing", [Text("Nothing: all that was asked is here.")])
    told = "Not measured, or not in the folder; the rest of the report is without it."
    return Section("Missing", [Text(told), Items(found)])


# ---------------------------------------------------------------- in short


def _winners(evidence: Evidence) -> list[str]:
    items = []
    for size in evidence.study.sizes:
        ranked = [r for r in evidence.found["ranking"] if r["size"] == size and r["test"]["loss"]]
        if not ranked:
            items.append("No variant has a test loss yet.")
            continue
        best, at = ranked[0], f" at {size}" if size else ""
        loss = plus_minus(best["test"]["loss"], 4)
        told = f"The lowest mean test loss{at} is that of {best['arm']}: {loss} nats"
        others = [f"{r['arm']} {r['test']['loss']['mean']:.4f}" for r in ranked[1:]]
        items.append(f"{told}; then {', '.join(others)}." if others else f"{told}.")
    return items


def _speed_in_words(found: Row) -> list[str]:
    items = []
    speeds = [
        (r["tokens_per_second"]["mean"], r["arm"])
        for r in found["training"]
        if r["tokens_per_second"]
    ]
    if len(speeds) > 1:
        (fast, first), (slow, last) = max(speeds), min(speeds)
        items.append(
            f"Training is fastest with {first} ({fast:,.0f} tokens/s) and slowest with {last} "
            f"({slow:,.0f} tokens/s)."
        )
    gains = [
        (gain["context"], gain["gain"], one["arm"])
        for one in found["decoding"]
        for gain in one.get("gains", [])
        if gain["batch"] == min(g["batch"] for g in one["gains"])
    ]
    if gains:
        longest = max(context for context, _, _ in gains)
        told = [f"{gain:.1f}× ({arm})" for context, gain, arm in gains if context == longest]
        items.append(
            f"At a context of {longest:,} tokens a cache makes decoding faster by {', '.join(told)}."
        )
    return items


# ---------------------------------------------------------------- setup and shapes


def _setting(settings: Row, key: str) -> Any:
    section, name = key.split(".")
    return (settings.get(section) or {}).get(name)


def _shown(settings: Row, key: str) -> str:
    value = _setting(settings, key)
    return MISSING if value is None else str(value)


def _per_update(result: Row) -> str:
    return number(round(result["tokens"] / result["steps"])) if result["steps"] else MISSING


def _spread(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _sources(evidence: Evidence) -> str:
    for lineage in evidence.study.lineages.values():
        if sources := lineage.get("sources"):
            named = [f"{s.get('file')} ({short(s.get('bytes'))}B)" for s in sources[:6]]
            more = f", and {len(sources) - 6} more" if len(sources) > 6 else ""
            return ", ".join(named) + more
    return MISSING


def _tokenizer(evidence: Evidence) -> str:
    found = [t for lineage in evidence.study.lineages.values() if (t := lineage.get("tokenizer"))]
    return f"SHA-256 {found[0][:12]}…" if found else MISSING


def _machine(evidence: Evidence) -> str:
    told = dict.fromkeys(
        f"{m.get('cpu')}, {m.get('cores')} cores, {(m.get('memory_bytes') or 0) / 2**30:.0f} GiB, "
        f"{m.get('system')}"
        for lineage in evidence.study.lineages.values()
        if (m := lineage.get("machine"))
    )
    return "; ".join(told) or MISSING


def _software(evidence: Evidence) -> str:
    told = dict.fromkeys(
        f"Mule {lineage['mule']}, torch {lineage.get('torch')}"
        for lineage in evidence.study.lineages.values()
        if lineage.get("mule")
    )
    return "; ".join(told) or MISSING


def _shape_row(evidence: Evidence, arm: Arm) -> list[str]:
    found, shape = evidence.study.shapes.get(arm.file_stem, {}), arm.shape
    model = found or arm.settings.get("model") or {}
    heads = model.get("num_heads") if model.get("attention_layers", 1) else None
    return [
        arm.name,
        _made_of(evidence, arm),
        number(model.get("num_layers")),
        number(model.get("hidden_size")),
        f"{heads} / {model.get('num_kv_heads') or heads}" if heads else "–" if model else MISSING,
        _feed_forward(model),
        short(shape.get("active_params")),
        short(shape.get("active_params_without_embeddings")),
        short(shape.get("total_params")),
        short(shape.get("flops_per_token")),
        f"{found['residual']:+.2%}" if found.get("residual") is not None else MISSING,
    ]


def _shape_notes(evidence: Evidence, arm: Arm) -> list[str]:
    """What the table has no column for: a layer of zeros, and what K-quants cannot hold."""
    found, notes = evidence.study.shapes.get(arm.file_stem, {}), []
    if fallbacks := found.get("k_quants"):
        notes.append(
            f"{arm.name}: {len(fallbacks)} kinds of its weights do not fit Q4_K_M and take a larger "
            "type in a file; mule lab shapes says which, and what that costs"
        )
    if null := found.get("null_layer_params"):
        notes.append(
            f"{arm.name}: its files hold an attention layer of zeros beside the model, {short(null)} "
            "parameters, which the runtimes need and the table does not count"
        )
    return notes


def _made_of(evidence: Evidence, arm: Arm) -> str:
    if module := own_module(arm, evidence.study.asked):
        return f"a module of its own, {module}"
    traits = traits_of(arm, evidence.study.asked)
    if traits is None:
        return MISSING
    mixture = "" if traits.experts == "dense" else f"MoE ({traits.experts})"
    parts = (MIXERS.get(traits.mixer, traits.mixer), ATTENTION.get(traits.attention, ""), mixture)
    return ", ".join(part for part in parts if part)


def _feed_forward(model: Row) -> str:
    moe = model.get("moe") or {}
    if moe.get("num_experts"):
        chosen = f"{moe.get('experts_per_token') or MISSING} of {moe['num_experts']}"
        return f"{chosen} × {number(moe.get('intermediate_size'))}"
    return number(model.get("intermediate_size"))
