"""torch.compile on a user's module: where it cuts the graph, and what it compiles again, by line.

The code itself is not compiled (backend eager): tracing alone finds graph breaks and recompiles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from mule.lab.inspect_source import line_advice
from mule.lab.inspect_subject import Outcome, Subject, one_line

_SAME = 3  # batches of one shape and other contents
_OTHER_SHAPES = ((2, 24), (2, 32), (3, 32))
_READ_AT = re.compile(r"# (?P<file>\S+\.py):(?P<line>\d+) in ")  # in a guard that failed
_MADE_AT = re.compile(r"\((?P<file>[^\s()]+\.py):(?P<line>\d+)\)$")  # of a function


def check_compile(subject: Subject) -> Outcome:
    """Trace at one shape three times, then at others; compare with what was not compiled."""
    import torch._dynamo as dynamo
    from torch._dynamo import config, utils

    from mule.train.compiler import Watch

    outcome = Outcome()
    dynamo.reset()
    subject.model.eval()
    seen = (len(utils.graph_break_reasons), len(utils.get_compilation_metrics()))
    with config.patch(recompile_limit=1_000):
        compiled = torch.compile(subject.model, backend="eager")
        watch = Watch()
        ids = subject.ids(2, 16, seed=20)
        try:
            same = [subject.logits(subject.ids(2, 16, seed=20 + n), compiled) for n in range(_SAME)]
        except Exception as error:
            _tell_failure(subject, error, outcome)
            return outcome
        first = watch.look()
        breaks = _breaks(subject, utils.graph_break_reasons[seen[0] :])
        breaks |= _given_up(subject, utils.get_compilation_metrics()[seen[1] :])
        try:
            for rows, tokens in _OTHER_SHAPES:
                subject.logits(subject.ids(rows, tokens, seed=30), compiled)
        except Exception as error:
            _tell_failure(subject, error, outcome)
        later = watch.look()
    with torch.no_grad():
        apart = float((same[0] - subject.logits(ids)).abs().max())
    outcome.facts |= {
        "graphs": len(first.graphs),
        "graph_breaks": len(breaks),
        "recompiles_same_shape": len(first.recompiles),
        "recompiles_other_shapes": len(later.recompiles),
        "compiled_max_error": apart,
    }
    _tell_breaks(subject, breaks, outcome)
    _tell_recompiles(subject, first, later, outcome)
    return outcome


def _breaks(subject: Subject, reasons: list[Any]) -> dict[str, str]:
    """place -> why, of each graph break."""
    found: dict[str, str] = {}
    for reason in reasons:
        frames = [(frame.filename, frame.lineno) for frame in reason.user_stack]
        place = subject.place(frames) or (f"{frames[-1][0]}:{frames[-1][1]}" if frames else "?")
        found.setdefault(place, _why(reason.reason))
    return found


def _given_up(subject: Subject, metrics: list[Any]) -> dict[str, str]:
    """place -> why, of each function that is computed uncompiled: cut inside a loop, it is given up."""
    found = {}
    for made in metrics:
        if made.fail_reason:
            at = (made.fail_user_frame_filename, made.fail_user_frame_lineno)
            place = subject.place([at]) if all(at) else None
            whole = f"{made.co_name} (line {made.co_firstlineno}) is left uncompiled"
            where = place or f"{made.co_filename}:{made.co_firstlineno}"
            found.setdefault(where, f"{whole}: {_why(made.fail_reason)}")
    return found


def _why(text: str) -> str:
    """torch's explanation without hints and links."""
    kept = []
    for line in text.splitlines():
        plain = line.strip()
        if plain.startswith(("Hint:", "Developer debug context:", "For more details")):
            break
        if plain:
            kept.append(plain.removeprefix("Explanation: "))
    return one_line(": ".join(kept), 200)


def _tell_breaks(subject: Subject, breaks: dict[str, str], outcome: Outcome) -> None:
    source = subject.file.read_text(encoding="utf-8")
    for place, why in breaks.items():
        name, _, line = place.rpartition(":")
        advice = line_advice(source, int(line)) if name == subject.file.name else None
        outcome.add(
            "warning",
            f"graph break: {why}",
            advice or "torch tells more: TORCH_LOGS=graph_breaks",
            place,
        )


def _tell_recompiles(subject: Subject, first: Any, later: Any, outcome: Outcome) -> None:
    by_place: dict[str | None, list[str]] = {}
    for graph in first.recompiles:
        why = _reason(graph.why)
        by_place.setdefault(_place_of(subject, why, graph.function), []).append(why)
    for place, reasons in by_place.items():
        why = reasons[0].partition(" # ")[0]
        change = (
            "no Python number that changes from call to call may be read in forward: make it a "
        )
        change += "tensor, or keep it outside"
        if "size mismatch" in why:
            change = "its input's size depends on the data: give it one of fixed size"
        times = f"{len(reasons)} times " if len(reasons) > 1 else ""
        outcome.add("warning", f"compiled again {times}for the same B and T: {why}", change, place)
    if later.recompiles:
        outcome.add(
            "note",
            f"compiled again {len(later.recompiles)} times when B or T changed",
            "train at one shape: fixed T, drop_last in training; decode with a static cache",
        )


def _reason(text: str | None) -> str:
    """The guard that failed, without the number of the graph."""
    lines = [line.strip(" -") for line in (text or "").splitlines()]
    told = [line for line in lines if line and not line.startswith(("triggered by", "Recompiling"))]
    return re.sub(r"^\d+/\d+: ", "", told[0]) if told else "?"


def _place_of(subject: Subject, why: str, function: str) -> str | None:
    """The line that reads what changed, else the function's."""
    found = _READ_AT.search(why) or _MADE_AT.search(function)
    if found is None or Path(found["file"]).name != subject.file.name:
        return None
    return f"{subject.file.name}:{found['line']}"


def _tell_failure(subject: Subject, error: Exception, outcome: Outcome) -> None:
    outcome.add(
        "fault",
        f"torch.compile fails: {type(error).__name__}: {one_line(error)}",
        "simplify the line, or keep it out of the graph: @torch.compiler.disable",
        subject.place_of(error),
    )
