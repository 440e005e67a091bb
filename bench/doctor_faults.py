"""The faults of the bench: each a change to a sound draft of a run, and the rules that should find it.

A fault is planted by the recipe or by the data where Mule allows it. Where Mule refuses it, or where it
comes from outside, `damage` names a function of bench/doctor_damage.py that the training process calls.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.doctor_data import Row
from bench.doctor_settings import Kind, Setting

_CHARS_PER_TOKEN, _MARKERS = (
    2.2,
    12,
)  # of these small vocabularies; tokens that a chat has beside words

# Copies beside a base: with random weights, its vocabulary in disorder, and another chat template.
RANDOM, PERMUTED, REWORDED = "-random", "-permuted", "-reworded"

ALL: tuple[Kind, ...] = ("text", "chat", "adapter", "experts")
LEARNING: tuple[Kind, ...] = ("text", "chat", "experts")
NEW: tuple[Kind, ...] = ("text", "experts")
TUNED: tuple[Kind, ...] = ("chat", "adapter")


@dataclass
class Draft:
    """A run before it is written: its recipe by dotted keys, its rows, its damage.

    `valid` are rows for validation; without them a share of `train` is held out. `spare` are rows of
    another data set of the same sort.
    """

    setting: Setting
    recipe: dict[str, Any]
    train: list[Row]
    rng: random.Random
    spare: list[Row] = field(default_factory=list)
    valid: list[Row] | None = None
    damage: str | None = None

    def validate_on(self, rows: list[Row]) -> None:
        """Give these rows for validation instead of a share."""
        self.valid = rows
        self.recipe.pop("data.valid_share", None)

    def times_rate(self, factor: float) -> None:
        self.recipe["optim.learning_rate"] = min(1.0, self.recipe["optim.learning_rate"] * factor)


@dataclass(frozen=True)
class Fault:
    """`kinds` are the settings it can happen in."""

    title: str
    plant: Callable[[Draft], None]
    kinds: tuple[Kind, ...]


FAULTS: dict[str, Fault] = {}


def _fault(name: str, title: str, kinds: tuple[Kind, ...]) -> Callable[..., Any]:
    def register(plant: Callable[[Draft], None]) -> Callable[[Draft], None]:
        FAULTS[name] = Fault(title, plant, kinds)
        return plant

    return register


# ---------------------------------------------------------------- by the recipe


@_fault("rate-too-high", "learning rate 30 times too high", ALL)
def _rate_too_high(draft: Draft) -> None:
    draft.times_rate(30.0)


@_fault("rate-too-low", "learning rate 100 times too low", LEARNING)
def _rate_too_low(draft: Draft) -> None:
    draft.times_rate(0.01)


@_fault("no-warm-up", "no warm-up, at a rate 8 times too high", NEW)
def _no_warm_up(draft: Draft) -> None:
    draft.times_rate(8.0)
    draft.recipe["optim.warmup_steps"] = 0


@_fault("warm-up-too-long", "a warm-up of nine tenths of the run", LEARNING)
def _warm_up_too_long(draft: Draft) -> None:
    draft.recipe["optim.warmup_steps"] = draft.recipe["train.steps"] * 9 // 10


@_fault("clipped", "gradients clipped to a hundredth, at every update", ALL)
def _clipped(draft: Draft) -> None:
    draft.recipe["optim.max_grad_norm"] = 0.01


@_fault("noisy-batch", "one short row an update, at a rate 3 times too high", ("text",))
def _noisy_batch(draft: Draft) -> None:
    draft.recipe |= {"train.step_rows": 1, "data.max_seq_length": 32}
    draft.times_rate(3.0)


@_fault("frozen", "all weights frozen but norms and routers", LEARNING)
def _frozen(draft: Draft) -> None:
    draft.recipe["train.freeze"] = ["model.embed_tokens.*", "model.layers.*proj*"]


@_fault("adapter-idle", "an adapter whose learning rate is next to nothing", ("adapter",))
def _adapter_idle(draft: Draft) -> None:
    draft.recipe["optim.learning_rate"] = 1e-7


@_fault("too-few-updates", "a dozen updates in all", LEARNING)
def _too_few_updates(draft: Draft) -> None:
    draft.recipe["train.steps"] = 12


@_fault("too-much-dropout", "dropout of 0.7", NEW)
def _too_much_dropout(draft: Draft) -> None:
    draft.recipe["train.dropout"] = 0.7


# ---------------------------------------------------------------- by the data


@_fault("few-targets", "one word of each chat is trained", TUNED)
def _few_targets(draft: Draft) -> None:
    for row in draft.train:
        asked, answered = (row["messages"][place]["content"] for place in (-2, -1))
        question = f"{asked}\nIs this right: {answered}"
        answer = draft.rng.choice(("Yes", "No"))
        row["messages"] = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


@_fault("truncated", "most answers are cut off", TUNED)
def _truncated(draft: Draft) -> None:
    sizes = [[len(m["content"]) for m in row["messages"]] for row in draft.train]
    chars = statistics.median(sum(size[:-1]) + size[-1] / 3 for size in sizes)
    length = round(chars / _CHARS_PER_TOKEN) + _MARKERS
    draft.recipe |= {"data.max_seq_length": length, "data.too_long": "truncate"}


@_fault("duplicates", "every row twenty times", ("text", "chat", "adapter"))
def _duplicates(draft: Draft) -> None:
    draft.train = draft.train[::20] * 20
    draft.rng.shuffle(draft.train)


@_fault("unshuffled", "two data sets one after the other, in the order of the files", LEARNING)
def _unshuffled(draft: Draft) -> None:
    half = len(draft.train) // 2
    held_out = draft.train[half::8] + draft.spare[:half:8]
    draft.validate_on(held_out)
    first, second = draft.train[:half], [row for row in draft.spare[:half] if row not in held_out]
    draft.train = sorted(first, key=_size) + sorted(second, key=_size)
    draft.damage = "rows_in_order"


def _size(row: Row) -> int:
    return len(str(row))


@_fault("leak", "two thirds of the validation rows are trained on", ("text", "chat", "adapter"))
def _leak(draft: Draft) -> None:
    held_out = draft.rng.sample(range(len(draft.train)), len(draft.train) // 8)
    draft.validate_on([draft.train[place] for place in held_out])
    apart = set(held_out[::3])
    draft.train = [row for place, row in enumerate(draft.train) if place not in apart]


@_fault("overfitting", "few rows, many epochs", ("text", "chat", "adapter"))
def _overfitting(draft: Draft) -> None:
    few = 10 if draft.setting.kind == "text" else 40
    draft.validate_on(draft.train[few : few + 60])
    draft.train = draft.train[:few]
    draft.recipe["train.steps"] = draft.recipe["train.steps"] * 3 // 2
    draft.times_rate(1.5)


@_fault("memorising", "twelve rows until they are known by heart", TUNED)
def _memorising(draft: Draft) -> None:
    draft.train = draft.train[:12]
    draft.recipe |= {"data.valid_share": 0, "train.step_rows": 2, "optim.schedule": "constant"}
    draft.recipe["evaluate.prompts"] = [row["messages"][0]["content"] for row in draft.train[:3]]
    draft.times_rate(1.5)


@_fault("wrong-base", "random weights are given for the base", TUNED)
def _wrong_base(draft: Draft) -> None:
    draft.recipe["model.path"] += RANDOM


@_fault("wrong-tokenizer", "the base's vocabulary in another order", TUNED)
def _wrong_tokenizer(draft: Draft) -> None:
    draft.recipe["tokenizer.path"] = draft.recipe["model.path"] + PERMUTED


@_fault("wrong-template", "a chat template that the base has never seen", TUNED)
def _wrong_template(draft: Draft) -> None:
    draft.recipe["tokenizer.path"] = draft.recipe["model.path"] + REWORDED


# ---------------------------------------------------------------- by damage to the training


def _damaged(name: str, title: str, kinds: tuple[Kind, ...], damage: str) -> None:
    def plant(draft: Draft) -> None:
        draft.damage = damage

    _fault(name, title, kinds)(plant)


_damaged("labels-shuffled", "targets in disorder", LEARNING, "targets_in_disorder")
_damaged("labels-unshifted", "each token is its own target", NEW, "targets_not_shifted")
_damaged("bad-rows", "noise for data, every 20th update", NEW, "noise_for_text")
_damaged("not-a-number", "a loss that is not a number, now and then", ALL, "not_a_number")
_damaged("no-gradient", "hardly any gradient arrives", LEARNING, "no_gradient")
_damaged("diverging", "the rate jumps to 60 times half-way", LEARNING, "rate_step")
_damaged("stop-untrained", "the token that ends an answer is no target", TUNED, "stop_untrained")
_damaged("slowing-down", "every update takes longer than the last", ALL, "slowing_down")
_damaged("too-slow", "something else holds the machine", ALL, "slow_all_along")
_damaged("leaking", "4 MiB are left behind at every update", ALL, "leaking")


@_fault("router-collapse", "all tokens go to the same two experts", ("experts",))
def _router_collapse(draft: Draft) -> None:
    draft.recipe["model.moe.balance"] = "none"
    draft.damage = "router_collapse"


@_fault("dead-experts", "a third of the experts is never chosen", ("experts",))
def _dead_experts(draft: Draft) -> None:
    draft.damage = "dead_experts"


# The rules of which one must be found for a fault to count as found, in an alarm or a warning: a note
# does not count. Declared by what the rules say they see, before any held-out run was looked at.
CODES: dict[str, str] = {
    "rate-too-high": "D301 D102 D103 D104 D201 D205",
    "rate-too-low": "D302 D102",
    "no-warm-up": "D303 D301 D103 D104 D201 D205",
    "warm-up-too-long": "D304",
    "clipped": "D203",
    "noisy-batch": "D204",
    "frozen": "D102 D302",
    "adapter-idle": "D801 D102",
    "too-few-updates": "D305",
    "too-much-dropout": "D106",
    "few-targets": "D503",
    "truncated": "D505",
    "duplicates": "D501",
    "unshuffled": "D502",
    "leak": "D403",
    "overfitting": "D401",
    "memorising": "D402 D404",
    "wrong-base": "D802",
    "wrong-tokenizer": "D802",
    "wrong-template": "D802",
    "labels-shuffled": "D102 D106 D802",
    "labels-unshifted": "D105",
    "bad-rows": "D103 D205",
    "not-a-number": "D101",
    "no-gradient": "D202",
    "diverging": "D104 D103 D201 D205",
    "stop-untrained": "D504",
    "slowing-down": "D603",
    "too-slow": "D604",
    "leaking": "D601",
    "router-collapse": "D703 D702",
    "dead-experts": "D701",
}
