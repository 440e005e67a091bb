"""Dimensions for a budget: models that differ in one thing and are equal in active size. No torch.

All variants share the width of the residual stream, so their embeddings are equal, and the depth, but
for one that spends on layers; heads follow from what a variant says, and the feed-forward layer takes
what is left. Sizes keep to what GGUF types can hold: hidden_size and heads x head_dim are multiples of
256, widths of feed-forward layers and experts of 32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mule.config.lab import BudgetSection, VariantSection, amount
from mule.errors import ModelError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.variant import Sizes, attention_every, kv_heads_of, variant_config

WIDTH_STEP, BLOCK = 32, 256  # weights that share a scale in most GGUF types, and in K-quants
_ASPECT = 40.0  # hidden_size over num_layers; small models of the usual families have 20 to 70
_MIN_LAYERS, _MAX_HIDDEN = 2, 16_384
_LARGE, _SMALL = 100e6, 10e6  # active parameters
_NEAR = 0.25  # share by which the depth may leave the usual one before the tolerance is used up
_LIKE_PLAIN = 0.75  # of the plain width: less is left only where too much was spent
_MHA = VariantSection()


@dataclass(frozen=True)
class Solved:
    """A variant's model, and how near it comes to the budget."""

    config: ModelConfig
    quantity: str  # what the budget counts
    target: float
    found: float

    @property
    def residual(self) -> float:
        """The share by which the budget is missed; negative: below it."""
        return self.found / self.target - 1

    @property
    def active_params(self) -> int:
        """Parameters that a token passes, embeddings included, whatever the budget counts."""
        return cost.active_params(self.config)


@dataclass(frozen=True)
class _Frame:
    """What the variants of one budget share."""

    budget: BudgetSection
    vocab_size: int
    max_seq_length: int
    target: float
    hidden_size: int = 0
    head_dim: int = 64
    num_layers: float = 0.0  # that the budget pays for in its plainest model

    def measure(self, config: ModelConfig) -> float:
        """What the budget counts, of a model."""
        if self.budget.mode == "flops_per_token":
            return cost.train_flops_per_token(config, self.max_seq_length)
        without = self.budget.counted == "without_embeddings"
        return cost.active_params(config) - (cost.embedding_params(config) if without else 0)

    @property
    def quantity(self) -> str:
        return counted(self.budget)

    @property
    def active_params(self) -> float:
        """The size of the models, about."""
        return self.target / (6 if self.budget.mode == "flops_per_token" else 1)

    def tolerance(self, variant: VariantSection) -> float:
        """Greatest share by which a variant may miss the target."""
        is_dense = variant.mixer == "attention" and variant.num_experts is None
        return tolerance(self.budget, self.active_params, is_dense=is_dense)


@dataclass(frozen=True)
class _Fit:
    """The best widths at given heads and depth."""

    config: ModelConfig
    found: float

    @property
    def width(self) -> int:
        """Of the feed-forward layer, or of an expert."""
        return self.config.intermediate_size


def counted(budget: BudgetSection) -> str:
    """What a budget counts, in words."""
    if budget.mode == "flops_per_token":
        return "FLOPs per token"
    without = budget.counted == "without_embeddings"
    return "active parameters" + (" without embeddings" if without else "")


def tolerance(budget: BudgetSection, active_params: float, *, is_dense: bool) -> float:
    """Greatest share by which a model of about so many parameters may miss the budget."""
    if budget.tolerance is not None:
        return budget.tolerance
    return 0.005 if is_dense and active_params >= _LARGE else 0.015


def solve(
    budget: BudgetSection, variant: VariantSection, *, vocab_size: int, max_seq_length: int
) -> Solved:
    """One variant alone; those of a campaign are solved together, so that their depths agree."""
    lengths = {"vocab_size": vocab_size, "max_seq_length": max_seq_length}
    return solve_all(budget, {"model": variant}, **lengths)["model"]


def solve_all(
    budget: BudgetSection,
    variants: Mapping[str, VariantSection],
    *,
    vocab_size: int,
    max_seq_length: int,
) -> dict[str, Solved]:
    """The variants' models, by name.

    Raises ModelError when no dimensions come within the budget's tolerance.
    """
    if own := next((name for name, variant in variants.items() if variant.module), None):
        raise ModelError(
            f"variant {own} is a module of your own; only its author can change its dimensions",
            f"see what it takes with `mule lab check {variants[own].module}`",
        )
    frame = _frame(budget, vocab_size, max_seq_length)
    at_depth = _common_depth(frame, variants)
    return {
        name: Solved(fit.config, frame.quantity, frame.target, fit.found)
        for name, fit in at_depth.items()
    }


# ---------------------------------------------------------------- what all share


def _frame(budget: BudgetSection, vocab_size: int, max_seq_length: int) -> _Frame:
    """Width and usual depth for the budget; of FLOPs by way of a model of as many parameters."""
    if budget.mode == "flops_per_token" and budget.active_params is not None:
        by_params = budget.model_copy(update={"mode": "active_params"})
        plain = solve(by_params, _MHA, vocab_size=vocab_size, max_seq_length=max_seq_length)
        target = cost.train_flops_per_token(plain.config, max_seq_length)
        frame = _Frame(budget, vocab_size, max_seq_length, target)
        chosen = replace(frame, head_dim=plain.config.head_dim)
        return replace(
            chosen, hidden_size=plain.config.hidden_size, num_layers=plain.config.num_layers
        )
    value = budget.active_params if budget.active_params is not None else budget.flops_per_token
    assert value is not None
    frame = _Frame(budget, vocab_size, max_seq_length, float(amount(value)))
    small = 32 if frame.active_params < _SMALL else 64
    return _with_width(replace(frame, head_dim=budget.head_dim or small))


def _with_width(frame: _Frame) -> _Frame:
    """The frame with the width whose depth, as many blocks as are paid for, suits it best."""
    given, wanted = frame.budget.hidden_size, frame.budget.num_layers
    if given is not None and (given % frame.head_dim or given % WIDTH_STEP):
        raise ModelError(
            f"budget.hidden_size = {given} is no multiple of {max(frame.head_dim, WIDTH_STEP)}",
            f"choose a multiple of {BLOCK}, or set budget.head_dim",
        )
    found: list[tuple[float, _Frame]] = []
    for hidden in [given] if given else range(BLOCK, _MAX_HIDDEN + 1, BLOCK):
        at = replace(frame, hidden_size=hidden)
        one, two = (frame.measure(_plain(at, layers)) for layers in (1, 2))
        layers = 1 + (frame.target - one) / (two - one)
        if layers < min(_MIN_LAYERS, wanted or _MIN_LAYERS) * (1 - _NEAR):
            if not found:
                raise _too_small(frame, at, 2 * one - two, two)
            break
        off = math.log(layers / wanted) if wanted else math.log(hidden / layers / _ASPECT)
        found.append((abs(off), replace(at, num_layers=float(wanted or layers))))
    return min(found, key=lambda pair: pair[0])[1]


def _too_small(frame: _Frame, at: _Frame, embedding: float, least: float) -> ModelError:
    counted = frame.budget.counted == "all"
    hints = ["raise the budget", "train a smaller tokenizer"]
    if counted and frame.budget.mode == "active_params":
        hints.append("set budget.counted=without_embeddings")
    return ModelError(
        f"a budget of {frame.target:,.0f} {frame.quantity} is too small for {frame.vocab_size:,} "
        f"tokens: at width {at.hidden_size} two blocks take {least:,.0f}, of which the embedding "
        f"and the head {embedding:,.0f}",
        f"{', or '.join([', '.join(hints[:-1]), hints[-1]])}",
    )


def _plain(frame: _Frame, num_layers: int) -> ModelConfig:
    """Full attention and a feed-forward layer 8/3 as wide as the residual stream: 12 hidden_size^2
    parameters a block."""
    width = round(8 * frame.hidden_size / (3 * WIDTH_STEP)) * WIDTH_STEP
    heads = frame.hidden_size // frame.head_dim
    return _config(frame, _MHA, num_layers, heads, width)


# ---------------------------------------------------------------- depth


def _common_depth(frame: _Frame, variants: Mapping[str, VariantSection]) -> dict[str, _Fit]:
    """The best fit of each variant, at the depth nearest to the usual one where all fit.

    Half the tolerance is tried first: then the variants agree with each other too.
    """
    near, far = _depths(frame)
    passes = [(near, 0.5), (near, 1.0), (far, 1.0)]
    closest: tuple[float, str, _Fit | None, int] = (math.inf, "", None, 0)
    for depths, share in passes:
        for layers in depths:
            fits = {name: _named(name, frame, variants[name], layers) for name in variants}
            off, name = max(
                (_off(frame, fit) / frame.tolerance(variants[name]), name)
                for name, fit in fits.items()
            )
            found = {name: fit for name, fit in fits.items() if fit is not None}
            if off <= share:
                return found
            if off < closest[0]:
                closest = (off, name, fits[name], layers)
    raise _nothing_fits(frame, variants, closest)


def _named(name: str, frame: _Frame, variant: VariantSection, num_layers: int) -> _Fit | None:
    try:
        return _at(frame, variant, num_layers)
    except ModelError as error:
        raise ModelError(f"variant {name}: {error.message}", error.hint) from None


def _depths(frame: _Frame) -> tuple[list[int], list[int]]:
    """Numbers of blocks near the usual one, nearest first, and the others worth trying."""
    if frame.budget.num_layers is not None:
        return [frame.budget.num_layers], []
    usual = frame.num_layers
    counts = range(_MIN_LAYERS, math.ceil(2 * usual) + 2)
    ordered = sorted(counts, key=lambda layers: abs(layers - usual))
    near = [layers for layers in ordered if abs(layers / usual - 1) <= _NEAR] or ordered[:1]
    return near, [layers for layers in ordered if layers not in near]


def _off(frame: _Frame, fit: _Fit | None) -> float:
    return math.inf if fit is None else abs(fit.found / frame.target - 1)


def _nothing_fits(
    frame: _Frame,
    variants: Mapping[str, VariantSection],
    closest: tuple[float, str, _Fit | None, int],
) -> ModelError:
    _, name, fit, layers = closest
    budget = f"{frame.target:,.0f} {frame.quantity}"
    if fit is None:
        name = name or next(iter(variants))
        return ModelError(
            f"variant {name}: {budget} leave too little for its feed-forward layer, which would be "
            f"narrower than half of hidden_size = {frame.hidden_size}",
            "raise the budget, lower budget.num_layers, or give fewer experts_per_token",
        )
    allowed = frame.tolerance(variants[name])
    return ModelError(
        f"variant {name}: no dimensions come within {allowed:.2%} of {budget}; the nearest, "
        f"{layers} blocks of width {frame.hidden_size}, has {fit.found:,.0f} "
        f"({fit.found / frame.target - 1:+.2%})",
        f"set budget.tolerance={_rounded_up(abs(fit.found / frame.target - 1))}, or another "
        "budget.num_layers or budget.hidden_size",
    )


def _rounded_up(share: float) -> str:
    return f"{math.ceil(share * 1000) / 1000:g}"


# ---------------------------------------------------------------- heads and widths


def _at(frame: _Frame, variant: VariantSection, num_layers: int) -> _Fit | None:
    """The best fit of a variant where models that spend on nothing have so many blocks."""
    every = attention_every(variant)
    if every is not None and every > num_layers:
        return None
    heads = frame.hidden_size // frame.head_dim
    if not variant.attends or variant.spend in (None, "mlp"):
        return _fit(frame, variant, num_layers, heads)
    plain = variant.model_copy(update={"attention": "mha", "num_kv_heads": None, "spend": None})
    usual = _fit(frame, plain, num_layers, heads)
    if usual is None:
        return None
    tried = [_fit(frame, variant, *sizes) for sizes in _spent(frame, variant, num_layers, heads)]
    fits = [fit for fit in tried if fit is not None and fit.width >= _LIKE_PLAIN * usual.width]
    good = [fit for fit in fits if _off(frame, fit) <= frame.tolerance(variant)]
    if not fits:
        raise ModelError(
            f"what {variant.attention} saves of {heads} heads does not pay for more {variant.spend}",
            "set spend: mlp, or fewer num_kv_heads",
        )
    return min(good or fits, key=lambda fit: abs(fit.width - usual.width))


def _spent(
    frame: _Frame, variant: VariantSection, num_layers: int, heads: int
) -> Iterator[tuple[int, int]]:
    """Depths and query heads above the usual ones."""
    if variant.spend == "layers":
        yield from ((layers, heads) for layers in range(num_layers + 1, 2 * num_layers + 2))
        return
    step = BLOCK // frame.head_dim if frame.hidden_size % BLOCK == 0 else 1
    kv_heads = kv_heads_of(variant, heads)
    for more in range(heads + step, 4 * heads + step, step):
        if more % kv_heads == 0:
            yield num_layers, more


def _fit(frame: _Frame, variant: VariantSection, num_layers: int, heads: int) -> _Fit | None:
    """The widths that come nearest to the target; None where too little is left for them.

    What is measured is linear in each width, so that two models tell all.
    """

    def config(width: int, shared: int) -> ModelConfig:
        return _config(frame, variant, num_layers, heads, width, shared)

    step = WIDTH_STEP
    least = frame.measure(config(step, step))
    per_width = (frame.measure(config(2 * step, step)) - least) / step
    per_shared = (frame.measure(config(step, 2 * step)) - least) / step
    both = step + (frame.target - least) / (per_width + per_shared)
    chosen = (variant.experts_per_token or 2) if variant.num_experts else 1
    if both * (chosen + variant.shared_expert) < frame.hidden_size / 2:
        return None
    width = shared = max(step, round(both / step) * step)
    if per_shared:  # takes what the experts' coarser steps leave
        left = frame.target - least - per_width * (width - step)
        shared = max(step, round((step + left / per_shared) / step) * step)
    made = config(width, shared)
    return _Fit(made, frame.measure(made))


def _config(
    frame: _Frame,
    variant: VariantSection,
    num_layers: int,
    heads: int,
    width: int,
    shared: int = 0,
) -> ModelConfig:
    sizes = Sizes(
        vocab_size=frame.vocab_size,
        max_seq_length=frame.max_seq_length,
        tie_embeddings=frame.budget.tie_embeddings,
        hidden_size=frame.hidden_size,
        head_dim=frame.head_dim,
        num_layers=num_layers,
        num_heads=heads,
        width=width,
        shared_width=shared,
    )
    return variant_config(variant, sizes)
