"""What the rules say of the runs of the fault bench: found or missed, and after how many updates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.doctor_cases import Case
from bench.doctor_faults import CODES, FAULTS
from mule.doctor.examine import examine
from mule.doctor.finding import Finding
from mule.doctor.history import History, read_history
from mule.statistics import wilson_interval

MOST_REPEATED = 0.1  # of the rows of a run that counts as healthy


@dataclass(frozen=True)
class Outcome:
    """What was found of a run. `step` is the evaluation at which it was first known, of a fault.

    `repeated` is the share of its rows that are equal to one before, counted without the doctor.
    """

    case: Case
    history: History
    findings: Sequence[Finding]
    step: int | None
    repeated: float = 0.0

    @property
    def warnings(self) -> list[str]:
        """The codes that say that something is wrong."""
        return codes(self.findings)

    @property
    def is_found(self) -> bool:
        return bool(expected(self.case) & set(self.warnings))


def codes(findings: Iterable[Finding]) -> list[str]:
    """Of alarms and warnings."""
    return [f.code for f in findings if f.found.severity != "note"]


def expected(case: Case) -> set[str]:
    return set(CODES.get(case.fault, "").split())


def outcome(case: Case, cache: Path) -> Outcome:
    """Examine a run at its end, and of a fault that was found, at each evaluation up to it."""
    history = read_history(case.run(cache))
    findings = examine(history)
    step = None
    if expected(case) & set(codes(findings)):
        step = next(
            at
            for at in (*evaluated(history), history.num_steps)
            if at == history.num_steps or expected(case) & set(codes(examine(history.until(at))))
        )
    return Outcome(case, history, findings, step, repeated_share(case.folder(cache)))


def repeated_share(folder: Path) -> float:
    """Of the chats that a run was given; texts are not rows."""
    file = folder / "train.jsonl"
    rows = file.read_bytes().splitlines() if file.is_file() else []
    return 1 - len(set(rows)) / len(rows) if rows else 0.0


def evaluated(history: History) -> list[int]:
    """The updates after which the run was evaluated."""
    every = int(history.recipe.evaluate.every_steps)
    return [row["step"] for row in history.rows if row["step"] % every == 0]


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Recall of each fault and over all, false alarms, and the median time to detection.

    A run that was set out as healthy, on data that turned out to repeat itself, counts neither way.
    """
    faulty = [o for o in outcomes if o.case.fault]
    meant = [o for o in outcomes if not o.case.fault]
    healthy = [o for o in meant if o.repeated <= MOST_REPEATED]
    repeating = [o for o in meant if o.repeated > MOST_REPEATED]
    rows = []
    for name, fault in FAULTS.items():
        own = [o for o in faulty if o.case.fault == name]
        if own:
            rows.append({"fault": name, "title": fault.title, **recall(own)})
    alarmed = [o for o in healthy if o.warnings]
    return {
        "recall": recall(faulty),
        "faults": rows,
        "healthy": {
            "runs": len(healthy),
            "false_alarms": len(alarmed),
            "rate": len(alarmed) / len(healthy) if healthy else None,
            "interval": wilson_interval(len(alarmed), len(healthy)),
            "which": [
                {"run": o.case.name, "setting": title(o.case), "codes": o.warnings} for o in alarmed
            ],
        },
        "repeating": {
            "runs": len(repeating),
            "told": sum("D501" in o.warnings for o in repeating),
            "least_share": min((o.repeated for o in repeating), default=None),
            "other_codes": sorted({c for o in repeating for c in o.warnings} - {"D501"}),
        },
    }


def recall(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many were found, and when."""
    found = [o for o in outcomes if o.is_found]
    steps = [o.step for o in found if o.step is not None]
    shares = [o.step / o.history.num_steps for o in found if o.step is not None]
    return {
        "runs": len(outcomes),
        "found": len(found),
        "recall": len(found) / len(outcomes) if outcomes else None,
        "interval": wilson_interval(len(found), len(outcomes)),
        "expected": sorted(set().union(*(expected(o.case) for o in outcomes))),
        "median_updates": statistics.median(steps) if steps else None,
        "median_share": round(statistics.median(shares), 3) if shares else None,
        "missed": [
            {"run": o.case.name, "setting": title(o.case), "codes": o.warnings}
            for o in outcomes
            if not o.is_found
        ],
    }


def title(case: Case) -> str:
    """The setting, and what is changed in it of a healthy run."""
    return case.healthy.name if case.healthy else case.setting_name
