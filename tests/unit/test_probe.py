"""The trial of micro-batch sizes before a long run: it decides, and leaves no other trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mule import machine, progress
from mule.batch import Batch
from mule.commands import train
from mule.config.dump import read_reasons
from mule.config.load import load_recipe
from mule.data.loader import Loader
from mule.models.decoder import Decoder
from mule.plan import micro_batch, resolve
from mule.run import Run
from mule.train import assemble, probe
from mule.train.distributed import Group
from mule.train.optim import Optimizer
from mule.train.probe import measured_rates
from tests.life.tiny_life import outcome, write_data
from tests.tiny import part, random_batch, tiny_model


class Listener(progress.Silence):
    """A sink that remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self, key: int, description: str, total: float | None, unit: str) -> None:
        self.told.append((description, total))

    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None:
        self.told.append(fields)

    def note(self, text: str, level: str) -> None:
        self.told.append(text)


class Rows(Loader):
    """Rows made up; remembers how many were asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.shards: Any = type("Shards", (), {"row_length": 9})

    def rows_for_step(self, step: int) -> np.ndarray:
        return np.arange(16)

    def batch(self, rows: np.ndarray) -> Batch:
        self.asked.append(len(rows))
        return part(random_batch(16, 9), slice(0, len(rows)))


def parts() -> tuple[Decoder, Optimizer]:
    model = tiny_model().train()
    model.set_training(dropout=0.3)
    return model, Optimizer(model, load_recipe(None, [], complete=False).recipe.optim)


def clock(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], rows: Rows) -> None:
    """Time as if a pass took so many seconds by its number of rows."""
    now = [0.0]

    def tick() -> float:
        now[0] += seconds[rows.asked[-1]] / 2  # two looks at the clock are a pass and a pause
        return now[0]

    monkeypatch.setattr(probe.time, "perf_counter", tick)


@pytest.mark.parametrize(
    ("seconds", "tried", "rows"),
    [
        ({1: 2, 2: 3, 4: 5, 8: 9}, [1, 2, 4, 8], 8),
        ({1: 2, 2: 3, 4: 6, 8: 1}, [1, 2, 4], 2),  # 4 is no better: 8 is not tried
        ({1: 2, 2: 5, 4: 1, 8: 1}, [1, 2], 1),
    ],
)
def test_it_stops_where_more_rows_are_not_faster(
    seconds: dict[int, float], tried: list[int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, listener = Rows(), Listener()
    clock(monkeypatch, seconds, loader)
    with progress.using(listener):
        rates = measured_rates(*parts(), loader, (1, 2, 4, 8))
    assert loader.asked == tried
    assert rates == [(n, pytest.approx(n * 9 / (seconds[n] / 2))) for n in tried]
    assert micro_batch.fastest(rates)[0] == rows
    shown = [{"rows": n, "tokens_per_second": rate} for n, rate in rates]
    assert listener.told == [("Trying micro-batch sizes", 4), *shown]


def state_of(model: Decoder, optimizer: Optimizer) -> list[Any]:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    masters = optimizer.master_weights().values()
    return [optimizer.digest(), torch.get_rng_state(), *model.parameters(), *masters, *gradients]


def test_nothing_is_changed() -> None:
    """Weights, moments, gradients and random numbers are the same bits, with dropout drawing them."""
    model, optimizer = parts()
    before = copy.deepcopy(state_of(model, optimizer))
    assert len(measured_rates(model, optimizer, Rows(), (2, 16))) == 2
    after = state_of(model, optimizer)
    assert after[0] == before[0]
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:]))


@pytest.mark.parametrize(("fits", "expected"), [(4, [1, 4]), (0, [])])
def test_memory_that_runs_out_ends_it(
    fits: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = parts()
    whole = model.nll_sum
    loader = Rows()
    clock(monkeypatch, {1: 4, 4: 4, 16: 1}, loader)

    def nll_sum(batch: Batch) -> torch.Tensor:
        if len(batch.targets) > fits:
            whole(batch).backward()  # memory runs out late: there are gradients already
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return whole(batch)

    monkeypatch.setattr(model, "nll_sum", nll_sum)
    rates = measured_rates(model, optimizer, loader, (1, 4, 16))
    assert [rows for rows, _ in rates] == expected
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = parts()

    def nll_sum(batch: Batch) -> torch.Tensor:
        raise RuntimeError("a defect")

    monkeypatch.setattr(model, "nll_sum", nll_sum)
    with pytest.raises(RuntimeError, match="a defect"):
        measured_rates(model, optimizer, Rows(), (1, 2))


# ---------------------------------------------------------------- in a run

WORDS = ["train.steps=6", "train.micro_batch_rows=auto"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with data, where every run is long enough and 2 rows are the usual size."""
    write_data(tmp_path)
    recipe = tmp_path / "pretrain.yaml"
    recipe.write_text(recipe.read_text().replace("micro_batch_rows: 3, ", ""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "_measure_peak", lambda _device, _dtype: 1e11)
    monkeypatch.setattr(micro_batch, "_MIN_RUN_S", 0.0)
    monkeypatch.setattr(micro_batch, "_MAX_SHARE_OF_RUN", 10.0)
    monkeypatch.setattr(resolve, "_CPU_MICRO_TOKENS", 2 * 48)
    yield tmp_path


def run(*words: str, name: str, resume: bool = False) -> Run:
    train.run(Path("pretrain.yaml"), ["train.steps=6", *words], name=name, resume=resume)
    return Run.open(Path("runs") / name)


def rates_of(monkeypatch: pytest.MonkeyPatch, rates: list[tuple[int, float]]) -> list[Any]:
    """Let the trial find these; the sizes that each trial was asked for."""
    asked: list[Any] = []

    def fake(model: Decoder, optimizer: Optimizer, loader: Loader, sizes: Any) -> Any:
        asked.append(sizes)
        measured_rates(model, optimizer, loader, sizes)
        return rates

    monkeypatch.setattr(assemble, "measured_rates", fake)
    return asked


def test_a_run_takes_the_fastest_and_keeps_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = rates_of(monkeypatch, [(1, 200.0), (2, 398.0), (3, 412.4), (6, 409.0)])
    listener = Listener()
    with progress.using(listener):
        probed = run(name="probed")
    reason = "measured before the run: 200 tokens/s with 1 row, 398 with 2, 412 with 3, 409 with 6"
    assert f"train.micro_batch_rows: 3; {reason}" in listener.told
    assert asked == [(1, 2, 3, 6)]
    told = read_reasons((probed.folder / "resolved.yaml").read_text())["train.micro_batch_rows"]
    assert told == {"value": "3", "reason": reason}
    # The trial leaves no trace in what is learned.
    given = run("train.micro_batch_rows=3", name="given")
    assert outcome(probed.folder) == outcome(given.folder)
    # A resumed run does not try again, whatever it would find now.
    run(name="probed", resume=True)
    assert asked == [(1, 2, 3, 6)]
    now = load_recipe(probed.folder / "resolved.yaml", []).recipe.train
    assert now.micro_batch_rows == 3


def test_when_not_even_the_smallest_fits_the_planned_size_stays(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates_of(monkeypatch, [])
    found = read_reasons((run(name="plain").folder / "resolved.yaml").read_text())
    assert found["train.micro_batch_rows"] == {
        "value": "2",
        "reason": "96 tokens keep the cores busy; divides the update evenly",
    }


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one times nothing, and takes what it is told."""

    class Second(Group):
        rank, world_size = 1, 2

        def from_first(self, work: Any) -> Any:
            return [[4, 100.0], [8, 110.0]]

    asked = rates_of(monkeypatch, [])
    recipe = load_recipe(None, ["train.micro_batch_rows=2"], complete=False).recipe
    planned = resolve.Resolved(recipe, {}, candidates=(4, 8))
    model, optimizer = parts()
    found = assemble._with_fastest_micro_batch(planned, model, optimizer, Rows(), Second())
    assert found.recipe.train.micro_batch_rows == 8 and asked == []
    reason = "measured before the run: 100 tokens/s with 4 rows, 110 with 8"
    assert found.reasons["train.micro_batch_rows"] == reason
