"""Figures in words: durations, bytes, rates, losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# field of a progress row -> how the live line shows it; others are not shown
_LIVE: dict[str, Callable[[Any], str]] = {
    "epoch": lambda v: f"epoch {v:.2f}",
    "loss": lambda v: f"loss {v:.4f}",
    "val_loss": lambda v: f"val {v:.4f}",
    "val_loss_ema": lambda v: f"ema {v:.4f}",
    "val_perplexity": lambda v: f"ppl {v:.4g}",
    "goal_probability": lambda v: f"goal {v:.0%}",
    "goal_step": lambda v: f"at update {v:,}",
    "learning_rate": lambda v: f"lr {v:.2e}",
    "grad_norm": lambda v: f"norm {v:.2f}",
    "tokens_per_second": lambda v: f"{short(v)} tok/s",
    "steps_per_second": lambda v: f"{v:.2f} step/s",
    "weights_per_second": lambda v: f"{short(v)} weights/s",
    "share_of_peak": lambda v: f"{v:.0%} of peak",
    "memory_bytes": lambda v: in_bytes(v),
    "gflops": lambda v: f"{v:,.0f} GFLOP/s",
    "doctor": lambda v: f"doctor: {v}",
}


def figures_line(fields: dict[str, Any]) -> str:
    """The known figures of a progress row, in a fixed order."""
    return " · ".join(
        show(fields[name]) for name, show in _LIVE.items() if fields.get(name) is not None
    )


def figure(name: str, value: Any) -> str:
    """A value of a result as text; its name's ending tells the unit."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    if name.endswith("_bytes"):
        return in_bytes(value)
    if name == "at" or name.endswith("_at"):
        return date(value)
    if name.startswith(("share_", "exact_match")) or name in ("top1", "persona", "fill"):
        return f"{value:.1%}"
    if name in ("seconds", "took_s"):
        return duration(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """0.4 s, 12 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def in_bytes(count: float) -> str:
    """1.2 GiB, 340 MiB, 12 KiB, 5 bytes."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:,.0f} {unit}"
            )
    return f"{count:.0f} bytes"


def short(number: float) -> str:
    """12.3k, 4.5M; small numbers as they are."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def date(timestamp: float) -> str:
    """A Unix time as local date and time."""
    from datetime import datetime

    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M")
