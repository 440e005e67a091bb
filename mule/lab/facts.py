"""campaign.json: what all runs of a campaign share, decided once and never changed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import mule
from mule.config.campaign import SHARED_SECTIONS, Campaign
from mule.config.dump import value_of
from mule.config.knobs import knobs
from mule.errors import UserError
from mule.lab.campaign import Job, Plan
from mule.lab.prepare import Shared, decide


def begin(
    campaign: Campaign, plan: Plan, shared: Shared, known: dict[str, Any], *, machine: bool
) -> dict[str, Any]:
    """The facts of a campaign: those `known` from an earlier start, with what may be added to.

    Variants, seeds, sizes and what is measured afterwards may be added; anything else that changed
    is refused with UserError, since the runs would differ in it. `machine`: as of `decide`.
    """
    asked = _asked(campaign)
    variants = {
        name: variant.model_dump(mode="json", exclude_none=True)
        for name, variant in campaign.plan.variants.items()
    }
    if known:
        _refuse_changes(plan, known, asked, variants, shared)
    pinned = known.get("pinned") or _decided(plan, shared, machine=machine)
    search = campaign.plan.search
    return {
        "name": campaign.name,
        "mule": known.get("mule", mule.__version__),
        "overrides": campaign.overrides,
        "baseline": campaign.baseline,
        "seeds": campaign.plan.seeds,
        "sizes": plan.sizes,
        "search": search.model_dump() if search.searched else None,
        "variants": {**known.get("variants", {}), **variants},
        **_modules(plan, known),
        "asked": asked,
        "pinned": pinned,
        **shared.facts(),
        "test_files": shared.test_files,
    }


def _decided(plan: Plan, shared: Shared, *, machine: bool) -> dict[str, Any]:
    campaign = plan.campaign
    of_mule = [
        name for name in (campaign.baseline, *campaign.plan.variants) if name not in plan.own
    ]
    first = Job(of_mule[0], plan.sizes[0], campaign.plan.seeds[0])
    search = campaign.plan.search
    lowest = {key: ends[0] for key, ends in search.ranges.items()}  # only to have a whole recipe
    decided = decide(shared, plan.recipe(first, lowest), machine=machine)
    return {key: value for key, value in decided.items() if key not in search.searched}


def _modules(plan: Plan, known: dict[str, Any]) -> dict[str, Any]:
    """What is known of the variants that are modules of the user's, where there are any."""
    modules = known.get("modules", {}) | {name: asdict(own) for name, own in plan.own.items()}
    return {"modules": modules} if modules else {}


def _asked(campaign: Campaign) -> dict[str, Any]:
    """Every setting that the runs share, as the campaign gives it."""
    values = {
        key: value_of(campaign.shared, key)
        for key, knob in knobs().items()
        if key.partition(".")[0] in SHARED_SECTIONS
        and value_of(campaign.shared, key) != knob.default
    }
    plan = campaign.plan
    own = {"budget": plan.budget, "data": plan.data, "search": plan.search}
    for section, value in own.items():
        given = value.model_dump(mode="json", exclude_defaults=True)
        values |= {f"{section}.{key}": item for key, item in given.items()}
    return values


def _refuse_changes(
    plan: Plan,
    known: dict[str, Any],
    asked: dict[str, Any],
    variants: dict[str, Any],
    shared: Shared,
) -> None:
    before = known["asked"]
    changed = [
        f"{key} (was {before.get(key)!r}, is {asked.get(key)!r})"
        for key in sorted({*before, *asked})
        if before.get(key) != asked.get(key)
    ]
    changed += [
        f"variants.{name} (was {known['variants'][name]!r}, is {variant!r})"
        for name, variant in variants.items()
        if known["variants"].get(name, variant) != variant
    ]
    now = shared.facts()
    for part, facts in now["data"].items():
        if known["data"][part]["folder"] != facts["folder"]:
            changed.append(f"the text of data.{part}")
    if changed:
        raise UserError(
            f"{plan.folder.path} was begun otherwise: {', '.join(changed)}",
            "put it back, or begin another campaign: name=ANOTHER",
        )
