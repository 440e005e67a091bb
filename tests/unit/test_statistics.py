"""Intervals, paired tests and their limits, against published tables and against simulation."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev
from typing import Any

import pytest

from mule.lab.findings import tell
from mule.statistics import (
    block_noise,
    bootstrap_interval,
    central_share,
    detectable_difference,
    difference_among,
    holm,
    judge,
    mean_interval,
    p_value,
    paired_difference,
    pooled_sd,
    power,
    sign_flip_p,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("df", "two_sided_95", "two_sided_99"),
    [  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
        (1, 12.706, 63.657),
        (2, 4.303, 9.925),
        (3, 3.182, 5.841),
        (4, 2.776, 4.604),
        (5, 2.571, 4.032),
        (9, 2.262, 3.250),
        (30, 2.042, 2.750),
        (100, 1.984, 2.626),
    ],
)
def test_quantiles_are_those_of_the_table(
    df: int, two_sided_95: float, two_sided_99: float
) -> None:
    assert t_quantile(0.95, df) == pytest.approx(two_sided_95, abs=6e-4)
    assert t_quantile(0.99, df) == pytest.approx(two_sided_99, abs=6e-4)
    assert p_value(two_sided_95, df) == pytest.approx(0.05, abs=1e-4)


def test_the_closed_form_is_the_integral_of_the_density() -> None:
    for df in (1, 2, 3, 6, 7):
        scale = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
        steps = 4000
        width = 2 * 1.7 / steps
        places = (-1.7 + (place + 0.5) * width for place in range(steps))
        area = width * sum(scale * (1 + t * t / df) ** (-(df + 1) / 2) for t in places)
        assert central_share(1.7, df) == pytest.approx(area, abs=1e-6)


def test_the_interval_of_a_known_sample() -> None:
    interval = mean_interval([4.0, 5.0, 9.0])
    assert interval is not None
    assert (interval.mean, interval.sd, interval.n) == (6.0, pytest.approx(math.sqrt(7)), 3)
    assert interval.half_width == pytest.approx(4.3027 * math.sqrt(7 / 3), abs=1e-3)
    alone = mean_interval([4.0])
    assert alone is not None
    assert (alone.mean, alone.half_width) == (4.0, None)
    assert mean_interval([]) is None


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_covers_as_often_as_it_says(n: int) -> None:
    rng, hits, tries = random.Random(n), 0, 3000
    for _ in range(tries):
        interval = mean_interval([rng.gauss(2.5, 0.3) for _ in range(n)])
        assert interval is not None
        assert interval.half_width is not None
        hits += abs(interval.mean - 2.5) <= interval.half_width
    assert hits / tries >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / tries)
    assert hits / tries <= 0.95 + 3 * math.sqrt(0.95 * 0.05 / tries)  # nor wider than needed


def test_a_paired_difference_takes_out_what_a_seed_does_to_both() -> None:
    losses = {"a": {0: 4.0, 1: 5.0, 2: 6.0, 7: 1.0}, "b": {0: 3.9, 1: 4.91, 2: 5.89, 8: 1.0}}
    found = paired_difference("a", "b", losses)
    assert found.seeds == (0, 1, 2)
    assert found.interval is not None
    assert found.interval.mean == pytest.approx(-0.1)
    assert found.interval.sd == pytest.approx(0.01)
    assert found.p == pytest.approx(p_value(0.1 / (0.01 / math.sqrt(3)), 2))


def test_no_pair_or_one_pair_gives_no_p() -> None:
    assert paired_difference("a", "b", {"a": {0: 4.0}, "b": {1: 4.0}}).interval is None
    one = paired_difference("a", "b", {"a": {0: 4.0}, "b": {0: 4.1}})
    assert one.p is None
    (verdict,) = judge([one])
    assert not verdict.is_beyond_noise
    assert "in one seed" in tell(verdict)


def test_differences_that_are_all_the_same_are_certain() -> None:
    same = paired_difference("a", "b", {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.5, 1: 2.5}})
    none = paired_difference("a", "b", {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}})
    assert (same.p, none.p) == (0.0, 1.0)


def test_holm_of_a_worked_example() -> None:
    # 0.01 * 4, 0.013 * 3 raised to the one before, 0.014 * 2, 0.6.
    assert holm([0.01, 0.6, 0.013, 0.014]) == pytest.approx([0.04, 0.6, 0.04, 0.04])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_power_is_the_level_without_a_difference_and_as_simulated_with_one() -> None:
    assert power(0.0, t_quantile(0.95, 4), 4) == pytest.approx(0.05, abs=1e-4)
    rng, found, tries = random.Random(3), 0, 20_000
    for _ in range(tries):
        spread = math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(4)) / 4)
        found += abs(rng.gauss(3.0, 1)) > 2.776 * spread
    assert power(3.0, 2.776, 4) == pytest.approx(found / tries, abs=0.012)


@pytest.mark.parametrize(("n", "shown"), [(3, 3.26), (5, 1.68), (10, 0.996), (20, 0.66)])
def test_the_detectable_difference_is_that_of_power_tables(n: int, shown: float) -> None:
    # Paired t-test, two-sided 5%, power 80%: effect size d_z.
    assert detectable_difference(1.0, n, 0.05) == pytest.approx(shown, abs=0.01)


def test_a_detectable_difference_is_found_as_often_as_promised() -> None:
    rng, found, tries = random.Random(4), 0, 3000
    shift = detectable_difference(0.01, 4, 0.05)
    for _ in range(tries):
        values = {"a": {}, "b": {}}
        for seed in range(4):
            values["a"][seed] = 0.0
            values["b"][seed] = rng.gauss(shift, 0.01)
        p = paired_difference("a", "b", values).p
        found += p is not None and p < 0.05
    assert found / tries == pytest.approx(0.8, abs=0.03)


def test_one_false_alarm_in_a_family_is_as_rare_as_promised() -> None:
    rng, alarms, tries = random.Random(5), 0, 600
    for _ in range(tries):
        values = {name: {s: rng.gauss(4, 0.01) for s in range(3)} for name in "abcdef"}
        pairs = [paired_difference(a, b, values) for a, b in ("ab", "bc", "cd", "ae", "ef")]
        alarms += any(v.is_beyond_noise for v in judge(pairs))
    assert alarms / tries <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)


_FAMILY = [("a", "b"), ("b", "c"), ("b", "d"), ("d", "e"), ("a", "f"), ("f", "g")]


def _losses(rng: random.Random, *, of_f: float = 0.01, shift_of_g: float = 0.0) -> Any:
    seeds = {seed: rng.gauss(0, 0.1) for seed in range(3)}  # moves all alike
    deviations = dict.fromkeys("abcdeg", 0.01) | {"f": of_f}
    values = {n: {s: e + rng.gauss(4, d) for s, e in seeds.items()} for n, d in deviations.items()}
    values["g"] = {seed: loss + shift_of_g for seed, loss in values["g"].items()}
    return values


def _among_all(values: Any) -> list[Any]:
    return [difference_among(first, second, values) for first, second in _FAMILY]


@pytest.mark.parametrize("of_f", [0.01, 0.02, 0.05, 0.1])
def test_the_noise_of_others_gives_no_more_false_alarms(of_f: float) -> None:
    """Also where the losses of one name vary more than those of the others."""
    rng, alarms, tries = random.Random(6), 0, 600
    for _ in range(tries):
        judged = judge(_among_all(_losses(rng, of_f=of_f)))
        alarms += any(verdict.is_beyond_noise for verdict in judged)
    assert alarms / tries <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)


def test_the_noise_of_others_finds_what_three_seeds_alone_do_not() -> None:
    rng, shared, alone = random.Random(7), 0, 0
    for _ in range(200):
        values = _losses(rng, shift_of_g=-0.06)
        shared += judge(_among_all(values))[-1].is_beyond_noise
        each = [paired_difference(*pair, values) for pair in _FAMILY]
        alone += judge(each)[-1].is_beyond_noise
    assert shared > 140 and alone < 80


def test_the_noise_of_blocks_is_what_names_and_seeds_leave() -> None:
    # Residuals of a worked table: means of names 1, 2, 3, of seeds -0.1 and 0.1 beside them.
    losses = {"a": {0: 0.9, 1: 1.1}, "b": {0: 1.8, 1: 2.2}, "c": {0: 3.0, 1: 3.0}}
    noise = block_noise(losses)
    assert noise is not None and noise.df == 2
    assert noise.sd == pytest.approx(math.sqrt(2 * (4 * 0.1**2) / 2))
    assert block_noise({"a": {0: 1.0, 1: 2.0}}) is None
    assert block_noise({"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0}}) is None
    two = {name: losses[name] for name in "ab"}  # the paired test itself
    own, found = paired_difference("a", "b", two), block_noise(two)
    assert found is not None and own.interval is not None and (own.df, found.df) == (1, 1)
    assert found.sd == pytest.approx(own.interval.sd)


def test_the_pooled_deviation_weighs_by_degrees_of_freedom() -> None:
    assert pooled_sd([[1.0], [2.0]]) is None
    pooled = pooled_sd([[1.0, 3.0], [0.0, 0.0, 3.0], [9.0]])
    assert pooled is not None
    assert pooled == (pytest.approx(math.sqrt((2 + 6) / 3)), 3)


@pytest.mark.parametrize(
    ("seen", "of", "low", "high"),
    [  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_of_a_rate_is_that_of_the_table(
    seen: int, of: int, low: float, high: float
) -> None:
    assert wilson_interval(seen, of) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(of - seen, of) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_interval_of_a_rate_stays_within_what_is_possible() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0
    assert wilson_interval(3, 7, 0.99)[0] < wilson_interval(3, 7)[0]


def test_resampling_gives_the_interval_of_the_normal_law() -> None:
    rng = random.Random(6)
    values = [rng.gauss(0.3, 1) for _ in range(400)]
    found = bootstrap_interval(values)
    half = 1.96 * stdev(values) / math.sqrt(400)
    assert found.mean == pytest.approx(fmean(values))
    assert (found.low, found.high) == pytest.approx(
        (found.mean - half, found.mean + half), abs=0.01
    )
    assert bootstrap_interval(values) == found  # seeded
    assert bootstrap_interval(values, seed=1) != found
    assert bootstrap_interval(values, confidence=0.5).high < found.high


def test_weights_make_it_a_mean_over_tokens() -> None:
    found = bootstrap_interval([6.0, 1.0], [3, 1])
    assert (found.mean, found.low, found.high, found.n) == (7 / 4, 1.0, 2.0, 2)
    rng = random.Random(7)
    counts = [rng.randint(1, 90) for _ in range(300)]
    sums = [count * rng.gauss(2.0, 0.2) for count in counts]
    assert bootstrap_interval(sums, counts).mean == pytest.approx(sum(sums) / sum(counts))


def test_many_items_are_resampled_in_portions() -> None:
    found = bootstrap_interval([0.0, 1.0] * 1000)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.0219, 0.5 + 0.0219), abs=0.002)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0.0] * 9, 1.0),
        ([1.0, -1.0] * 5, 1.0),
        ([1.0] * 5 + [0.0] * 95, 2 / 2**5),  # five of a hundred, all one way: not measurable
        ([-1.0] * 6, 2 / 2**6),
        ([1.0] * 9 + [-1.0] * 3, 2 * sum(math.comb(12, k) for k in range(4)) / 2**12),
    ],
)
def test_random_signs_give_the_exact_chance(differences: list[float], p: float) -> None:
    # Of equal sizes it is the sign test, whose chance is binomial.
    assert sign_flip_p(differences) == pytest.approx(p)


def test_many_signs_are_drawn() -> None:
    apart = [1.0] * 17 + [-1.0] * 7
    exact = 2 * sum(math.comb(24, k) for k in range(8)) / 2**24
    assert sign_flip_p(apart) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(apart) == sign_flip_p(apart) != sign_flip_p(apart, seed=1)


@pytest.mark.parametrize("share_apart", [0.04, 0.5])
def test_equal_models_are_told_apart_as_rarely_as_promised(share_apart: float) -> None:
    # Items on which two equal models differ, by chance one way or the other: few of them, and many.
    rng, alarms, tries = random.Random(8), 0, 200
    for _ in range(tries):
        apart = [rng.choice((-1.0, 1.0)) * (rng.random() < share_apart) for _ in range(100)]
        alarms += sign_flip_p(apart) < 0.05
    assert alarms / tries <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tries)
