"""How well does `mule plan` know what a run will take? Predicted against measured, run by run.

    python bench/plan.py run            # every run: about 20 minutes on two quiet cores
    python bench/plan.py run only=LoRA  # those whose names hold the word; others keep their figures
    python bench/plan.py run memory=1   # peak memory alone, which other work does not disturb
    python bench/plan.py fit            # mule/plan/fitted.json, from the half that may be used to fit
    python bench/plan.py report         # predictions with these constants, errors, and a table

Each run is a process of `mule train` on made-up data: its peak resident memory as the system counts
it, and the median time between two rows of its log. Half of the runs (bench/plan_cases.py) fit the
constants, the others are held out: their errors are what is published. Counted too is a run that
needed more than a machine has on which `mule plan` would just have said that it fits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan_cases import BASES, Case, cases, set_up
from plan_fit import fit_memory, fit_time
from train_timing import split

from mule import calibration, fsio, machine
from mule.commands.docs_accuracy import plan_markdown
from mule.config.load import load_recipe
from mule.errors import UserError
from mule.plan.estimate import MARGIN
from mule.plan.fitted import FILE as CONSTANTS
from mule.plan.fitted import Fitted
from mule.plan.peak import Process, peak_memory
from mule.plan.resolve import Facts, resolve
from mule.plan.shape import new_model_config
from mule.plan.work import Speed, update_work

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "plan.json"
WORK = Path(tempfile.gettempdir()) / "mule-bench-plan"
COMMAND = "python bench/plan.py run"
UPDATES, WARM_UP, OF_MEMORY = 7, 2, 2


def run(chosen: Sequence[str] = (), *, memory_only: bool = False) -> None:
    """Measure; every run is kept as soon as it has ended."""
    set_up(WORK)
    rates = calibration.calibration(fresh=not memory_only)
    kept = _read()
    known = {row["name"]: row for row in kept.get("cases", [])}
    listed = [case for case in cases() if not chosen or any(word in case.name for word in chosen)]
    for number, case in enumerate(listed, start=1):
        row = {"name": case.name, "fits": case.fits, "settings": case.settings}
        row["facts"] = asdict(_facts(case))
        measured = _measure(case, OF_MEMORY if memory_only else UPDATES)
        if memory_only:
            measured.pop("update_s")
        before = known.get(case.name, {}).get("measured", {})
        known[case.name] = row | {"measured": before | measured}
        told = ", ".join(f"{key} {value:.4g}" for key, value in measured.items())
        print(f"{number}/{len(listed)} {case.name}: {told}", flush=True)
        _keep({**kept, "cases": _in_order(known), "calibration": asdict(rates)})


def fit() -> None:
    """Write the constants that suit the fitting half best."""
    found = _read()
    rows = [row for row in found["cases"] if row["fits"]]
    start = Fitted(**fsio.read_json(CONSTANTS))
    samples = [_sample(row, found["calibration"]) for row in rows]
    memory = fit_memory(samples, start)
    timed = [sample for sample in samples if "update_s" in sample.measured]
    times = fit_time(timed, start) if timed else start.time
    rates = found["calibration"]
    memory |= {"imports": rates["import_bytes"], "compiler": rates["compiler_bytes"]}
    about = {
        "command": "python bench/plan.py run, then fit",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine.cpu_model(),
        "torch": machine.torch_version(),
        "runs": [row["name"] for row in rows],
    }
    fsio.write_json(CONSTANTS, {"about": about, "memory": memory, "time": times})


def report() -> dict[str, Any]:
    """Add predictions and errors to what was measured, and print the table."""
    found = _read()
    fitted = Fitted(**fsio.read_json(CONSTANTS))
    for row in found["cases"]:
        sample = _sample(row, found["calibration"])
        row["predicted"] = {
            "peak_bytes": sample.peak(fitted),
            "update_s": sample.update_s(fitted),
            "parts": sample.parts(fitted),
        }
        row["error"] = _errors(row)
    found["summary"] = {
        "fitted": _summary([row for row in found["cases"] if row["fits"]]),
        "held out": _summary([row for row in found["cases"] if not row["fits"]]),
        "all": _summary(found["cases"]),
    }
    _keep(found)
    print(plan_markdown(_read()))
    return found


# ---------------------------------------------------------------- one run


class Sample:
    """A run that was measured, and what is predicted of it with given constants."""

    def __init__(self, row: dict[str, Any], rates: dict[str, Any]) -> None:
        self.name, self.measured = row["name"], row["measured"]
        self.recipe = load_recipe(None, row["settings"]).recipe
        self.config = shape(row["settings"])
        self.facts = Facts(**row["facts"])
        self.resolved = resolve(self.recipe, self.config, self.facts).recipe
        self.process = Process(rates["import_bytes"], rates["compiler_bytes"], 2048)
        flops = rates["matmul_flops"]
        precision = str(self.resolved.train.precision)
        rate, call = rates["read_bytes_per_second"], rates["operation_s"]
        self.speed = Speed(flops[precision], flops["bf16"], rate, call)
        self.work = update_work(self.config, self.resolved, self.facts, self.speed)

    def peak(self, fitted: Fitted) -> int:
        return sum(self.parts(fitted).values())

    def parts(self, fitted: Fitted) -> dict[str, int]:
        found = peak_memory(self.config, self.resolved, self.facts, self.process, fitted)
        return found.parts

    def update_s(self, fitted: Fitted) -> float:
        return sum(value * fitted.time.get(name, 1.0) for name, value in self.work.items())


def shape(settings: list[str]) -> Any:
    """The model of a run: its own, or that of the base it starts from."""
    recipe = load_recipe(None, settings).recipe
    if recipe.model.path is None:
        return new_model_config(recipe, recipe.model.vocab_size or 0)
    size = BASES[recipe.model.path]
    more = ["data.train=[text.txt]", "model.vocab_size=32768", "model.max_position_embeddings=2048"]
    return new_model_config(load_recipe(None, [size, *more]).recipe, 0)


def _sample(row: dict[str, Any], rates: dict[str, Any]) -> Sample:
    return Sample(row, rates)


def _facts(case: Case) -> Facts:
    """What `mule plan` finds of the data and this machine, in the folder of the runs."""
    from mule.commands.plan import Plan

    with contextlib.chdir(WORK):
        recipe = load_recipe(None, case.settings).recipe
        return Plan(recipe, Path("runs") / "none", None, False).facts


def _measure(case: Case, updates: int) -> dict[str, float]:
    """Peak memory, seconds of an update, and of the whole process."""
    name = "".join(c if c.isalnum() else "-" for c in case.name)
    runs = WORK / "measured"
    subprocess.run(["rm", "-rf", str(WORK / "runs" / name)], check=True)
    words = [*case.settings, f"train.steps={updates}", "optim.warmup_steps=1"]
    command = [sys.executable, "-m", "mule.cli.main", "train", *words, "--name", name]
    runs.mkdir(exist_ok=True)
    began = time.perf_counter()
    with (runs / f"{name}.log").open("w") as log:
        child = subprocess.Popen(command, cwd=WORK, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        text = (runs / f"{name}.log").read_text()[-1500:]
        raise UserError(f"{case.name} failed: {text}", "see what it says")
    rows = (WORK / "runs" / name / "metrics.jsonl").read_text().splitlines()
    stamps = [json.loads(row)["at"] for row in rows]
    # The last row follows an evaluation.
    took = [b - a for a, b in itertools.pairwise(stamps)][WARM_UP - 1 : -1]
    subprocess.run(["rm", "-rf", str(WORK / "runs" / name)], check=True)
    return {
        "peak_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "update_s": statistics.median(took) if took else 0.0,
        "process_s": time.perf_counter() - began,
    }


# ---------------------------------------------------------------- the figures


def _errors(row: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured, less 1; of memory and of an update."""
    return {
        key: row["predicted"][key] / row["measured"][key] - 1
        for key in ("peak_bytes", "update_s")
        if row["measured"].get(key)
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"runs": len(rows)}
    for key, name in (("peak_bytes", "memory"), ("update_s", "time")):
        errors = sorted(abs(row["error"][key]) for row in rows if key in row["error"])
        if errors:
            place = min(len(errors) - 1, round(0.95 * (len(errors) - 1)))
            found[name] = {
                "runs": len(errors),
                "median_error": statistics.median(errors),
                "p95_error": errors[place],
            }
    found["fits_that_did_not"] = [
        row["name"]
        for row in rows
        if row["measured"]["peak_bytes"] > (1 + MARGIN) * row["predicted"]["peak_bytes"]
    ]
    return found


def _in_order(known: dict[str, Any]) -> list[dict[str, Any]]:
    return [known[case.name] for case in cases() if case.name in known]


def _read() -> dict[str, Any]:
    return fsio.read_json(RESULTS) if RESULTS.is_file() else {"bench": "plan", "command": COMMAND}


def _keep(found: dict[str, Any]) -> None:
    stamp = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe()}
    fsio.write_json(RESULTS, {**found, **stamp})


def main() -> None:
    """Parse the words, and do what they say."""
    command, *words = sys.argv[1:] or ["report"]
    texts = [word.partition("=")[2] for word in words if word.startswith("only=")]
    _, numbers = split([word for word in words if not word.startswith("only=")])
    if command == "run":
        run(texts, memory_only=bool(numbers.get("memory")))
        report()
    elif command == "fit":
        fit()
        report()
    else:
        report()


if __name__ == "__main__":
    main()
