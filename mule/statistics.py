"""What a few seeds, or the items of an evaluation, can show: intervals, paired differences, limits.

Few seeds need Student's t with exact quantiles; the degrees of freedom here are whole numbers, for
which the distribution has a closed form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95
POWER = 0.8  # with which a detectable difference would be found


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values, and the half width of its confidence interval; None of one value."""

    mean: float
    half_width: float | None
    sd: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width


@dataclass(frozen=True)
class Difference:
    """Second minus first over the seeds that both have, in the unit of the values.

    `p` is two-sided, from a t-test with `df` degrees of freedom; None with fewer than two pairs.
    """

    first: str
    second: str
    seeds: tuple[int, ...]
    interval: Interval | None
    p: float | None
    df: int | None = None


@dataclass(frozen=True)
class Noise:
    """How far paired differences vary by chance: their deviation, and its degrees of freedom."""

    sd: float
    df: int


@dataclass(frozen=True)
class Verdict:
    """A difference among several: its p after Holm's correction, and what could have been seen."""

    difference: Difference
    adjusted_p: float | None
    detectable: float | None  # of the size that the same seeds find with a chance of POWER
    is_beyond_noise: bool


def central_share(t: float, df: int) -> float:
    """P(-t <= T <= t) of Student's t with `df` degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if df > 1 else 0.0))


@functools.cache
def t_quantile(share: float, df: int) -> float:
    """The t with P(-t <= T <= t) = `share`: 2.776 for 95% and 4 degrees of freedom."""
    assert 0 < share < 1 and df >= 1
    return _root(lambda t: central_share(t, df) - share)


def p_value(t: float, df: int) -> float:
    """Two-sided: the chance of a t at least as far from 0 when nothing differs."""
    return max(0.0, 1.0 - central_share(t, df))


def power(shift: float, critical: float, df: int) -> float:
    """P(|T| > critical) when T is noncentral t, its normal part centred at `shift`.

    The integral over the estimated standard deviation, by the midpoint rule.
    """
    scale = math.lgamma(df / 2) - (df / 2) * math.log(df / 2) - math.log(2)
    top = 1 + 12 / math.sqrt(2 * df)
    step = top / _STEPS
    total = 0.0
    for place in range(_STEPS):
        u = (place + 0.5) * step  # the estimate as a share of the true one
        density = math.exp((df - 1) * math.log(u) - df * u * u / 2 - scale)
        total += density * (_normal(shift - critical * u) + _normal(-shift - critical * u))
    return total * step


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Of the mean of independent values; None of none."""
    n = len(values)
    if not n:
        return None
    if n == 1:
        return Interval(values[0], None, None, 1)
    sd = stdev(values)
    return Interval(fmean(values), t_quantile(confidence, n - 1) * sd / math.sqrt(n), sd, n)


def paired_difference(
    first: str,
    second: str,
    values: Mapping[str, Mapping[int, float]],
    noise: Noise | None = None,
) -> Difference:
    """Second minus first, seed by seed; `values` has of each name the value of each seed.

    Their own deviation is the measure of chance, unless the `noise` is known from elsewhere.
    """
    one, two = values.get(first, {}), values.get(second, {})
    seeds = tuple(sorted(one.keys() & two.keys()))
    interval = mean_interval([two[seed] - one[seed] for seed in seeds])
    if interval is None or interval.sd is None:
        return Difference(first, second, seeds, interval, None)
    df = interval.n - 1
    if noise is not None:
        df = noise.df
        half_width = t_quantile(CONFIDENCE, df) * noise.sd / math.sqrt(interval.n)
        interval = Interval(interval.mean, half_width, noise.sd, interval.n)
    assert interval.sd is not None
    if interval.sd == 0:  # all seeds agree to the last bit
        return Difference(first, second, seeds, interval, 0.0 if interval.mean else 1.0, df)
    t = interval.mean / (interval.sd / math.sqrt(interval.n))
    return Difference(first, second, seeds, interval, p_value(t, df), df)


def difference_among(
    first: str, second: str, values: Mapping[str, Mapping[int, float]]
) -> Difference:
    """As `paired_difference`, with what the other names say of chance besides.

    Few seeds say little of it: two degrees of freedom of three. The noise of the others counts for
    as many as `_OTHERS_DF`, so that a name noisier than they are is not taken for a quiet one.
    Source: G. Smyth, Linear models and empirical Bayes methods, 2004, section 4 (the moderated t).
    """
    own = paired_difference(first, second, values)
    others = block_noise({n: v for n, v in values.items() if n not in (first, second)})
    if own.df is None or own.interval is None or own.interval.sd is None or others is None:
        return own
    weight = min(_OTHERS_DF, others.df)
    df = own.df + weight
    variance = (own.df * own.interval.sd**2 + weight * others.sd**2) / df
    return paired_difference(first, second, values, Noise(math.sqrt(variance), df))


def block_noise(values: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """Of the differences between any two names: from what names and seeds leave unexplained in all.

    None where the names have not the same seeds, or there are fewer than two of either.
    Source: G. Box, J. Hunter and W. Hunter, Statistics for Experimenters, 2nd ed., 2005, chapter 4
    (randomized blocks); it takes the noise of all names to be the same.
    """
    seeds = sorted(next(iter(values.values()), {}))
    if len(values) < 2 or len(seeds) < 2 or any(sorted(v) != seeds for v in values.values()):
        return None
    of_seed = {seed: fmean(v[seed] for v in values.values()) for seed in seeds}
    left = 0.0
    for own in values.values():
        gaps = [own[seed] - of_seed[seed] for seed in seeds]
        left += sum((gap - fmean(gaps)) ** 2 for gap in gaps)
    df = (len(values) - 1) * (len(seeds) - 1)
    return Noise(math.sqrt(2 * left / df), df)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted so that the chance of one false alarm among all stays below the level.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


def judge(differences: Sequence[Difference], confidence: float = CONFIDENCE) -> list[Verdict]:
    """Each difference among all of them, corrected together."""
    level = 1 - confidence
    tested = [place for place, difference in enumerate(differences) if difference.p is not None]
    adjusted = dict(zip(tested, holm([differences[place].p or 0.0 for place in tested])))
    return [
        Verdict(
            difference,
            adjusted.get(place),
            _detectable(difference, level / len(tested)) if place in adjusted else None,
            place in adjusted and adjusted[place] < level,
        )
        for place, difference in enumerate(differences)
    ]


def detectable_difference(sd: float, n: int, level: float, df: int | None = None) -> float:
    """The true mean of `n` differences of deviation `sd` that a test at `level` finds with POWER.

    The deviation is known with `df` degrees of freedom, unless told with n - 1.
    """
    return _detectable_shift(df or n - 1, level) * sd / math.sqrt(n)


def pooled_sd(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """The deviation within groups, and its degrees of freedom; None where no group has two."""
    several = [group for group in groups if len(group) > 1]
    df = sum(len(group) - 1 for group in several)
    if not df:
        return None
    return math.sqrt(sum((len(g) - 1) * stdev(g) ** 2 for g in several) / df), df


def wilson_interval(
    successes: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Lower and upper bound of a rate of which `successes` of `trials` were seen.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    assert 0 <= successes <= trials
    if not trials:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(rate * (1 - rate) / trials + weight / (4 * trials))
    # At none and at all one bound is exact; rounding must not pass it.
    low = 0.0 if not successes else middle - half
    return low, 1.0 if successes == trials else middle + half


def binomial_band(trials: int, rate: float, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """The fewest and the most successes that are no surprise at that rate, from the exact tails."""
    tail, low, below = (1 - confidence) / 2, 0, 0.0
    chances = [
        math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(trials + 1)
    ]
    while below + chances[low] <= tail:
        below += chances[low]
        low += 1
    high, above = trials, 0.0
    while above + chances[high] <= tail:
        above += chances[high]
        high -= 1
    return low, high


@dataclass(frozen=True)
class Bootstrapped:
    """A mean over `n` items and the interval in which resampling the items puts it."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Bootstrapped:
    """The percentile interval of a mean over items; of differences, a paired interval.

    With `weights` it is that of sum(values) / sum(weights), as of a loss over tokens.
    Source: B. Efron and R. Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    import numpy as np

    n = len(values)
    assert n > 0
    value = np.asarray(values, np.float64)
    weight = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    rng, means = np.random.default_rng(seed), []
    for rows in _portions(n):
        drawn = rng.integers(n, size=(rows, n))
        means.append(value[drawn].sum(1) / weight[drawn].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail)).tolist()
    return Bootstrapped(float(value.sum() / weight.sum()), low, high, n)


def sign_flip_p(differences: Sequence[float], *, seed: int = 0) -> float:
    """Two-sided: how often random signs of paired differences give a sum as far from 0.

    It holds its level with any number of items, where few of them differ too; an interval from
    resampling does not. Source: E. Edgington and P. Onghena, Randomization Tests, 4th ed., 2007.
    """
    import numpy as np

    size = np.asarray([d for d in differences if d], np.float64)
    n = len(size)
    if not n:
        return 1.0
    least = abs(size.sum()) * (1 - 1e-9)  # the same items in another order sum up otherwise
    if n <= _MOST_EXACT:
        signs = (np.arange(2**n)[:, None] >> np.arange(n) & 1) * 2 - 1
        return float((np.abs(signs @ size) >= least).mean())
    rng, reached = np.random.default_rng(seed), 0
    for rows in _portions(n):
        signs = rng.integers(2, size=(rows, n), dtype=np.int8) * 2 - 1
        reached += int((np.abs(signs @ size) >= least).sum())
    return (1 + reached) / (1 + _RESAMPLES)


# ---------------------------------------------------------------- inside

_RESAMPLES = 4000
_DRAWN_AT_ONCE = 2_000_000  # items
_OTHERS_DF = 2  # more finds little more, and is more often wrong of a noisy name (docs/log.md)
_MOST_EXACT = 12  # differing items: all their signs are tried, 4,096 of them

_STEPS = 600  # of the integral over u: its error is below 1e-5


@functools.cache
def _detectable_shift(df: int, level: float) -> float:
    """In standard errors."""
    critical = t_quantile(1 - level, df)
    return _root(lambda shift: power(shift, critical, df) - POWER)


def _detectable(difference: Difference, level: float) -> float | None:
    interval = difference.interval
    if interval is None or interval.sd is None:
        return None
    return detectable_difference(interval.sd, interval.n, level, difference.df)


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


def _portions(n: int) -> list[int]:
    """The resamples of `n` items in portions that fit into little memory."""
    most = max(1, _DRAWN_AT_ONCE // n)
    return [min(most, _RESAMPLES - start) for start in range(0, _RESAMPLES, most)]


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function that begins below 0 crosses it, on the positive axis."""
    high = 1.0
    while rising(high) < 0:
        high *= 2
    low = 0.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return high
