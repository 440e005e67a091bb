"""Histories as runs leave them, made from curves: for the tests of the doctor's rules."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mule.config.load import load_recipe, to_yaml
from mule.doctor.history import History, Row
from mule.plan.schedule import learning_rate
from mule.run import Run

Curve = Callable[[int], float]
_KINDS = {
    "pretrain": ["model.size=10m"],
    "fine-tune": ["model.path=base"],
    "adapter": ["model.path=base", "adapter.kind=lora"],
}
NORMS: dict[str, Curve] = {
    "pretrain": lambda step: 0.5 + 6 * math.exp(-step / 12),
    "fine-tune": lambda step: 1.4 + 6 * math.exp(-step / 10),
    "adapter": lambda step: 0.4 - 0.2 * math.exp(-step / 20),
}


def curve(first: float, floor: float, half: float) -> Curve:
    """A loss that has come half its way to the floor after `half` updates, ever slower."""
    return lambda step: floor + (first - floor) / (1 + step / half)


def history(
    kind: str = "pretrain",
    loss: Curve | Sequence[float] | None = None,
    *,
    num_steps: int = 200,
    until: int | None = None,
    noise: float = 0.03,
    settings: Sequence[str] = (),
    norm: Curve | None = None,
    valid: Curve | None = None,
    events: Sequence[Row] = (),
    samples: Sequence[Row] = (),
    facts: Row | None = None,
    seed: int = 0,
    extra: Callable[[int], Row] = lambda step: {},
) -> History:
    """A run of `num_steps` updates of which `until` are done; `noise` is a share of the loss.

    The loss is a curve over updates from 0, or one value an update. `extra` gives further figures of
    a row by its step.
    """
    rng = random.Random(seed)
    warmup = max(1, round(0.05 * num_steps))
    given = {word.partition("=")[0] for word in settings}
    usual = ("optim.learning_rate=1e-3", f"optim.warmup_steps={warmup}")
    words = [
        *("data.train=[data.jsonl]", f"train.steps={num_steps}"),
        *(word for word in usual if word.partition("=")[0] not in given),
        *_KINDS[kind],
        *settings,
    ]
    recipe = load_recipe(None, words).recipe
    warmup = int(recipe.optim.warmup_steps or 0)
    rate = learning_rate(recipe.optim, warmup, num_steps)
    curve_of = loss or {"pretrain": curve(6.8, 2.4, 15)}.get(kind, curve(2.6, 1.6, 12))
    done = until or num_steps
    values = [curve_of(i) if callable(curve_of) else curve_of[i] for i in range(done)]
    rows = [
        _row(
            step,
            value * (1 + rng.gauss(0, noise)),
            rate(step - 1),
            (norm or NORMS[kind])(step) * math.exp(rng.gauss(0, 0.15)),
        )
        | extra(step)
        for step, value in enumerate(values, 1)
    ]
    every = max(1, num_steps // 10)
    if valid is not None:
        for row in rows[every - 1 :: every]:
            row["val_loss"] = valid(row["step"])
    return History(
        name="case",
        recipe=recipe,
        num_steps=num_steps,
        rows=rows,
        events=list(events),
        samples=list(samples),
        lineage={},
        facts=facts or {},
    )


def _row(step: int, loss: float, rate: float, norm: float) -> dict[str, Any]:
    return {
        "step": step,
        "attempt": 1,
        "epoch": step / 100,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "num_targets": 1500,
        "memory_bytes": 500_000_000,
        "tokens_per_second": 4000.0,
        "steps_per_second": 2.0,
    }


def run_folder(root: Path, case: History) -> Run:
    """A run folder that reads as this history; its name is the history's."""
    run = Run.create(root, case.name, to_yaml(case.recipe, {}))
    with run.lock():
        run.write_resolved(to_yaml(case.recipe, {}))
        run.write_lineage(case.lineage)
        run.start_attempt(from_step=0)
        for row in case.rows:
            run.log_metrics(row)
        for event in case.events:
            run.log_event(event["kind"], **{k: v for k, v in event.items() if k != "kind"})
        for sample in case.samples:
            run.log_samples(sample["step"], sample["answers"])
        if case.is_over:
            run.log_event("finished", step=case.step)
    return run


def assert_only_notes(rules: Sequence[Any], case: History) -> None:
    """No rule warns of this run."""
    for rule in rules:
        found = rule.RULE.check(case)
        assert found is None or found.severity == "note", (rule.RULE.code, found)
