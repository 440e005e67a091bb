"""Numbers of the report as text; what was not measured is said to be missing."""

from __future__ import annotations

from typing import Any

MISSING = "missing"
UNKNOWN = "not known"  # of a module of the user's
_UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def plus_minus(interval: dict[str, Any] | None, digits: int, sign: bool = False) -> str:
    """4.1234 ± 0.0021; the mean alone of one value."""
    if interval is None:
        return MISSING
    mean, half = interval["mean"], interval["half_width"]
    text = f"{mean:+.{digits}f}" if sign else f"{mean:,.{digits}f}"
    return text if half is None else f"{text} ± {half:,.{digits}f}"


def of_size(text: str, size: str, between: str = ", ") -> str:
    """With the size behind it where the campaign has several."""
    return f"{text}{between}{size}" if size else text


def counted(count: int, what: str) -> str:
    """1 seed, 3 seeds."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def number(value: Any, digits: int = 0) -> str:
    """12,345 or 0.123."""
    return f"{value:,.{digits}f}" if _is_number(value) else MISSING


def percent(value: Any, digits: int = 1) -> str:
    return f"{value:.{digits}%}" if _is_number(value) else MISSING


def short(value: Any) -> str:
    """12.3k, 9.87M; small numbers as they are."""
    if not _is_number(value):
        return MISSING
    unit, size = next(((u, s) for u, s in _UNITS if abs(value) >= s), ("", 1.0))
    return f"{value / size:.3g}{unit}" if abs(value) < 1000 * size else f"{value / size:,.0f}{unit}"


def mebibytes(value: Any) -> str:
    return f"{value / 2**20:,.0f} MiB" if _is_number(value) else MISSING


def size_in_bytes(value: Any) -> str:
    """12,288 B; from a million on in MiB."""
    if _is_number(value) and value >= 2**20:
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,.0f} B" if _is_number(value) else MISSING


def seconds(value: Any) -> str:
    """12 s, 3 min, 2.1 h."""
    if not _is_number(value):
        return MISSING
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 6000 else f"{value / 3600:.1f} h"


def probability(value: Any) -> str:
    """0.012; below a thousandth <0.001."""
    if not _is_number(value):
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
