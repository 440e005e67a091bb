"""Several data sources made one: cleaned, weighed, divided, and written with a card."""

from __future__ import annotations

from mule.data.mix.settings import MixSettings
from mule.data.mix.work import mix, split

__all__ = ["MixSettings", "mix", "split"]
