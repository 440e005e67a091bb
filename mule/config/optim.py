"""The settings of the optimizer, beside the other sections of mule/config/schema.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from mule.config.adapter import Share
from mule.config.section import Problem, Section, knob

CountFromZero = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class OptimSection(Section):
    """The optimizer, its learning-rate schedule, and what guards it."""

    kind: Literal["adamw", "muon", "adamw8bit"] = knob(
        "adamw",
        "muon updates the blocks' matrices by orthogonalised momentum and the rest by AdamW; "
        "adamw8bit keeps the moments in 8 bits (extra qlora).",
    )
    learning_rate: Rate | Literal["auto"] = knob(
        "auto",
        "Highest learning rate, reached after the warm-up. auto is 6e-4 for a new model, 2e-4 for "
        "an adapter, 2e-5 for all weights of a trained model.",
    )
    min_learning_rate: Annotated[float, Field(ge=0, le=1)] = knob(
        0.0, "Learning rate at the end of the schedule, at most learning_rate."
    )
    schedule: Literal["cosine", "wsd", "linear", "constant"] = knob(
        "cosine", "Course of the learning rate after warm-up; wsd stays flat, then decays."
    )
    warmup_steps: CountFromZero | None = knob(
        None, "Updates of linear warm-up. Default: chosen from the length.", unit="updates"
    )
    decay_share: Rate = knob(
        0.2,
        "With wsd: share of the run spent decaying at the end, at most what the warm-up leaves.",
    )
    weight_decay: Annotated[float, Field(ge=0, le=10)] = knob(
        0.1, "Decay of the weights, on matrices only: never on norms, biases or embeddings."
    )
    beta1: Share = knob(0.9, "AdamW's memory of the gradient.")
    beta2: Share = knob(0.95, "AdamW's memory of the squared gradient.")
    eps: Rate = knob(1e-8, "AdamW's guard against division by zero.")
    momentum: Share = knob(
        0.95,
        "Muon's memory of the gradient; its updates are as long as AdamW's, so all else holds.",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = knob(
        1.0, "Longer gradients are scaled down to this norm."
    )
    max_spike: Annotated[float, Field(ge=3)] | None = knob(
        6.0,
        "Updates whose loss or gradient norm is more than so many standard deviations above the last "
        "128 applied ones, and the norm three times theirs, are skipped; five refused in a row go back "
        "to the last checkpoint. null never skips.",
    )
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = knob(
        None,
        "Also keep a moving average of the weights, with this decay an update (such as 0.999).",
    )

    def idle(self) -> Iterator[Problem]:
        why = f"cannot take effect with optim.schedule={self.schedule}; remove it"
        if self.schedule != "wsd":
            yield Problem("decay_share", f"{why}, or use wsd", because="schedule")
        if self.schedule == "constant":
            yield Problem("min_learning_rate", why, because="schedule")
        if self.kind != "muon":
            why = f"cannot take effect with optim.kind={self.kind}; remove it, or use muon"
            yield Problem("momentum", why, because="kind")

    def conflicts(self) -> Iterator[Problem]:
        lowest, highest = self.min_learning_rate, self.learning_rate
        if highest != "auto" and lowest > highest:
            yield Problem(
                "min_learning_rate",
                f"{lowest:g} is above optim.learning_rate = {highest:g}; lower it",
            )
