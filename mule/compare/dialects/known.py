"""Every dialect, by name."""

from __future__ import annotations

from mule.compare.dialects import axolotl, donkeytune, litgpt, llama_factory, mlx_lm, trl
from mule.compare.dialects.table import Dialect

DIALECTS: dict[str, Dialect] = {
    module.DIALECT.name: module.DIALECT
    for module in (axolotl, llama_factory, trl, litgpt, mlx_lm, donkeytune)
}
