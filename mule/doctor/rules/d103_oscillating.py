"""The loss swings or spikes.

What it sees: after the warm-up, (a) at least three swings up and down between averages over a 24th
of the run, each beyond 6 standard errors of such an average and 4% of the loss, that have not
ended; or (b) single updates far outside: above the level around them by 8 times the noise of
neighbours, in 2% of the updates and four at least; or (c) a noise that has grown to more than three
times what it was before.
Why it matters: batches drawn from shuffled rows differ by chance only, which averages out. Swings
that do not average out come from steps that overshoot, rows that are not shuffled, or broken rows.
What to do: lower optim.learning_rate to a half; for spikes look at the rows of the updates named in
the evidence, or lower optim.max_spike so that such updates are refused.
Source: Goodfellow, Bengio and Courville, Deep Learning, section 11.4 on oscillation and the
learning rate; Takase et al. 2023 (arXiv 2312.16903) on spikes.
"""

from __future__ import annotations

from mule.doctor import signals
from mule.doctor.finding import Found, Rule
from mule.doctor.history import History, Series
from mule.doctor.phases import after_warmup, block_error, lower_rate
from mule.message import Message

_FEWEST_UPDATES = 48
_SWING_ERRORS, _LEAST_SWING, _FEWEST_SWINGS = 6.0, 0.04, 3
_SPIKE_NOISES, _SPIKE_SHARE, _FEWEST_SPIKES = 8.0, 0.02, 4
_GROWN, _FEWEST_IN_A_QUARTER = 3.0, 24
_RECENT = 0.6  # of the run: swings that ended before are over
_AROUND = 4  # neighbours on each side of an update


def _check(history: History) -> Found | None:
    loss = after_warmup(history)
    if len(loss) < _FEWEST_UPDATES:
        return None
    return _swings(history, loss) or _spikes(history, loss) or _noise_grown(history, loss)


def _swings(history: History, loss: Series) -> Found | None:
    points = signals.thinned(loss)
    least = max(
        _SWING_ERRORS * block_error(loss, len(points)), _LEAST_SWING * signals.median(loss.values)
    )
    turns = _turns(points, least)
    if len(turns) < _FEWEST_SWINGS or turns[-1][0] < _RECENT * history.step:
        return None
    values = [value for _, value in turns]
    return Found(
        "warning",
        turns[0][0],
        Message(
            "the loss swings: {} times up or down by more than {:.3f} since update "
            "{}, between {:.3f} and {:.3f}",
            len(turns),
            least,
            turns[0][0],
            min(values),
            max(values),
        ),
        lower_rate(history, 2),
        {"turns": turns[:20]},
    )


def _turns(points: Series, least: float) -> list[tuple[int, float]]:
    """The first rise beyond `least`, and each turn after it: swings below `least` do not count."""
    turns: list[tuple[int, float]] = []
    low = high = points.values[0]
    rising = False
    for step, value in zip(points.steps, points.values):
        if rising:
            high = max(high, value)
            if high - value > least:
                turns.append((step, value))
                rising, low = False, value
        else:
            low = min(low, value)
            if value - low > least:
                turns.append((step, value))
                rising, high = True, value
    return turns


def _spikes(history: History, loss: Series) -> Found | None:
    noise, found = signals.noise(loss.values), []
    for place in range(_AROUND, len(loss) - _AROUND):
        around = [
            *loss.values[place - _AROUND : place],
            *loss.values[place + 1 : place + 1 + _AROUND],
        ]
        level = signals.median(around)
        if loss.values[place] <= level + _SPIKE_NOISES * noise:
            continue
        near = loss.values[max(0, place - 4 * _AROUND) : place + 4 * _AROUND]
        if loss.values[place] > level + _SPIKE_NOISES * signals.noise(near):
            found.append((loss.steps[place], loss.values[place]))
    if len(found) < max(_FEWEST_SPIKES, _SPIKE_SHARE * len(loss)):
        return None
    return Found(
        "warning",
        found[0][0],
        Message(
            "the loss spikes: {} of {} updates lie more than {:g} times "
            "the usual noise ({:.3f}) above their neighbours, the first {:.3f} at update "
            "{}",
            len(found),
            len(loss),
            _SPIKE_NOISES,
            noise,
            found[0][1],
            found[0][0],
        ),
        Message(
            "read the rows of update {}; {} if they are sound", found[0][0], lower_rate(history, 2)
        ),
        {"spikes": found[:20]},
    )


def _noise_grown(history: History, loss: Series) -> Found | None:
    *before, last = signals.parts(loss, 4)
    if len(last) < _FEWEST_IN_A_QUARTER:
        return None
    usual = signals.noise([value for part in before for value in part.values])
    now = signals.noise(last.values)
    if now < _GROWN * usual:
        return None
    return Found(
        "warning",
        last.steps[0],
        Message(
            "the loss jumps from update to update by {:.3f}, {:.1f} times as much as before",
            now,
            now / max(usual, 1e-9),
        ),
        lower_rate(history, 2),
        {"noise": now, "noise_before": usual},
    )


RULE = Rule("D103", "loss oscillating", _check)
