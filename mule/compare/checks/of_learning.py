"""Checks of how a run learns: rate, scale, schedule, decay, clipping."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mule.compare.checks.mistake import NOTHING, WASTED, WRECKED, Mistake, is_adapter, say
from mule.compare.checks.model_facts import billions_of
from mule.compare.dialects.data_sets import known_rows
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.to_recipe import is_adamw, num_steps, update_rows

_HIGHEST_PRODUCT = 5e-3  # of an adapter: rate x alpha / r
_SCALE_RANGE = (1 / 64, 32.0)  # of alpha / r; published are 0.25 to 20
_MOST_DECAY = 0.5
_LEAST_NORM = 1e-6
_EPS_RANGE = (1e-12, 1e-4)
_MOST_WARM_UP = 0.5  # of the run
_MOST_DROPOUT = 0.5
_MOST_RANK = 1024


@dataclass(frozen=True)
class _Rates:
    """What learning rates a kind of run has been published with; the limits are about twice them."""

    lowest: float
    highest: float
    usual: str
    source: str


_RATES = {
    "adapter": _Rates(
        1e-6,
        3e-3,
        "1e-5 to 1e-3 for an adapter",
        "LoRA, arXiv:2106.09685 (2e-4); QLoRA, arXiv:2305.14314 (1e-4 to 2e-4)",
    ),
    "full": _Rates(
        1e-8,
        6e-4,
        "5e-6 to 3e-4 for all weights",
        "Alpaca (2e-5); LLaMA-2 Chat, arXiv:2307.09288 (2e-5); SmolLM2 1.7B (3e-4)",
    ),
    "small": _Rates(
        1e-8,
        2e-3,
        "1e-5 to 1e-3 for all weights of less than a billion",
        "SmolLM2 135M and 360M (1e-3)",
    ),
    "pretrain": _Rates(
        1e-6,
        1e-2,
        "1e-4 to 3e-3 for a new model",
        "GPT-3, arXiv:2005.14165, table 2.1 (6e-5 to 6e-4)",
    ),
}


def _kind(setup: ForeignSetup) -> str:
    if setup.value("pretrain") and setup.value("model.path") is None:
        return "pretrain"
    if is_adapter(setup):
        return "adapter"
    billions = billions_of(str(setup.value("model.path", "")))
    return "small" if billions is not None and billions < 1 else "full"


def _factor(setup: ForeignSetup) -> float | None:
    """What multiplies the adapter's update: alpha / r."""
    if setup.number("lora_scale") is not None:
        return setup.number("lora_scale")
    rank, alpha = setup.number("adapter.lora.r"), setup.number("adapter.lora.alpha")
    if not rank or rank < 0 or alpha is None:
        return None
    return alpha / rank**0.5 if setup.value("adapter.lora.use_rslora") is True else alpha / rank


def _rate(setup: ForeignSetup) -> Iterator[Mistake]:
    fact, rates = "optim.learning_rate", _RATES[_kind(setup)]
    rate = setup.number(fact)
    if rate is None or rate <= 0 or not is_adamw(setup):
        return
    factor = _factor(setup) if is_adapter(setup) else None
    product = rate * factor if factor else 0.0
    if rate > rates.highest or product > _HIGHEST_PRODUCT:
        found = f"{rate:g}" + (f" x {factor:g} (alpha / r)" if factor else "")
        texts = (found, "the first updates destroy what the model knows", rates.usual)
        yield say(setup, fact, "rate-too-high", WRECKED, texts, source=rates.source)
    elif rate < rates.lowest and product < rates.lowest:
        texts = (f"{rate:g}", "the run ends before anything has moved", rates.usual)
        yield say(setup, fact, "rate-too-low", WASTED, texts, source=rates.source)


def _scale(setup: ForeignSetup) -> Iterator[Mistake]:
    factor = _factor(setup)
    fact = "lora_scale" if setup.number("lora_scale") is not None else "adapter.lora.alpha"
    if not is_adapter(setup) or not factor:
        return
    lowest, highest = _SCALE_RANGE
    source = "LoRA, arXiv:2106.09685, section 4.1"
    if factor > highest:
        why = "it multiplies every update of the adapter; usual are 0.5 to 2 (20 in mlx-lm)"
        if fact == "lora_scale":
            why += ": mlx-lm's scale is alpha / r, not alpha"
        texts = (f"alpha / r = {factor:g}", why, "alpha = r or 2 x r")
        yield say(setup, fact, "scale-too-large", WRECKED, texts, source=source)
    elif factor < lowest:
        texts = (f"alpha / r = {factor:g}", "the adapter hardly counts", "alpha = r or 2 x r")
        yield say(setup, fact, "scale-too-small", WASTED, texts, source=source)


def _decay(setup: ForeignSetup) -> Iterator[Mistake]:
    decay = setup.number("optim.weight_decay")
    if decay is not None and decay > _MOST_DECAY:
        why = "each update shrinks the weights by rate x decay: what they know is forgotten"
        source = "AdamW, arXiv:1711.05101; GPT-3, arXiv:2005.14165 (0.1)"
        texts = (f"{decay:g}", why, "0 to 0.1")
        yield say(setup, "optim.weight_decay", "decay-too-large", WRECKED, texts, source=source)


def _betas(setup: ForeignSetup) -> Iterator[Mistake]:
    first, second = setup.number("optim.beta1"), setup.number("optim.beta2")
    if first is None or second is None or first <= second:
        return
    texts = (
        f"beta1 {first:g} above beta2 {second:g}",
        "they look swapped: the gradient's square is to be remembered longer than the gradient",
        "beta1 0.9, beta2 0.95 to 0.999",
    )
    fact = "optim.beta1" if setup.is_stated("optim.beta1") else "optim.beta2"
    yield say(setup, fact, "betas-swapped", WRECKED, texts, source="Adam, arXiv:1412.6980")


def _clip(setup: ForeignSetup) -> Iterator[Mistake]:
    norm = setup.number("optim.max_grad_norm")
    if norm is None or norm >= _LEAST_NORM:
        return
    if norm <= 0:
        texts = (f"{norm:g}", "0 clips nothing: one odd batch can wreck the run", "1.0")
        yield say(setup, "optim.max_grad_norm", "clip-off", WRECKED, texts)
    else:
        texts = (f"{norm:g}", "AdamW's eps outweighs gradients cut so short", "1.0")
        yield say(setup, "optim.max_grad_norm", "clip-too-small", WASTED, texts)


def _warm_up(setup: ForeignSetup) -> Iterator[Mistake]:
    """A warm-up as long as the run: the rate that was asked for is never reached."""
    share, steps = setup.number("warmup_share"), setup.number("optim.warmup_steps")
    total = num_steps(setup) or _known_steps(setup)
    if steps:
        share = steps / total if total else None
    if share is None or share <= _MOST_WARM_UP:
        return
    found = f"{share:g} of the run"
    why = "the rate rises to the end, or beyond it: what was asked for is hardly used"
    if steps:
        found = f"{steps:g} of about {total:,} updates"
    elif share > 1:
        why = "a share is at most 1; a number of updates has a key of its own"
    fact = "optim.warmup_steps" if steps else "warmup_share"
    gravity = NOTHING if share >= 1 else WRECKED
    yield say(setup, fact, "warm-up-too-long", gravity, (found, why, "3 to 10% of the updates"))


def _known_steps(setup: ForeignSetup) -> int | None:
    """Updates of the run where its tokens or the size of the data are known; not of packed rows."""
    rows, size, epochs = known_rows(setup), update_rows(setup), setup.number("train.epochs")
    tokens, length = setup.number("train.tokens"), setup.number("data.max_seq_length")
    if tokens and length and size and setup.value("pretrain"):
        return max(1, round(tokens / (length * size)))
    if not rows or not size or not epochs or setup.value("data.packing") or setup.value("pretrain"):
        return None
    held = setup.number("val_size") or 0
    rows = rows * (1 - held) if held < 1 else rows - held
    return max(1, round(rows * epochs / size))


def _lowest_rate(setup: ForeignSetup) -> Iterator[Mistake]:
    lowest, rate = setup.number("optim.min_learning_rate"), setup.number("optim.learning_rate")
    if lowest and rate and lowest >= rate:
        found = f"{lowest:g}, and the highest is {rate:g}"
        texts = (found, "the schedule would rise", "a tenth of the highest, or 0")
        yield say(setup, "optim.min_learning_rate", "lowest-above-highest", WRECKED, texts)


def _decay_steps(setup: ForeignSetup) -> Iterator[Mistake]:
    """mlx-lm's schedule has a length of its own."""
    decay, steps = setup.number("decay_steps"), num_steps(setup)
    if decay and steps and (decay < steps / 2 or decay > 2 * steps):
        texts = (
            f"the rate falls over {decay:g} updates, the run has {steps:,}",
            "the schedule ends long before the run, or the run before the schedule",
            f"arguments: [highest, {steps}, lowest]",
        )
        yield say(setup, "decay_steps", "schedule-of-another-length", WASTED, texts)


def _odd_values(setup: ForeignSetup) -> Iterator[Mistake]:
    eps, rank = setup.number("optim.eps"), setup.number("adapter.lora.r")
    if eps is not None and not _EPS_RANGE[0] <= eps <= _EPS_RANGE[1]:
        texts = (f"{eps:g}", "it outweighs the gradient's square, or guards nothing", "1e-8")
        yield say(setup, "optim.eps", "eps-odd", WRECKED, texts, source="Adam, arXiv:1412.6980")
    dropout = setup.number("adapter.lora.dropout")
    if is_adapter(setup) and dropout is not None and dropout > _MOST_DROPOUT:
        texts = (f"{dropout:g}", "most of what the adapter sees is dropped", "0 to 0.1")
        yield say(setup, "adapter.lora.dropout", "dropout-too-large", WRECKED, texts)
    if is_adapter(setup) and rank and rank > _MOST_RANK:
        texts = (f"{rank:g}", "about as many weights as the layer itself has", "8 to 64")
        yield say(setup, "adapter.lora.r", "rank-too-large", WASTED, texts)


CHECKS: tuple[Callable[[ForeignSetup], Iterator[Mistake]], ...] = (
    *(_warm_up, _scale, _rate, _decay, _betas, _clip, _lowest_rate, _decay_steps, _odd_values),
)
