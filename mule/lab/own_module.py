"""A campaign's variant that is a module of the user's: whether its file may be run, and what it has.

The file runs in processes of its own only: here in one that examines it, later in those of its runs
(mule/lab/own_model.py). No torch here.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.campaign import Campaign
from mule.config.lab import BudgetSection, VariantSection, amount
from mule.errors import UserError
from mule.lab.inspect import examine
from mule.lab.inspect_source import named_class
from mule.models.solve import counted, tolerance

_CHECKS = ("forward", "shapes", "parameters", "causality")  # without which a comparison is not one
_LIMIT_S = 600.0
_SIZES = re.compile(r"layer|depth|block|emb|d_model|hidden|dim|width|ff|mlp|inter")
_NO_SIZES = re.compile(r"block_size|seq|len|ctx|context|position|vocab|head|drop|bias|tie|norm")
_OF_DOCUMENTS = re.compile(r"seg|doc|mask|cu_seqlens")  # arguments that may tell documents apart


@dataclass(frozen=True)
class OwnModule:
    """A module that fits its campaign: as campaign.json and the processes of its runs have it."""

    file: str  # as the campaign names it
    name: str
    settings: dict[str, Any]  # what its class is given, with what was filled in
    files: dict[str, str]  # SHA-256 of the file and of what it imports from beside it, by path
    takes: list[str]  # the names of all settings
    arguments: list[str]  # of its forward, beside the ids
    keywords: dict[str, Any]  # how forward is called beside the ids
    sizes: dict[str, int]
    vocab_size: int  # of the logits
    max_seq_length: int
    key: str  # of what was asked

    @property
    def told(self) -> str:
        return f"{self.file}:{self.name}"

    @property
    def active_params(self) -> int:
        return self.sizes["active_params"]

    def found(self, budget: BudgetSection) -> int:
        """What the budget counts, of this module."""
        without = budget.counted == "without_embeddings"
        return self.sizes["active_params" + ("_without_embeddings" if without else "")]

    def residual(self, budget: BudgetSection) -> float:
        """The share by which the budget is missed; negative: below it."""
        return self.found(budget) / _target(budget) - 1

    def recipe_values(self) -> dict[str, Any]:
        """The settings of its runs, by dotted key; the last two act inside Mule's own blocks."""
        words = [f"{name}={value!r}" for name, value in self.settings.items()]
        values: dict[str, Any] = {"model.module": self.told, "model.module_args": words}
        return values | {"train.sharding": "none", "train.activation_checkpointing": "none"}

    def row(self, variant: str, budget: BudgetSection, context: int) -> dict[str, Any]:
        """Its row of `mule lab shapes`; None is what nobody knows of a module."""
        unknown = ("family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        unknown += ("intermediate_size", "attention_layers", "sliding_window", "moe", "mamba")
        unknown += ("flops_per_token", "kv_bytes_per_token", "state_bytes", "cache_bytes")
        unknown += ("decode_bytes_per_token", "decode_ceiling_tokens_per_second")
        return {
            "variant": variant,
            "module": self.told,
            "module_args": self.settings,
            **dict.fromkeys(unknown),
            **self.sizes,
            "routing": {},
            "context": context,
            "null_layer_params": 0,
            "quantity": counted(budget),
            "target": _target(budget),
            "found": self.found(budget),
            "residual": self.residual(budget),
            "k_quants": [],
        }

    def across_documents(self, setting: str) -> str:
        """What to say where `setting` keeps the documents of a row apart: it is not told of them."""
        told = (
            f"{self.told} sees across the documents of a row, and Mule's own variants do not: no module "
            f"is told where they begin; {setting}=false makes them equal"
        )
        if maybe := [name for name in self.arguments if _OF_DOCUMENTS.search(name)]:
            told += f" (its forward takes {maybe[0]}; what it means there Mule does not guess)"
        return told


def check_named(campaign: Campaign, named: Sequence[str], command: Sequence[str]) -> None:
    """UserError where a file that would be run was not named on the command line, with `command`.

    A campaign may come from somebody else: it alone must not run code.
    """
    files = {name: _file_of(name, variant)[0] for name, variant in _variants(campaign).items()}
    wanted = {file.resolve(): name for name, file in files.items()}
    given = {Path(one).resolve() for one in named}
    if strange := [one for one in named if Path(one).resolve() not in wanted]:
        raise UserError(
            f"--module {strange[0]}: no variant of the campaign is a module of this file",
            f"name one of {', '.join(map(str, files.values()))}" if files else "leave it away",
        )
    missing = {file: name for file, name in wanted.items() if file not in given}
    if missing:
        name = next(iter(missing.values()))
        words = [word for lost in missing.values() for word in ("--module", str(files[lost]))]
        raise UserError(
            f"variants.{name}.module: {files[name]} would be run, and a campaign may come from "
            "somebody else, so you have to name the file too",
            f"look into it, then: {shlex.join([*command, *words])}",
        )


def own_modules(
    campaign: Campaign, *, vocab_rows: int, known: Mapping[str, Any], runs: Path
) -> dict[str, OwnModule]:
    """The campaign's modules by variant, examined, or as `known` from an earlier start.

    Raises UserError where one cannot be compared: it fails, is of another size, or has changed.
    """
    variants = _variants(campaign)
    if not variants:
        return {}
    _refuse_settings(campaign, next(iter(variants)))
    fits = {"vocab_size": vocab_rows, "max_seq_length": campaign.shared.data.max_seq_length}
    found = {}
    for name, variant in variants.items():
        key = fsio.sha256_json([variant.module, variant.module_args, fits])
        module = _known(name, key, known, runs) or _examined(name, variant, fits, key)
        _check_size(name, module, campaign.plan.budget)
        found[name] = module
    return found


def _variants(campaign: Campaign) -> dict[str, VariantSection]:
    return {
        n: variant for n, variant in campaign.plan.variants.items() if variant.module is not None
    }


def _file_of(name: str, variant: VariantSection) -> tuple[Path, str]:
    """The file and the class that a variant names."""
    assert variant.module is not None
    try:
        return named_class(variant.module, before="module: ")
    except UserError as error:
        raise UserError(f"variants.{name}.module: {error.message}", error.hint) from None


def _refuse_settings(campaign: Campaign, name: str) -> None:
    """UserError for a setting that acts inside Mule's own models."""
    plan, train, optim = campaign.plan, campaign.shared.train, campaign.shared.optim
    inside = "acts inside Mule's own blocks, and a module brings its own"
    refused = (
        (
            plan.budget.mode == "flops_per_token",
            "what a token costs in it is not known, and budget.mode is flops_per_token",
            "set budget.mode=active_params, or take the variant out",
        ),
        (
            bool(plan.sizes),
            "its arguments make one size, and the campaign has several",
            "take sizes out, or the variant",
        ),
        (
            len(_variants(campaign)) == len(plan.variants),
            "no variant is one of Mule's own, by which what all runs share is decided",
            "add one beside it, such as mha: {attention: mha}",
        ),
        (
            train.dropout > 0,
            f"train.dropout={train.dropout:g} {inside}",
            "remove train.dropout; a module's own dropout is one of its module_args",
        ),
        (
            train.activation_checkpointing in ("selective", "full"),
            f"train.activation_checkpointing={train.activation_checkpointing} {inside}",
            "remove it; in a module torch.utils.checkpoint does it",
        ),
        (
            train.sharding in ("full", "hybrid"),
            f"train.sharding={train.sharding} {inside}",
            "remove it, or set train.sharding=none",
        ),
        (train.precision == "fp8", f"train.precision=fp8 {inside}", "set train.precision=bf16"),
        (optim.kind == "muon", f"optim.kind=muon {inside}", "set optim.kind=adamw"),
    )
    for is_so, why, change in refused:
        if is_so:
            raise UserError(f"variants.{name}.module: {why}", change)


# ---------------------------------------------------------------- examined


def _known(name: str, key: str, known: Mapping[str, Any], runs: Path) -> OwnModule | None:
    """As an earlier start examined it; None where it was not, or nothing was trained since."""
    before = OwnModule(**known[name]) if name in known else None
    if before is None or before.key != key:
        return None
    folder = Path(before.file).resolve().parent
    changed = [
        file
        for file, digest in before.files.items()
        if not (folder / file).is_file() or fsio.sha256_file(folder / file) != digest
    ]
    if not changed:
        return before
    own = re.compile(rf"{re.escape(name)}-s\d+|search-{re.escape(name)}-(try|lr)\d.*")
    made = sorted(run for run in runs.glob("*") if own.fullmatch(run.name))
    if made:
        raise UserError(
            f"variants.{name}: {', '.join(changed)} changed since {made[0]} was begun",
            "bring the old one back, or begin another campaign with the new one: name=ANOTHER",
        )
    return None


def _examined(name: str, variant: VariantSection, fits: dict[str, int], key: str) -> OwnModule:
    """What a process that runs the file finds."""
    file, class_name = _file_of(name, variant)
    typed = variant.module_args or {}
    found = examine(file, class_name, typed, limit_s=_LIMIT_S, checks=_CHECKS, fits=fits)
    if faults := [one for one in found["findings"] if one["level"] == "fault"]:
        raise _refusal(name, variant, faults[0])
    facts = found["facts"]
    embeddings = facts["total_params"] - facts["total_params_without_embeddings"]
    head = 0 if facts["tied_embeddings"] else facts["head_params"]
    sizes = {
        "active_params": facts["active_params"],
        "active_params_without_embeddings": facts["active_params"] - embeddings - head,
        "total_params": facts["total_params"],
        "total_params_without_embeddings": facts["total_params"] - embeddings - head,
    }
    return OwnModule(
        file=str(file),
        name=class_name,
        **{part: facts[part] for part in ("settings", "files", "takes", "arguments", "keywords")},
        sizes=sizes,
        vocab_size=facts["vocab_size"],
        max_seq_length=fits["max_seq_length"],
        key=key,
    )


def _refusal(name: str, variant: VariantSection, fault: dict[str, Any]) -> UserError:
    place = f"{fault['place']}: " if fault["place"] else ""
    change = fault["change"]
    if " cannot be built without " in fault["found"]:
        entries = ", ".join(word.replace("=", ": ", 1) for word in change.split())
        change = f"give them, for example: module_args: {{{entries}}}"
    words = [f"{key}={value}" for key, value in (variant.module_args or {}).items()]
    command = shlex.join(["mule", "lab", "check", str(variant.module), *words])
    return UserError(
        f"variants.{name}.module: {variant.module}: {place}{fault['found']}",
        f"{change}; all that there is to say of it: {command}",
    )


def _target(budget: BudgetSection) -> float:
    assert budget.active_params is not None
    return float(amount(budget.active_params))


def _check_size(name: str, module: OwnModule, budget: BudgetSection) -> None:
    target, off = _target(budget), module.residual(budget)
    is_dense = module.sizes["active_params"] == module.sizes["total_params"]
    allowed = tolerance(budget, target, is_dense=is_dense)
    if abs(off) <= allowed:
        return
    sizes = [one for one in module.takes if _SIZES.search(one) and not _NO_SIZES.search(one)]
    which = " or ".join(sizes) or "what makes its size"
    enough = math.ceil(abs(off) * 1000) / 1000
    raise UserError(
        f"variants.{name}: {module.told} has {module.found(budget):,} {counted(budget)}, "
        f"{abs(off):.1%} {'above' if off > 0 else 'below'} the budget of {target:,.0f}; "
        f"{allowed:.1%} are allowed",
        f"{'lower' if off > 0 else 'raise'} {which} in variants.{name}.module_args"
        + (f", or allow more: budget.tolerance={enough:g}" if enough < 0.5 else ""),
    )
