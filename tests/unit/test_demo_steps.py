"""How long the demo trains: whole on any usual machine, less on one that is far slower."""

from __future__ import annotations

import pytest

from mule import machine, progress
from mule.commands import demo


class _Notes(progress.Silence):
    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str, level: str = "info") -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    ("peak", "share", "told"),
    [
        (300e9, 1.0, ["training takes about 10 min on this machine"]),
        (
            120e9,
            0.58,
            [
                "training takes about 15 min on this machine",
                "this machine is slower than planned for: 58% of the steps, so that less is learned",
            ],
        ),
    ],
)
def test_a_slow_machine_takes_fewer_steps_and_says_so(
    monkeypatch: pytest.MonkeyPatch, peak: float, share: float, told: list[str]
) -> None:
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: peak)
    notes = _Notes()
    with progress.using(notes):
        steps = demo._scaled_steps()
    assert steps["pretrain"] == pytest.approx(400 * share, abs=2)
    assert notes.told == told
