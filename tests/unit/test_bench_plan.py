"""bench/plan.py without its runs: the cases, fitting, errors and the table. No time is tested."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mule.config.load import load_recipe
from mule.plan.fitted import Fitted, fitted
from tests.unit.test_plan import FACTS, KNOWN

SCRIPTS = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("plan")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "plan.json")
    monkeypatch.setattr(module, "CONSTANTS", tmp_path / "fitted.json")
    return module


def row(case: Any) -> dict[str, Any]:
    about = {"name": case.name, "fits": case.fits, "settings": case.settings}
    return about | {"facts": asdict(FACTS)}


def test_every_case_is_a_recipe_and_half_of_them_are_held_out(bench: ModuleType) -> None:
    cases = importlib.import_module("plan_cases").cases()
    assert len(cases) >= 30 and len({case.name for case in cases}) == len(cases)
    held_out = [case for case in cases if not case.fits]
    assert abs(2 * len(held_out) - len(cases)) <= 1
    for case in cases:
        assert load_recipe(None, case.settings).recipe
        sample = bench.Sample(row(case) | {"measured": {}}, asdict(KNOWN))
        assert sample.peak(fitted()) > KNOWN.import_bytes and sample.update_s(fitted()) > 0
    kinds = "experts mamba2 chats LoRA QLoRA compiled selective full muon average bf16".split()
    for kind in kinds:
        assert {case.fits for case in cases if kind in case.name} == {True, False}, kind


@dataclass
class Planted:
    """A run whose figures follow from known constants."""

    work: dict[str, float]
    bytes_by_name: dict[str, float]
    measured: dict[str, float]

    def peak(self, constants: Fitted) -> float:
        memory = constants.memory
        return memory["process"] + memory["activations"] * self.bytes_by_name["activations"]


def test_planted_constants_are_found(bench: ModuleType) -> None:
    fit = importlib.import_module("plan_fit")
    names = ("products", "pointwise", "updates")
    factors = {"products": 1.6, "pointwise": 2.5, "updates": 0.2}
    samples = []
    for n in range(1, 9):
        work = {"products": 0.1 * n, "pointwise": 0.05 * (n % 3 + 1), "updates": 1.0}
        held = {"activations": 1e7 * n * n}
        measured = {
            "update_s": sum(factors[name] * work[name] for name in names),
            "peak_bytes": 4e8 + 1.3 * held["activations"],
        }
        samples.append(Planted(work, held, measured))
    memory = {"process": 1e8, "activations": 1.0, "compiling": 1.0, "compiled_activations": 1.0}
    start = Fitted(memory, {"products": 1.2, "pointwise": 2.0, "updates": 0.1})
    times = fit.fit_time(samples, start)
    for name in names:
        assert times[name] == pytest.approx(factors[name], rel=0.15), name
    found = fit.fit_memory(samples, start)
    assert found["process"] == pytest.approx(4e8, rel=0.1)
    assert found["activations"] == pytest.approx(1.3, rel=0.1)


def test_errors_and_wrong_verdicts_are_counted(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = importlib.import_module("plan_cases").cases()[:4]
    rows = []
    for number, case in enumerate(cases):
        sample = bench.Sample(row(case) | {"measured": {}}, asdict(KNOWN))
        off = 1.5 if number == 3 else 1.1  # one needs far more than was predicted
        measured = {"peak_bytes": off * sample.peak(fitted()), "process_s": 3.0}
        if number != 1:
            measured["update_s"] = 0.8 * sample.update_s(fitted())
        rows.append(row(case) | {"measured": measured})
    kept = {"command": bench.COMMAND, "cases": rows, "calibration": asdict(KNOWN)}
    bench._keep(kept)
    bench.fsio.write_json(bench.CONSTANTS, asdict(fitted()))
    found = bench.report()
    assert found["cases"][0]["error"]["peak_bytes"] == pytest.approx(1 / 1.1 - 1, abs=1e-3)
    assert "update_s" not in found["cases"][1]["error"]
    held_out = found["summary"]["held out"]
    assert held_out["fits_that_did_not"] == [cases[3].name]
    assert held_out["time"]["median_error"] == pytest.approx(0.25, abs=1e-3)
    text = capsys.readouterr().out
    assert "1 would have been said to fit that did not" in text
    assert f"| {cases[1].name} | held out |" in text
    bench.fit()
    constants = bench.fsio.read_json(bench.CONSTANTS)
    assert constants["about"]["runs"] == [cases[0].name, cases[2].name]
    assert constants["memory"]["imports"] == KNOWN.import_bytes
