"""Which rows of a run's logs count, when updates were made more than once.

A resumed run makes the updates after its checkpoint again, one that went back those after the update
it went back to; the logs keep them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]


def stands(events: list[Row]) -> Callable[[Row], bool]:
    """Tells whether a row's update is part of the run: neither made again later nor rolled back."""
    restarts, undone = _restarts(events), standing_events(events, "rolled back")
    return lambda row: not (_is_taken_back(row, restarts) or _is_undone(row, undone))


def standing_events(events: list[Row], *kinds: str) -> list[Row]:
    """Events about updates, without those of updates that a later attempt makes again."""
    restarts = _restarts(events)
    return [e for e in events if e["kind"] in kinds and not _is_taken_back(e, restarts)]


def newest(rows: Iterable[Row]) -> list[Row]:
    """One row for each (kind, step), of its newest attempt, by step."""
    found: dict[tuple[Any, int], Row] = {}
    for row in rows:
        key = (row.get("kind"), row["step"])
        if key not in found or row["attempt"] >= found[key]["attempt"]:
            found[key] = row
    return sorted(found.values(), key=lambda row: row["step"])


def _restarts(events: list[Row]) -> dict[int, int]:
    """Attempt -> the update it resumed after, where it was logged."""
    return {
        event["attempt"]: event["from_step"]
        for event in events
        if event["kind"] == "started" and "from_step" in event
    }


def _is_taken_back(row: Row, restarts: dict[int, int]) -> bool:
    """Whether a later attempt began before the row's update."""
    return any(row["step"] > step for began, step in restarts.items() if began > row["attempt"])


def _is_undone(row: Row, rollbacks: list[Row]) -> bool:
    """Whether a rollback took the row's update back."""
    spans = (event for event in rollbacks if row["attempt"] <= event["attempt"])
    return any(event["to"] < row["step"] <= event["step"] for event in spans)
