"""What setups are compared by: each parameter's name, how it is written, and the setting it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameter:
    """A line of the comparison; `setting` is the recipe's key for it, where it has one."""

    key: str
    label: str
    show: Callable[[Any], str]
    setting: str = ""


def short(number: float) -> str:
    """6.7B, 134.5M, 52,002, 1.25: at most four digits and a letter, small counts in full."""
    for letter, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:,.0f}" if number == int(number) or number >= 1000 else f"{number:.4g}"


def rate(value: float) -> str:
    """2e-5, 7.5e-4."""
    mantissa, _, exponent = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def share(value: float) -> str:
    return f"{100 * value:.3g}%"


def hours(value: float) -> str:
    """45 s, 12 min, 3 h, 90 days."""
    if value < 1 / 60:
        return f"{3600 * value:.3g} s"
    if value < 1:
        return f"{60 * value:.3g} min"
    return f"{value:.3g} h" if value < 200 else f"{value / 24:.3g} days"


def loss(value: float) -> str:
    return f"{value:.4g} nats"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("model", "model", str),
    Parameter("parameters", "parameters", short),
    Parameter("vocab_size", "vocabulary", short),
    Parameter("data", "data", str),
    Parameter("rows", "examples", short),
    Parameter("data_tokens", "tokens of data", short),
    Parameter("trained_tokens", "tokens trained", short, "train.tokens"),
    Parameter("tokens_per_parameter", "tokens a parameter", short),
    Parameter("optimizer", "optimizer", str, "optim.kind"),
    Parameter("learning_rate", "learning rate", rate, "optim.learning_rate"),
    Parameter("min_learning_rate", "lowest learning rate", rate, "optim.min_learning_rate"),
    Parameter("pretraining_rate", "rate of its pretraining", rate),
    Parameter("rate_ratio", "times below pretraining", _plain),
    Parameter("schedule", "schedule", str, "optim.schedule"),
    Parameter("batch_rows", "sequences an update", short, "train.step_rows"),
    Parameter("batch_tokens", "tokens an update", short, "train.step_tokens"),
    Parameter("warmup_steps", "warm-up updates", short, "optim.warmup_steps"),
    Parameter("warmup_share", "warm-up share", share),
    Parameter("steps", "updates", short, "train.steps"),
    Parameter("epochs", "epochs", lambda v: f"{v:.3g}", "train.epochs"),
    Parameter("max_grad_norm", "gradient clipped at", _plain, "optim.max_grad_norm"),
    Parameter("weight_decay", "weight decay", _plain, "optim.weight_decay"),
    Parameter("decay_on", "decay on", str),
    Parameter("max_seq_length", "length", short, "data.max_seq_length"),
    Parameter("packing", "packing", str, "data.packing"),
    Parameter("precision", "precision", str, "train.precision"),
    Parameter("lora_r", "LoRA rank", _plain, "adapter.lora.r"),
    Parameter("lora_alpha", "LoRA alpha", _plain, "adapter.lora.alpha"),
    Parameter("lora_scale", "LoRA alpha/r", _plain),
    Parameter("lora_targets", "LoRA on", str, "adapter.lora.target_modules"),
    Parameter("hardware", "hardware", str),
    Parameter("hours", "time", hours),
    Parameter("initial_loss", "first loss", loss),
    Parameter("final_loss", "last loss", loss),
)
BY_KEY = {parameter.key: parameter for parameter in PARAMETERS}
