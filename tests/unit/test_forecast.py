"""Forecasts of curves whose end is known: losses, when to stop, twice as much, what cannot be told."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from mule.plan.forecast import Forecast, chance_of, forecast
from mule.plan.forecast_curve import Curve
from mule.plan.forecast_errors import END, Errors, Table, known, quantile, read_table
from mule.plan.outlook import Outlook
from mule.statistics import binomial_band
from tests.forecast_curves import TABLE, course, curve, true_loss

RUN = course()
WHOLE = curve(RUN)


def told(found: Forecast, figure: str, step: int = RUN.num_steps) -> tuple[float, float, float]:
    (one,) = (e for e in found.estimates if e.figure == figure and e.step == step)
    return one.low, one.expected, one.high


@pytest.fixture(scope="module")
def half() -> Forecast:
    return forecast(WHOLE.until(200), at=[300, 400], table=TABLE)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_the_end_is_foreseen_nearer_than_by_the_last_value(share: float) -> None:
    early = WHOLE.until(round(share * RUN.num_steps))
    found = forecast(early, table=TABLE)
    last, end = early.valid[-1][1], WHOLE.valid[-1][1]
    low, expected, high = told(found, "val_loss")
    assert abs(expected - end) < 0.4 * abs(last - end)
    assert low < expected < high


def test_milestones_lie_between_now_and_the_end(half: Forecast) -> None:
    at_300 = told(half, "val_loss", 300)
    assert abs(at_300[1] - (true_loss(RUN, 300) + 0.1)) < 0.05
    assert told(half, "val_loss")[1] < at_300[1] < WHOLE.until(200).valid[-1][1]
    assert at_300[2] - at_300[0] < told(half, "val_loss")[2] - told(half, "val_loss")[0]
    assert {e.step for e in half.estimates if e.figure == "loss"} == {300, 400}


def test_a_curve_that_falls_to_the_end_goes_on(half: Forecast) -> None:
    assert half.stop is not None and half.stop.verdict == "go on"
    assert half.stop.why == "the validation loss is expected to fall to the end"


def test_the_annealing_that_is_still_to_come_is_foreseen() -> None:
    """wsd stays flat until four fifths: what its fall brings is not in the curve yet."""
    run = course(schedule="wsd")
    whole = curve(run)
    _, expected, _ = told(forecast(whole.until(300), table=TABLE), "val_loss")
    flat = course(schedule="constant")
    assert whole.valid[-1][1] - 0.1 < expected < true_loss(flat, 400) + 0.1 - 0.03


def test_a_noisy_and_a_resumed_curve() -> None:
    """Updates that were refused or lost are missing from the rows."""
    noisy = curve(RUN, noise=0.4)
    holes = replace(noisy, losses=[point for point in noisy.losses if point[0] % 37 > 3])
    for one in (noisy, holes):
        _, expected, _ = told(forecast(one.until(200), table=TABLE), "val_loss")
        assert abs(expected - noisy.valid[-1][1]) < 0.08


def test_a_loss_that_does_not_move_stays() -> None:
    still = Curve(
        "new model", RUN, [(s, 3.0) for s in range(1, 201)], [(s, 3.1) for s in (100, 200)]
    )
    low, expected, high = told(forecast(still, table=TABLE), "val_loss")
    assert expected == pytest.approx(3.1, abs=0.1) and low < expected < high


# ---------------------------------------------------------------- when to stop


def test_a_rise_is_seen_when_it_is_there() -> None:
    run = course(300, epochs=6)
    whole = curve(run, kind="fine-tune", overfit=0.05, power=2.0)
    best = whole.best_valid()
    assert best is not None and best[0] < 250
    found = forecast(whole, table=TABLE)
    assert found.stop is not None and found.stop.verdict == "rising"
    assert found.stop.step == best[0]
    assert found.stop.why.startswith(f"the validation loss was lowest after update {best[0]:,} (")
    assert "evaluate.patience=2 ends such a run by itself" in found.stop.why


def test_a_rise_is_foreseen_once_the_curve_bends() -> None:
    run = course(300, epochs=6, schedule="constant")
    whole = curve(run, kind="fine-tune", overfit=0.05, power=2.0)
    best = whole.best_valid()
    assert best is not None
    found = forecast(whole.until(best[0]), table=TABLE)
    assert found.stop is not None and found.stop.verdict in ("will rise", "rising")
    assert abs(found.stop.step - best[0]) < 60
    if found.stop.verdict == "will rise":
        assert "evaluate.patience=2 ends the run in time" in found.stop.why


def test_a_curve_that_has_learned_all_levels_off() -> None:
    run = course(400, schedule="constant")
    flat = Curve(
        "new model",
        run,
        [(s, 2.0 + 3.0 * 2.0 ** (-s / 10)) for s in range(1, 201)],
        [(s, 2.1 + 3.0 * 2.0 ** (-s / 10)) for s in range(20, 201, 20)],
    )
    found = forecast(flat, table=TABLE)
    assert found.stop is not None and found.stop.verdict == "levels off"
    assert "less than 0.1% of the validation loss is left to gain" in found.stop.why


# ---------------------------------------------------------------- twice as much


def test_twice_the_updates_of_a_single_pass(half: Forecast) -> None:
    (twice,) = half.twice
    truth = true_loss(course(800), 800) + 0.1
    assert twice.figure == "twice the updates"
    assert abs(twice.expected - truth) < 0.1
    assert twice.high - twice.low > told(half, "val_loss")[2] - told(half, "val_loss")[0]
    assert half.cannot == [
        (
            "twice the data",
            "no change: the run reads its data 0.50 times, so that more of it alone would stay unread",
        )
    ]


def test_twice_the_data_helps_where_it_is_repeated() -> None:
    run = course(300, epochs=6)
    found = forecast(curve(run, kind="fine-tune", overfit=0.05, power=2.0), table=TABLE)
    by_name = {e.figure: e.expected for e in found.twice}
    assert set(by_name) == {"twice the updates", "twice the data", "twice the data and the updates"}
    assert by_name["twice the data"] < by_name["twice the updates"]


def test_twice_as_much_cannot_be_told_in_the_first_half() -> None:
    found = forecast(WHOLE.until(120), table=TABLE)
    assert not found.twice
    assert (
        "twice the updates",
        "cannot be told: half of the run and two evaluations are needed",
    ) in (found.cannot)


# ---------------------------------------------------------------- what cannot be told


def test_a_young_run_is_not_guessed_at() -> None:
    found = forecast(WHOLE.until(30), goal=2.0, table=TABLE)
    assert not found.estimates and found.goal is None
    assert found.cannot == [
        (
            "the losses",
            "cannot be told: the run is too young: update 30 of 400; forecasts begin at update 60 (15% "
            "of the run, and 15 updates after the warm-up)",
        )
    ]


def test_a_run_that_is_too_short_for_a_forecast() -> None:
    short = curve(course(30))
    assert forecast(short.until(28), table=TABLE).cannot == [
        (
            "the losses",
            "cannot be told: the run is too short: 30 updates, of which a forecast needs the first 35",
        )
    ]


def test_few_losses_and_few_evaluations() -> None:
    sparse = replace(WHOLE, losses=WHOLE.losses[::30])
    assert forecast(sparse, table=TABLE).cannot == [
        ("the losses", "cannot be told: only 14 losses were logged; 15 are needed")
    ]
    blind = forecast(replace(WHOLE.until(200), valid=[]), table=TABLE)
    assert {e.figure for e in blind.estimates} == {"loss"}
    assert blind.cannot[0] == (
        "the validation loss",
        "cannot be told: nothing was validated so far (data.valid, evaluate.every_steps)",
    )
    once = forecast(replace(WHOLE.until(200), valid=WHOLE.valid[9:10]), table=TABLE)
    assert once.cannot[0][1] == (
        "cannot be told: 1 evaluations since the warm-up are too few, two are needed; a lower "
        "evaluate.every_steps brings them sooner"
    )


def test_what_was_never_tried_is_not_told() -> None:
    loss_alone = Table({key: own for key, own in TABLE.cells.items() if key[1] == "loss"})
    found = forecast(WHOLE.until(200), table=loss_alone)
    assert {e.figure for e in found.estimates} == {"loss"}
    assert {what for what, _ in found.cannot} == {
        *("the validation loss", "twice the updates", "twice the data")
    }
    assert found.cannot[0] == (
        "the validation loss",
        "cannot be told: how far off such a forecast is at this share of a run was not measured",
    )


def test_a_run_that_diverges_is_the_doctors() -> None:
    rising = replace(
        WHOLE, losses=[(s, loss + 0.01 * max(0, s - 100)) for s, loss in WHOLE.losses[:200]]
    )
    ((what, why),) = forecast(rising, table=TABLE).cannot
    assert what == "the losses"
    assert "the training loss has risen from" in why and "`mule doctor` looks for the cause" in why


# ---------------------------------------------------------------- the goal


def test_the_chance_of_a_goal() -> None:
    early, end = WHOLE.until(200), WHOLE.valid[-1][1]
    easy, hard = chance_of(early, end + 0.05, TABLE), chance_of(early, end - 0.5, TABLE)
    assert easy is not None and hard is not None
    assert easy.probability > 0.6 and easy.step is not None and 200 < easy.step <= 400
    assert hard.probability < 0.1 and hard.step is None
    reached = chance_of(early, early.valid[3][1], TABLE)
    assert reached is not None and (reached.probability, reached.step) == (1.0, early.valid[3][0])
    over = chance_of(WHOLE, 0.1, TABLE)
    assert over is not None and (over.probability, over.step) == (0.0, None)


# ---------------------------------------------------------------- the intervals


def test_the_interval_covers_runs_like_those_it_was_learned_from() -> None:
    """A/A: errors of one half of such curves, and the coverage of the other half."""
    draw = random.Random(4)
    errors = []
    for seed in range(60):
        law = {"floor": draw.uniform(1, 4), "power": draw.uniform(2, 10)}
        schedule = draw.choice(["cosine", "linear", "wsd"])
        run = course(240, schedule=schedule, learning_rate=0.001)
        whole = curve(run, noise=draw.uniform(0.01, 0.1), seed=seed, **law)
        point = Outlook.of(whole.until(120)).point("val_loss", 240)
        assert point is not None
        errors.append((whole.valid[-1][1] - point.predicted) / point.scale)
    learned = Table.learned((("new model", "val_loss", 0.5, END), error) for error in errors[:40])
    interval = learned.errors("new model", "val_loss", 0.5, 1.0)
    assert interval is not None
    inside = sum(interval.at(0.1) <= error <= interval.at(0.9) for error in errors[40:])
    low, high = binomial_band(20, 0.8, 0.99)
    assert low <= inside <= high


def test_quantiles_and_what_lies_between_them() -> None:
    values = [float(i) for i in range(1, 20)]  # 19: every twentieth lies at one of them
    assert quantile(values, 0.1) == 2.0 and quantile(values, 0.5) == 10.0
    assert quantile(values, 0.0) == 1.0 and quantile(values, 1.0) == 19.0
    errors = Errors.of(values)
    assert errors.share_below(10.0) == 0.5 and errors.share_below(-5.0) == 0.05
    assert errors.share_below(99.0) == 0.95
    assert 0.25 < errors.share_below(7.0) < 0.5


def test_a_table_is_read_as_it_was_written() -> None:
    rows = TABLE.as_rows()
    assert read_table(rows) == TABLE
    few = Table.learned((("fine-tune", "loss", 0.5, END), float(i)) for i in range(5))
    assert not few.cells  # too few to say anything


def test_before_the_first_share_that_was_tried_nothing_is_known() -> None:
    assert TABLE.errors("new model", "val_loss", 0.05, 1.0) is None
    assert TABLE.errors("new model", "val_loss", 0.33, 0.7) is not None


def test_mule_comes_with_measured_errors() -> None:
    for kind in ("new model", "fine-tune"):
        for figure in ("loss", "val_loss", "best_val_loss"):
            found = known().errors(kind, figure, 0.5, 1.0)
            assert found is not None and found.num_runs >= 15
            assert list(found.quantiles) == sorted(found.quantiles)


@pytest.mark.parametrize(("trials", "band"), [(60, (42, 54)), (0, (0, 0)), (5, (2, 5))])
def test_a_binomial_band(trials: int, band: tuple[int, int]) -> None:
    """60 at 0.8: 95% of 48 +- 1.96 * 3.1, by the exact tails."""
    assert binomial_band(trials, 0.8) == band
