"""What to say of a run whose process was killed."""

from __future__ import annotations

from typing import Any

from mule import machine


def killed_in_words(row: dict[str, Any]) -> str:
    """From the last row of the killed attempt: when it was, why perhaps, and what helps then."""
    when = f"after update {row['step']}" if row["step"] else "before its first update"
    held = ""
    if row.get("memory_bytes"):
        used, there = row["memory_bytes"] / 2**30, machine.total_bytes() / 2**30
        held = f"; it had used {used:.1f} GiB, and this machine has {there:.1f}"
    return (
        f"the last attempt ended without a word {when}: killed, as the system does when memory runs "
        f"out{held}; if it was that, lower train.micro_batch_rows"
    )
