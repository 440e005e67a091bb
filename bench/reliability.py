"""The reliability figures: everything of tests/life/figures.py, and the page made of it.

    python -m bench.reliability run           # all figures, about an hour on one core
    python -m bench.reliability run F1 F4     # some of them
    python -m bench.reliability run --again   # also those that are done for this commit
    python -m bench.reliability report        # RELIABILITY.md

A figure is written as soon as it is done: a run that was stopped goes on with the next one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from mule import fsio, machine
from tests.life.figures import FIGURES
from tests.life.harness import FaultForker, Figure, Lab

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "reliability.json"
PAGE = ROOT / "RELIABILITY.md"


def run(names: list[str], *, again: bool = False, full: bool = True) -> None:
    """Try every trial of these figures, and keep what came of it."""
    if unknown := [name for name in names if name not in FIGURES]:
        raise SystemExit(f"no figure {', '.join(unknown)}; there are: {', '.join(FIGURES)}")
    commit = _commit()
    for name in names or FIGURES:
        known = _results().get(name)
        if known and not again and (known["commit"], known["full"]) == (commit, full):
            print(f"{name}: done for {commit} already (--again repeats it)")
            continue
        # A server of its own for each figure: none of them can tire it for the next.
        with tempfile.TemporaryDirectory(prefix="mule-reliability-") as scratch:
            os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
            server = FaultForker()
            try:
                found = measure(FIGURES[name], Lab(Path(scratch), server), full)
            finally:
                server.close()
        stamp = {"commit": commit, "date": date.today().isoformat(), "machine": machine.describe()}
        fsio.write_json(RESULTS, _results() | {name: found | stamp})
        print(f"{name}: {found['trials'] - len(found['failures'])} of {found['trials']} held")


def measure(figure: Figure, lab: Lab, full: bool) -> dict[str, Any]:
    """The number of trials, each failure with its label, and what the trials measured."""
    started_at, labels, failures, measured = time.perf_counter(), [], [], []
    for trial in figure.trials(lab, full):
        labels.append(trial.label)
        try:
            measured.append(trial.work())
        except Exception as error:  # whatever happens counts as a failure of this trial
            cause = str(error) or type(error).__name__
            failures.append({"trial": trial.label, "cause": " ".join(cause.split())[:500]})
    return {
        "full": full,
        "trials": len(labels),
        "first": labels[0],
        "last": labels[-1],
        "failures": failures,
        "measured": _summary(measured),
        "seconds": round(time.perf_counter() - started_at, 1),
    }


def bound(trials: int, failures: int) -> float:
    """Upper 95% bound of the failure rate: the rule of three, exact (Clopper-Pearson) beyond it."""
    if not failures:
        return min(1.0, 3 / trials)
    low, high = failures / trials, 1.0
    for _ in range(60):  # the rate at which so few failures have a chance of 5%
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(failures, trials, middle) > 0.05 else (low, middle)
    return high


def _at_most(failures: int, trials: int, rate: float) -> float:
    """Chance of at most so many failures, binomial."""
    term = total = (1 - rate) ** trials
    for k in range(failures):
        if rate < 1:
            term *= (trials - k) / (k + 1) * rate / (1 - rate)
        total += term
    return min(1.0, total)


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Booleans and words counted; the smallest and the largest of numbers."""
    found: dict[str, Any] = {}
    for key in sorted({key for row in rows for key in row}):
        values = [row[key] for row in rows if key in row]
        if isinstance(values[0], bool):
            found[key] = sum(values)
        elif isinstance(values[0], str):
            found[key] = {word: values.count(word) for word in sorted(set(values))}
        else:
            found[key] = {"lowest": min(values), "highest": max(values)}
    return found


# ---------------------------------------------------------------- the page


def report() -> None:
    """Write RELIABILITY.md from the results."""
    if not _results():
        raise SystemExit("no results: python -m bench.reliability run")
    fsio.write_text(PAGE, page(_results()))


def page(results: dict[str, dict[str, Any]]) -> str:
    """The text of RELIABILITY.md."""
    lines = [
        "# Reliability, measured",
        "",
        "<!-- Written by `python -m bench.reliability report`; edit bench/reliability.py. -->",
        "",
        "What is done to a tiny run (two layers, bf16, CPU, its checks as in a large one), how often,",
        "and how often what Mule promises held. *Same bits*: SHA-256 of the weights and of the",
        "optimizer, and every logged loss, against a run that nothing disturbed; same machine, torch",
        "and threads. The bound is the failure rate that the trials rule out with 95% confidence (3 / N",
        "without a failure). Trials that try every case there is have no rate: their bound says only",
        "how many there were.",
        "",
        "| | what is done | what must hold | held | failure rate below | measured on |",
        "|---|---|---|--:|--:|---|",
    ]
    shown = {name: results[name] for name in FIGURES if name in results}
    for name, found in shown.items():
        held, trials = found["trials"] - len(found["failures"]), found["trials"]
        few = "" if found["full"] else " (a few trials only)"
        limit = bound(trials, len(found["failures"]))
        figure = FIGURES[name]
        lines.append(
            f"| {name} | {figure.title} | {figure.promise} | {held:,} of {trials:,}{few} "
            f"| {limit:.2%} | {found['date']}, {found['commit']} |"
        )
    lines += ["", "## Details", ""]
    for name, found in shown.items():
        lines += _details(name, found)
    missing = [name for name in FIGURES if name not in results]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    lines += [
        "## Limits",
        "",
        "- One process on a CPU. The resumed run is compared on the machine that began it.",
        "- *F4 power* is a model of a disk, not a disk: names that were not synced are lost in the",
        "  order of a journal or each by chance, contents are kept, zeroed or cut; the run's own",
        "  folder is taken as durable, as ext4, XFS and Btrfs make it when a file in it is synced.",
        "- SIGHUP and SIGUSR1 save nothing: the run goes on from its last checkpoint.",
        "",
        "Again: `python -m bench.reliability run`, then `python -m bench.reliability report`.",
        "",
    ]
    return "\n".join(lines)


def _details(name: str, found: dict[str, Any]) -> list[str]:
    where = found["machine"]
    lines = [
        f"**{name}**: {found['trials']:,} trials ({found['first']} to {found['last']}), "
        f"{found['seconds']:,.0f} s on {where['cpu']}, {where['cores']} cores. "
        + _words(found["measured"]),
        "",
        "Failures: none." if not found["failures"] else "Failures:",
        "",
    ]
    lines += [f"- {failure['trial']}: {failure['cause']}" for failure in found["failures"]]
    return lines + ([""] if found["failures"] else [])


def _words(measured: dict[str, Any]) -> str:
    parts = []
    for key, value in measured.items():
        name = key.replace("_", " ")
        if not isinstance(value, dict):
            parts.append(f"{name}: {value:,}")
        elif set(value) == {"lowest", "highest"}:
            same = value["lowest"] == value["highest"]
            span = "" if same else f"{value['lowest']:,.6g} to "
            parts.append(f"{name}: {span}{value['highest']:,.6g}")
        else:
            parts.append(f"{name}: " + ", ".join(f"{n:,} {word}" for word, n in value.items()))
    return f"Measured: {'; '.join(parts)}." if parts else ""


def _results() -> dict[str, Any]:
    return fsio.read_json(RESULTS) if RESULTS.exists() else {}


def _commit() -> str:
    """The commit, marked when the code differs from it."""
    head = _git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{head}, changed" if _git("status", "--porcelain", "--", "mule", "tests/life") else head


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    action, *words = sys.argv[1:] or ["report"]
    if action == "run":
        options = {"again": "--again" in words, "full": "--few" not in words}
        run([word for word in words if not word.startswith("--")], **options)
    else:
        report()
