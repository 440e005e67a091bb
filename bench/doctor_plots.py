"""Pictures for docs/is-my-run-healthy.md: a figure of a faulty run beside that of a healthy one.

The runs are those of the development part; both panels have the same scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bench import doctor_figures
from bench.doctor_cases import Case, cases
from bench.doctor_faults import FAULTS
from bench.doctor_svg import Line, Panel, drawing
from mule import fsio
from mule.doctor import signals
from mule.doctor.history import History, Series, read_history

_POINTS = 100  # of a line: as many as are seen
_HEALTHY, _FAULTY, _VALID = "#1f6fb4", "#d1495b", "#4a4a4a"


@dataclass(frozen=True)
class Picture:
    """What is shown of a fault: a figure of the rows by its name, or one that is worked out."""

    fault: str
    label: str
    figure: str | Callable[[History], Series] = "loss"
    logarithmic: bool = False
    validation: bool = False
    file: str = ""

    @property
    def name(self) -> str:
        return f"{self.file or self.fault}.svg"


def _busiest_share(history: History) -> Series:
    """The share of the tokens that the busiest expert of any block takes."""
    steps, shares = [], []
    for row in history.rows:
        if moe := row.get("moe"):
            steps.append(row["step"])
            shares.append(max(max(layer) / sum(layer) for layer in moe["tokens_per_expert"]))
    return Series(steps, shares)


def _idlest_share(history: History) -> Series:
    """The same of the expert that gets the fewest."""
    steps, shares = [], []
    for row in history.rows:
        if moe := row.get("moe"):
            steps.append(row["step"])
            shares.append(min(min(layer) / sum(layer) for layer in moe["tokens_per_expert"]))
    return Series(steps, shares)


def _memory(history: History) -> Series:
    found = history.series("memory_now_bytes")
    return Series(found.steps, [value / 2**20 for value in found.values])


_LOSS = "loss, nats a token"
PICTURES = (
    Picture("labels-shuffled", _LOSS),
    Picture("not-a-number", _LOSS),
    Picture("diverging", "gradient norm", "grad_norm", logarithmic=True, file="diverging-norm"),
    Picture("stop-untrained", _LOSS, validation=True),
    Picture("truncated", _LOSS, validation=True),
    Picture("wrong-tokenizer", _LOSS, validation=True),
    Picture("bad-rows", _LOSS),
    Picture("diverging", _LOSS),
    Picture("labels-unshifted", _LOSS),
    Picture("too-much-dropout", _LOSS, validation=True),
    Picture("no-gradient", "gradient norm", "grad_norm", logarithmic=True),
    Picture("clipped", "gradient norm", "grad_norm", logarithmic=True),
    Picture("noisy-batch", _LOSS),
    Picture("rate-too-high", _LOSS),
    Picture("rate-too-low", _LOSS),
    Picture("no-warm-up", _LOSS),
    Picture("warm-up-too-long", "learning rate", "learning_rate"),
    Picture("too-few-updates", _LOSS),
    Picture("overfitting", _LOSS, validation=True),
    Picture("memorising", _LOSS, validation=True),
    Picture("leak", _LOSS, validation=True),
    Picture("duplicates", _LOSS, validation=True),
    Picture("unshuffled", _LOSS, validation=True),
    Picture("few-targets", "trained tokens of an update", "num_targets"),
    Picture("leaking", "memory, MiB", _memory),
    Picture("slowing-down", "tokens a second", "tokens_per_second"),
    Picture("too-slow", "tokens a second", "tokens_per_second"),
    Picture("router-collapse", "share of the busiest expert", _busiest_share),
    Picture("dead-experts", "share of the idlest expert", _idlest_share),
    Picture("adapter-idle", _LOSS, validation=True),
    Picture("wrong-base", _LOSS, validation=True),
    Picture("frozen", _LOSS),
)


def draw(cache: Path, out: Path) -> None:
    """Draw every picture whose runs are in the cache: the first seed that was found, else the first."""
    found = [case for case in cases("development") if case.is_kept(cache)]
    for picture in PICTURES:
        own = [case for case in found if case.fault == picture.fault]
        own.sort(key=lambda case: not doctor_figures.outcome(case, cache).is_found)
        faulty = next(iter(own), None)
        healthy = next((case for case in found if faulty and _is_beside(case, faulty)), None)
        if faulty is None or healthy is None:
            print(f"{picture.fault}: its runs are not in the cache")
            continue
        _draw(picture, faulty, healthy, cache, out / picture.name)


def _is_beside(case: Case, faulty: Case) -> bool:
    """Whether it is the same setting without a fault and without a change."""
    plain = case.healthy is not None and not case.healthy.changes and not case.healthy.interrupted
    return plain and case.setting_name == faulty.setting_name


def _draw(picture: Picture, faulty: Case, healthy: Case, cache: Path, out: Path) -> None:
    outcome = doctor_figures.outcome(faulty, cache)
    told = None if outcome.step is None else (outcome.step, f"told after {outcome.step}")
    beside = read_history(healthy.run(cache))
    panels = [
        _panel(picture, beside, _HEALTHY, f"healthy: {faulty.setting_name}"),
        replace(_panel(picture, outcome.history, _FAULTY, FAULTS[faulty.fault].title), mark=told),
    ]
    fsio.write_text(out, drawing(panels, picture.label, logarithmic=picture.logarithmic))
    print(out.name)


def _panel(picture: Picture, history: History, colour: str, title: str) -> Panel:
    figure = picture.figure
    series = history.series(figure) if isinstance(figure, str) else figure(history)
    line, valid = signals.thinned(series, _POINTS), history.series("val_loss")
    lines = [Line(list(zip(line.steps, line.values)), colour)]
    if picture.validation and len(valid):
        points = list(zip(valid.steps, valid.values))
        lines = [replace(lines[0], label="training"), Line(points, _VALID, "validation", True)]
    return Panel(title, lines, history.num_steps)
