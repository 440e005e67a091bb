"""mule lab shapes: the models of a campaign, or of a budget on the command line, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import machine
from mule.config.lab import BudgetSection, VariantSection
from mule.errors import ModelError, UserError
from mule.models import cost
from mule.models.solve import Solved, solve_all
from mule.plan.shape import embedding_rows

if TYPE_CHECKING:
    from mule.config.campaign import Campaign

_USUAL: dict[str, VariantSection] = {
    "mha": VariantSection(),
    "gqa": VariantSection(attention="gqa"),
    "gqa-heads": VariantSection(attention="gqa", spend="heads"),
    "mqa": VariantSection(attention="mqa"),
    "moe": VariantSection(attention="gqa", num_experts=8),
    "mamba2": VariantSection(mixer="mamba2"),
    "hybrid": VariantSection(mixer="hybrid", attention="gqa"),
}
_KQUANT = "q4_k_m"


def run(
    campaign: Path | None,
    words: list[str],
    *,
    active: str | None = None,
    vocab_size: int | None = None,
    context: int | None = None,
    bandwidth: float | None = None,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """A row for each variant in each size; `bandwidth` in bytes a second, measured where None.

    Without a campaign the usual variants are shown at `active` parameters; `words` are settings of the
    campaign, or of the budget: counted=without_embeddings. `modules` are files that may be run, of
    variants that are modules of the user's.
    """
    _check_given(campaign, active, modules)
    own: list[dict[str, Any]] = []
    if campaign is None:
        assert active is not None
        budgets = {"": _budget(active, words)}
        variants, length = _USUAL, context or 1024
        rows, known = vocab_size or 50_304, "GPT-2's, rounded up" if vocab_size is None else "given"
    else:
        loaded = _loaded(campaign, words)
        variants, length = loaded.plan.variants, loaded.shared.data.max_seq_length
        budgets = _sizes(loaded)
        rows, known = (vocab_size, "given") if vocab_size else _vocab_rows(loaded)
        own = _own_rows(loaded, modules, ["mule", "lab", "shapes", str(campaign), *words], rows)
    rate = bandwidth or machine.read_bandwidth()
    table = [
        row | ({"size": size} if size else {})
        for size, budget in budgets.items()
        for row in shape_rows(
            variants,
            budget,
            vocab_size=rows,
            max_seq_length=length,
            context=context or length,
            bandwidth=rate,
        )
    ]
    if own:
        table = sorted([*table, *own], key=lambda row: list(variants).index(row["variant"]))
    return {
        "rows": table,
        "vocab_size": rows,
        "vocab_size_is": known,
        "max_seq_length": length,
        "context": context or length,
        "bandwidth_bytes_per_second": rate,
        "quantity": table[0]["quantity"],
        "targets": sorted({row["target"] for row in table}),
    }


def _check_given(campaign: Path | None, active: str | None, modules: Sequence[str]) -> None:
    if (campaign is None) == (active is None):
        raise UserError(
            "mule lab shapes takes either a campaign file or --active",
            "as in: mule lab shapes campaign.yaml, or: mule lab shapes --active 125m",
        )
    if modules and campaign is None:
        raise UserError(
            "--module goes with a campaign, whose variants name the file",
            f"as in: mule lab shapes campaign.yaml --module {modules[0]}",
        )


def shape_rows(
    variants: Mapping[str, VariantSection],
    budget: BudgetSection,
    *,
    vocab_size: int,
    max_seq_length: int,
    context: int,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each variant of one budget."""
    own = {name: variant for name, variant in variants.items() if variant.module is None}
    solved = solve_all(budget, own, vocab_size=vocab_size, max_seq_length=max_seq_length)
    return [
        shape_row(name, own[name], solved[name], context=context, bandwidth=bandwidth)
        for name in own
    ]


def shape_row(
    name: str,
    variant: VariantSection,
    solved: Solved,
    *,
    context: int,
    bandwidth: float | None = None,
) -> dict[str, Any]:
    """What is known of a variant's model before it is trained; bytes as in bf16, states in fp32."""
    c = solved.config
    embeddings = cost.embedding_params(c)
    ceiling = None if bandwidth is None else cost.decode_ceiling(c, context, bandwidth)
    return {
        "variant": name,
        **_dimensions(solved),
        "routing": variant.routing(),
        "active_params": cost.active_params(c),
        "active_params_without_embeddings": cost.active_params(c) - embeddings,
        "total_params": cost.total_params(c),
        "total_params_without_embeddings": cost.total_params(c) - embeddings,
        "flops_per_token": cost.train_flops_per_token(c, c.max_position_embeddings),
        "kv_bytes_per_token": cost.kv_bytes_per_token(c),
        "state_bytes": cost.state_bytes(c),
        "context": context,
        "cache_bytes": cost.cache_bytes(c, context),
        "decode_bytes_per_token": cost.decode_bytes_per_token(c, context),
        "decode_ceiling_tokens_per_second": ceiling,
        "null_layer_params": _null_params(solved),
        "quantity": solved.quantity,
        "target": solved.target,
        "found": solved.found,
        "residual": solved.residual,
        "k_quants": _k_quants(solved),
    }


def _dimensions(solved: Solved) -> dict[str, Any]:
    c = solved.config
    names = ("family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    return {
        **{name: getattr(c, name) for name in names},
        "intermediate_size": c.intermediate_size,
        "attention_layers": len(c.attention_layers),
        "sliding_window": c.sliding_window,
        "moe": None if c.moe is None else asdict(c.moe),
        "mamba": None if c.mamba is None else asdict(c.mamba),
    }


def _null_params(solved: Solved) -> int:
    """Zeros that the files hold beside the model: of the null attention layer."""
    from mule.models.stored import null_params

    return null_params(solved.config)


def _k_quants(solved: Solved) -> list[str]:
    from mule.export.fallbacks import fallbacks

    try:
        found = fallbacks(solved.config, _KQUANT)
    except ModelError as error:
        reason = error.message.rpartition("config.json: ")[2]
        return [f"no GGUF file can hold it: {reason}"]
    return [fallback.in_words(_KQUANT.upper()) for fallback in found]


def _budget(active: str, words: list[str]) -> BudgetSection:
    """The budget of the command line."""
    from mule.config.section_check import Places, checked

    values: dict[str, Any] = {"active_params": int(active) if active.isdecimal() else active}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"{word} is no setting", "settings are key=value, as num_layers=12")
        values[key.removeprefix("budget.")] = int(value) if value.isdecimal() else _typed(value)
    budget, problems = checked(BudgetSection, values, Places("command line", None, {}))
    if budget is None:
        raise UserError("\n".join(problems), "docs/lab.md describes the budget")
    return budget


def _typed(value: str) -> str | float | bool:
    if value in ("true", "false"):
        return value == "true"
    try:
        return float(value)
    except ValueError:
        return value


def _own_rows(
    campaign: Campaign, modules: Sequence[str], command: list[str], vocab_rows: int
) -> list[dict[str, Any]]:
    """Of the variants that are modules of the user's, whose files are run in a process of their own."""
    from mule.lab.own_module import check_named, own_modules

    named = [word for module in modules for word in ("--module", module)]
    check_named(campaign, modules, [*command, *named])
    own = own_modules(campaign, vocab_rows=vocab_rows, known={}, runs=Path())
    length = campaign.shared.data.max_seq_length
    return [module.row(name, campaign.plan.budget, length) for name, module in own.items()]


def _loaded(campaign: Path, words: list[str]) -> Campaign:
    from mule.config.campaign import load_campaign

    return load_campaign(campaign, words)


def _sizes(campaign: Campaign) -> dict[str, BudgetSection]:
    budget = campaign.plan.budget
    return {str(size): budget.of_size(size) for size in campaign.plan.sizes} or {"": budget}


def _vocab_rows(campaign: Campaign) -> tuple[int, str]:
    """Rows of the embedding, and where that is known from."""
    section = campaign.shared.tokenizer
    if section.path is not None:
        from mule.tokenizer import Tokenizer

        size, source = Tokenizer.load(section.path).vocab_size, f"of {section.path}"
    else:
        size, source = section.vocab_size or 0, "of tokenizer.vocab_size"
    if not size:
        raise UserError(
            "the campaign has no tokenizer: neither tokenizer.path nor tokenizer.vocab_size",
            "set one of them, or give --vocab-size",
        )
    return embedding_rows(size), source
