"""Which variants of a campaign differ by one technique: the comparisons that were planned."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mule.lab.records import Arm, Study

ATTENTION = {"mha": "MHA", "gqa": "GQA", "mqa": "MQA"}
MIXERS = {"attention": "attention", "mamba1": "Mamba-1", "mamba2": "Mamba-2", "hybrid": "hybrid"}


@dataclass(frozen=True)
class Traits:
    """What a variant is made of; `attention` is empty where no block attends."""

    mixer: str  # attention, mamba1, mamba2 or hybrid
    attention: str  # mha, gqa, mqa
    experts: str  # dense, dropless, capacity


@dataclass(frozen=True)
class Contrast:
    """Two arms of one size, and the technique that the second has and the first has not."""

    technique: str
    first: str
    second: str


def contrasts(study: Study) -> list[Contrast]:
    """One for every arm but the baseline: against the arm that it differs from by one technique.

    An arm without such a neighbour is compared with the baseline.
    """
    found = []
    for size in study.sizes:
        arms = [arm for arm in study.arms if arm.size == size]
        base = study.baseline_of(size) or arms[0]
        traits = {arm.name: traits_of(arm, study.asked) for arm in arms}
        for arm in arms:
            if arm is not base:
                found.append(_contrast(arm, base, arms, traits))
    if len(study.sizes) > 1:
        return [replace(c, technique=f"{c.technique}, {study.arm(c.second).size}") for c in found]
    return found


def traits_of(arm: Arm, asked: dict[str, Any]) -> Traits | None:
    """From campaign.yaml, else from the settings of its run; None when neither tells, and of a module
    of the user's."""
    variants = asked.get("variants")
    if own_module(arm, asked) is not None:
        return None
    if isinstance(variants, dict) and arm.variant in variants:
        return _asked_traits(variants[arm.variant] or {})
    model = arm.settings.get("model")
    return _trained_traits(model) if isinstance(model, dict) else None


def own_module(arm: Arm, asked: dict[str, Any]) -> str | None:
    """FILE.py:Class of a variant that is a module of the user's; None of others."""
    variants = asked.get("variants")
    of_variant = variants.get(arm.variant) if isinstance(variants, dict) else None
    told = of_variant if isinstance(of_variant, dict) else arm.settings.get("model")
    return told.get("module") if isinstance(told, dict) else None


def _asked_traits(variant: dict[str, Any]) -> Traits:
    mixer = variant.get("mixer", "attention")
    attends = mixer in ("attention", "hybrid") or variant.get("attention_every") is not None
    if mixer == "mamba1" and attends:
        mixer = "hybrid"
    capacity = "capacity" if variant.get("capacity_factor") is not None else "dropless"
    experts = capacity if variant.get("num_experts") is not None else "dense"
    return Traits(mixer, variant.get("attention", "mha") if attends else "", experts)


def _trained_traits(model: dict[str, Any]) -> Traits:
    mamba, moe = model.get("mamba") or {}, model.get("moe") or {}
    kinds = {"jamba": "mamba1", "granitemoehybrid": "mamba2"}
    mixer = kinds.get(str(model.get("family")), "attention")
    if mamba.get("kind") == "none":
        mixer = "attention"
    attends = mixer == "attention" or mamba.get("attention_every") is not None
    if mixer != "attention" and attends:
        mixer = "hybrid"
    heads, kv_heads = model.get("num_heads"), model.get("num_kv_heads")
    attention = "mha" if kv_heads in (None, heads) else "mqa" if kv_heads == 1 else "gqa"
    capacity = "capacity" if moe.get("capacity_factor") is not None else "dropless"
    experts = capacity if moe.get("num_experts") is not None else "dense"
    return Traits(mixer, attention if attends else "", experts)


def _contrast(arm: Arm, base: Arm, arms: list[Arm], traits: dict[str, Traits | None]) -> Contrast:
    own, others = traits[arm.name], [a for a in arms if a is not arm]
    if own is not None:
        for technique, wanted in _steps_to(own):
            for other in sorted(others, key=lambda a: a is not base):
                there = traits[other.name]
                if there is not None and _fits(there, wanted):
                    return Contrast(technique, other.name, arm.name)
    return Contrast(f"{base.variant} → {arm.variant}", base.name, arm.name)


def _fits(there: Traits, wanted: Traits) -> bool:
    """Whether a variant is the wanted one; an empty `attention` takes any kind."""
    same = there.mixer == wanted.mixer and there.experts == wanted.experts
    return same and wanted.attention in ("", there.attention)


def _steps_to(own: Traits) -> list[tuple[str, Traits]]:
    """(technique, the variant without it), the nearest first."""
    steps: list[tuple[str, Traits]] = []
    kind = ATTENTION.get(own.attention, own.attention)
    if own.experts == "capacity":
        steps.append(("dropless → capacity", replace(own, experts="dropless")))
    if own.experts != "dense":
        told = kind if own.mixer == "attention" else MIXERS.get(own.mixer, own.mixer)
        steps.append((f"{told} → {told} + MoE", replace(own, experts="dense")))
    if own.mixer == "hybrid":
        for mamba in ("mamba2", "mamba1"):
            told = f"{MIXERS[mamba]} → hybrid"
            steps.append((told, replace(own, mixer=mamba, attention="")))
    if own.mixer != "attention":
        told = f"attention → {MIXERS.get(own.mixer, own.mixer)}"
        steps.append((told, replace(own, mixer="attention", attention=own.attention)))
        steps.append((told, replace(own, mixer="attention", attention="")))
    elif own.attention in ("gqa", "mqa"):
        before = {"gqa": ("mha",), "mqa": ("gqa", "mha")}[own.attention]
        steps += [(f"{ATTENTION[b]} → {kind}", replace(own, attention=b)) for b in before]
    return steps
