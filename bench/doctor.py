"""How often `mule doctor` is right: planted faults and healthy runs, really trained.

    python -m bench.doctor run [WORD] part=development workers=2  # train what the cache lacks
    python -m bench.doctor run part=held-out
    python -m bench.doctor examine [WORD] part=development        # what the rules say of each run
    python -m bench.doctor report                                 # bench/results/doctor.json
    python -m bench.doctor plots                                  # docs/results/doctor/*.svg

The faults are those of bench/doctor_faults.py, with the rules that are expected to find each; the
settings they are planted in, and how healthy runs differ, those of bench/doctor_settings.py. The part
`development` is there to look at and to tune rules on. **The part `held-out` has other families, shapes,
data sets and seeds; only `report` reads it.** Nobody who writes a rule looks at its runs.

Trained runs lie below ~/.cache/mule/bench/doctor/PART/CASE/runs/CASE (another folder: cache=FOLDER), so
that changed rules are examined again in seconds. A run that is there is not trained again. Data that
does not come with Mule is looked for in data=FOLDER, by default ../shared/data; cases without their data
are left out. With a WORD, only the cases whose name begins with it.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import doctor_cases, doctor_figures
from bench.doctor_data import Folder
from bench.doctor_figures import Outcome
from bench.doctor_settings import PARTS, Part
from mule import __version__, fsio, machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "doctor.json"
PLOTS = ROOT / "docs" / "results" / "doctor"


def examine(part: Part, cache: Path, word: str) -> None:
    """Show what the rules say of each run, and the figures over all."""
    outcomes = _outcomes(part, cache, word)
    for outcome in outcomes:
        case = outcome.case
        if case.fault:
            verdict = f"found at {outcome.step}" if outcome.is_found else "MISSED"
        else:
            verdict = "FALSE ALARM" if outcome.warnings else "quiet"
        print(f"\n{verdict:12} {case.name} [{doctor_figures.title(case)}] {case.run(cache).folder}")
        for finding in outcome.findings:
            found = finding.found
            print(f"    {found.severity:8} {finding.code} at {found.step}: {found.what}")
    _summarise(outcomes)


def report(cache: Path) -> None:
    """Write the figures of both parts; those of the held-out part are the published ones."""
    parts = {part: _outcomes(part, cache) for part in PARTS}
    if not parts["held-out"]:
        raise SystemExit("no held-out runs: python -m bench.doctor run part=held-out")
    files = [fsio.read_json(o.case.folder(cache) / doctor_cases.CASE) for o in parts["held-out"]]
    fsio.write_json(
        RESULTS,
        {
            "bench": "doctor",
            "commands": [
                *(f"python -m bench.doctor run part={part}" for part in PARTS),
                "python -m bench.doctor report",
            ],
            "date": datetime.date.today().isoformat(),
            "mule": __version__,
            "seconds": round(sum(file["seconds"] for file in files)),
            "machine": machine.describe(),
            **{part: doctor_figures.figures(outcomes) for part, outcomes in parts.items()},
        },
    )
    _summarise(parts["held-out"])


def plots(cache: Path) -> None:
    """Draw the faulty runs of the page beside healthy ones."""
    from bench import doctor_plots

    doctor_plots.draw(cache, PLOTS)


def _outcomes(part: Part, cache: Path, word: str = "") -> list[Outcome]:
    kept = [case for case in doctor_cases.cases(part) if case.is_kept(cache)]
    return [doctor_figures.outcome(c, cache) for c in kept if c.name.startswith(word)]


def _summarise(outcomes: Sequence[Outcome]) -> None:
    found = doctor_figures.figures(outcomes)
    print()
    for row in (*found["faults"], {"fault": "all faults", **found["recall"]}):
        when = f"after {row['median_share']:.0%} of the run" if row["found"] else ""
        missed = f" of {', '.join(row['expected']) or 'no rule yet'}"
        print(f"{row['fault']:20} {row['found']} of {row['runs']}{missed} {when}")
    healthy = found["healthy"]
    low, high = healthy["interval"]
    print(
        f"healthy runs: {healthy['false_alarms']} of {healthy['runs']} with a false alarm, "
        f"95% interval {low:.1%} to {high:.1%}"
    )


def main(words: list[str]) -> None:
    named = dict(word.split("=", 1) for word in words if "=" in word)
    verb, *rest = [word for word in words if "=" not in word] or [""]
    part = named.get("part", "development")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(named.get("cache", home / "mule" / "bench" / "doctor")).resolve()
    data = Folder(Path(named.get("data", ROOT.parent / "shared" / "data")).resolve())
    if part not in PARTS or named.keys() - {"part", "workers", "cache", "data"}:
        raise SystemExit(__doc__)
    match verb, rest:
        case "run", _ if len(rest) < 2:
            from bench import doctor_runs

            doctor_runs.run(part, "".join(rest), int(named.get("workers", "2")), cache, data)
        case "examine", _ if len(rest) < 2:
            examine(part, cache, "".join(rest))
        case "report", []:
            report(cache)
        case "plots", []:
            plots(cache)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
