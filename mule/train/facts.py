"""What assembling a run found out, kept in its folder for the doctor: data, labels, base, experts.

Measured once, before the first update, and kept when the run is resumed. It takes about a second of
much data, which is sampled and says so, and with a base two forward passes of 400 tokens.
"""

from __future__ import annotations

import math
import time
from typing import Any

from mule import calibration, fsio, machine, progress
from mule.data.audit import data_facts, label_facts
from mule.doctor.history import FACTS
from mule.models.own_model import OwnModel
from mule.plan.estimate import update_seconds
from mule.plan.fitted import fitted
from mule.plan.hardware import this_machine
from mule.run import Run
from mule.train.assemble import Parts, machine_facts
from mule.train.base_loss import base_facts


def record_facts(run: Run, parts: Parts) -> None:
    """Write the facts of a run that has none yet; the first process does, for all."""
    file = run.folder / FACTS
    if file.is_file():
        return
    started_at = time.perf_counter()
    with progress.task("Looking at the data"):
        facts = facts_of(parts) | planned(run, parts)
    fsio.write_json(file, facts | {"seconds": round(time.perf_counter() - started_at, 3)})


def facts_of(parts: Parts) -> dict[str, Any]:
    """What rules ask for beside the figures of the updates; docstrings of its parts say what."""
    num_steps, valid = parts.resolved.num_steps, parts.valid.shards if parts.valid else None
    facts: dict[str, Any] = {
        "data": data_facts(parts.train, valid, num_steps),
        "labels": label_facts(parts.train, parts.tokenizer, num_steps),
        "vocab_size": parts.tokenizer.vocab_size,
        "trained": {
            "num_trained": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
            "num_weights": sum(p.numel() for p in parts.model.parameters()),
        },
    }
    if moe := parts.config.moe:
        facts["experts"] = {"num": moe.num_experts, "per_token": moe.experts_per_token}
    if base := base_facts(parts):
        facts["base"] = base
    return facts


def planned(run: Run, parts: Parts) -> dict[str, Any]:
    """`plan`: what `mule plan` expects an update to take here, in seconds.

    Empty where this machine was not measured yet, or cannot be: then nothing is known to its error.
    With fewer threads than cores the time is that of all cores, times what is left out at most.
    """
    is_own = isinstance(parts.model, OwnModel)
    if is_own or not calibration.is_known() or not parts.group.is_alone:
        return {}
    recipe = parts.recipe
    no_disk = calibration.Disk(math.inf, 0.0)  # an update writes nothing
    found, words = calibration.calibration(), parts.config.vocab_size
    precision = str(recipe.train.precision)
    hardware = this_machine(found, no_disk, run.folder, fitted(), precision, words)
    if not hardware.is_calibrated or recipe.train.device != hardware.device:
        return {}
    facts = machine_facts(parts.train.shards, recipe.train, parts.group)
    left_out = max(1.0, machine.physical_cores() / int(recipe.train.threads))
    update_s = left_out * update_seconds(parts.config, recipe, facts, hardware)
    return {"plan": {"update_s": update_s, "basis": hardware.basis}}
