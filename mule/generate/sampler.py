"""From a model's logits to the next token: the one sampler of every engine, in NumPy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isfinite, isnan
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from mule.errors import ModelError, UserError

if TYPE_CHECKING:
    from mule.generate.request import Request

Row = npt.NDArray[np.float32]  # (V,): one value a token

MAX_TOP_LOGPROBS = 20
_FIRST_PARTS = (1024, 16_384)  # tokens ordered in search of a nucleus before all are; most hold it
_BLOCK = 512  # weights whose sum is looked at before them
_LEAST_TEMPERATURE = 1e-30  # about the least that float32 can divide by without overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Penalties change the logits first; the temperature divides them; top-k, top-p and min-p then
    each exclude tokens by the probabilities this gives. At temperature 0 the best token is taken.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # nucleus; Holtzman et al. 2020
    min_p: float = 0.0  # share of the best token's probability; Nguyen et al. 2024
    repeat_penalty: float = 1.0  # of prompt and answer; Keskar et al. 2019, section 4.1
    presence_penalty: float = 0.0  # once for each token the answer has; OpenAI's
    frequency_penalty: float = 0.0  # for each time the answer has it; OpenAI's
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0.0 <= self.temperature <= 10.0, "between 0 and 10"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "from 0 to below 1"),
            ("repeat_penalty", 0.1 <= self.repeat_penalty <= 10.0, "between 0.1 and 10"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "between -2 and 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "between -2 and 2"),
            ("seed", -(2**63) <= self.seed < 2**64, "a whole number of 64 bits"),
        )
        for name, valid, words in limits:
            if not valid:
                value = getattr(self, name)
                raise UserError(f"{name} is {value}; it must be {words}", f"set {name} {words}")

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the next one's logits."""
        additive = self.presence_penalty != 0.0 or self.frequency_penalty != 0.0
        return additive or self.repeat_penalty != 1.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token; the log-probabilities as in `Token` of mule.generate.request."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What an answer must follow, token by token; see mule.generate.constrain."""

    finished: bool  # the answer is complete and nothing can follow

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens (vocab_size,) may come next."""
        ...

    def accept(self, token: int) -> None:
        """`token`, one of those allowed, was drawn."""
        ...


class RowSampler:
    """Draws the tokens of one request.

    What it draws depends on the request and on its own tokens so far, never on other rows.
    `vocab_size`: of the tokenizer; rows of the model beyond it are never drawn.
    `takes_best`: each token is the best of the model's logits, which an engine finds where they
    lie: it then calls `accept` with the token instead of `draw`.
    """

    def __init__(
        self, request: Request, vocab_size: int, constraint: Constraint | None = None
    ) -> None:
        num_top = request.top_logprobs
        if num_top is not None and not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise UserError(
                f"top_logprobs is {num_top}; it must be between 0 and {MAX_TOP_LOGPROBS}",
                f"ask for at most {MAX_TOP_LOGPROBS}",
            )
        self.sampling, self._num_top = request.sampling, num_top
        self._vocab_size, self._constraint = vocab_size, constraint
        self._random = np.random.default_rng(request.sampling.seed % 2**64)
        self._seen = {token for token in request.ids if token < vocab_size}
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        greedy = self.sampling.temperature == 0.0 and not self.sampling.has_penalties
        self.takes_best = greedy and num_top is None and constraint is None

    @property
    def finished(self) -> bool:
        """Whether the constraint is met and ends the answer with the last token."""
        return self._constraint is not None and self._constraint.finished

    def draw(self, logits: npt.ArrayLike) -> Drawn:
        """The next token for its logits (V,), which stay as they are.

        Raises ModelError when they hold NaN or infinity, or leave no token to draw.
        """
        raw = np.asarray(logits, np.float32)[: self._vocab_size]
        check_best(float(raw.max()))
        scores = self._penalised(raw) if self.sampling.has_penalties else raw
        if self._constraint is not None:
            scores = np.where(self._constraint.allowed(), scores, np.float32(-np.inf))
        token = int(scores.argmax())
        if scores[token] == -np.inf:
            raise ModelError(
                "the model gives every token that the schema allows a probability of zero",
                "check the model with `mule verify`, or ask without the schema",
            )
        if self.sampling.temperature > 0.0:
            token = self._pick(scores, token)
        drawn = Drawn(token) if self._num_top is None else _measured(raw, token, self._num_top)
        self.accept(token)
        return drawn

    def accept(self, token: int, logit: float = 0.0) -> None:
        """Count a token as drawn; `logit` is its own, for one that was found as the best.

        Raises ModelError when that is no number.
        """
        check_best(logit)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._seen.add(token)
        self._counts[token] += 1

    def _penalised(self, raw: Row) -> Row:
        s, scores = self.sampling, raw.copy()
        if s.repeat_penalty != 1.0:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            old = scores[seen]
            scores[seen] = np.where(old > 0, old / s.repeat_penalty, old * s.repeat_penalty)
        if self._counts:
            tokens, counts = np.array(list(self._counts.items())).T
            scores[tokens] -= s.presence_penalty + s.frequency_penalty * counts
        return scores

    def _pick(self, scores: Row, best: int) -> int:
        """One token by its probability, of those that top-k, top-p and min-p leave."""
        s = self.sampling
        with np.errstate(over="ignore"):  # to -inf: a probability of zero
            steps = (scores - scores[best]) / max(s.temperature, _LEAST_TEMPERATURE)
        weights = np.exp(steps)  # the best token's is 1
        num_kept = s.top_k or len(weights)
        if s.min_p > 0.0:
            num_kept = min(num_kept, int(np.count_nonzero(weights >= s.min_p)))
        if s.top_p < 1.0:
            num_kept = nucleus_size(weights, s.top_p, at_most=num_kept)
        number = self._random.random()  # one a token, whatever is kept
        if num_kept == 1:
            return best
        if num_kept >= len(weights):
            return _at_share(weights, number)
        kept = best_places(scores, num_kept)
        return int(kept[_at_share(weights[kept], number)])


def log_total(raw: Row) -> float:
    """The logarithm of the sum of exp(logits): less it, a logit is a log-probability."""
    best = raw.max()
    return float(best) + float(np.log(np.exp(raw - best).sum(dtype=np.float64)))


def check_best(logit: float) -> None:
    """Raise ModelError unless the largest logit of a row (NaN if any is) is a number."""
    if isfinite(logit):
        return
    what = "NaN" if isnan(logit) else "infinity" if logit > 0 else "minus infinity for every token"
    raise ModelError(
        f"the model gave {what} instead of logits",
        "its weights are damaged or overflow in this precision: try fp32, and `mule verify`",
    )


def nucleus_size(weights: Row, share: float, *, at_most: int | None = None) -> int:
    """How many of the largest weights it takes for `share` of their sum, at least one."""
    target = share * float(weights.sum(dtype=np.float64))
    most = min(at_most or len(weights), len(weights))
    for size in (*(part for part in _FIRST_PARTS if part < most), most):
        start = len(weights) - size
        largest = np.sort(np.partition(weights, start)[start:] if start else weights)[::-1]
        mass = _running_sum(largest)
        if mass[-1] >= target:
            return int(np.searchsorted(mass, target)) + 1
    return most  # all that may be kept hold less, or sums differ by rounding


def best_places(scores: Row, count: int) -> npt.NDArray[np.int64]:
    """The places of the `count` largest, in no promised order; of equals the first are taken."""
    start = len(scores) - count
    if start <= 0:
        return np.arange(len(scores))
    least = np.partition(scores, start)[start]
    above = np.flatnonzero(scores > least)
    equal = np.flatnonzero(scores == least)[: count - len(above)]
    return np.concatenate((above, equal))


def _at_share(weights: Row, number: float) -> int:
    """The place where `number` in [0, 1) falls when the weights are laid end to end.

    Blocks are summed first, and only one is looked into: a whole vocabulary takes 1/10 of the time.
    """
    starts = np.arange(0, len(weights), _BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = number * blocks[-1]
    block = _first_above(blocks, target)
    inside = weights[starts[block] : starts[block] + _BLOCK]
    before = blocks[block - 1] if block else 0.0
    return int(starts[block]) + _first_above(_running_sum(inside), target - before)


def _first_above(mass: npt.NDArray[np.float64], target: float) -> int:
    """The first place of a running sum above `target`; the last that adds to it if none is."""
    place = int(np.searchsorted(mass, target, side="right"))
    return place if place < len(mass) else int(np.searchsorted(mass, mass[-1]))


def _running_sum(weights: Row) -> npt.NDArray[np.float64]:
    return np.cumsum(weights.astype(np.float64))  # cumsum(dtype=...) takes four times as long


def _measured(raw: Row, token: int, num_top: int) -> Drawn:
    """The token with the model's log-probabilities: its own and the `num_top` best."""
    total = log_total(raw)
    places = np.sort(best_places(raw, num_top)) if num_top else np.empty(0, np.int64)
    places = places[np.argsort(-raw[places], kind="stable")]
    top = tuple((int(place), float(raw[place]) - total) for place in places)
    return Drawn(token, float(raw[token]) - total, top)
