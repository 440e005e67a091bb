"""What a shape costs in K-quants: rows that are no multiple of 256 weights get a larger type."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES

from mule import fsio
from mule.export.families import read_shape, weight_shapes
from mule.export.gguf import plan_tensors
from mule.export.mixtures import num_bytes
from mule.models.config import ModelConfig
from mule.models.families import family


@dataclass
class Fallback:
    """The matrices of one kind that do not fit, of all blocks."""

    matrix: str  # as GGUF calls it: ffn_down
    row_length: int
    types: dict[str, str]  # wanted -> got in its place
    more_bytes: int

    def in_words(self, type_name: str) -> str:
        """One line for a table."""
        swapped = ", ".join(f"{got} in place of {wanted}" for wanted, got in self.types.items())
        return (
            f"{type_name}: {self.matrix} (rows of {self.row_length:,}) in {swapped}, "
            f"{self.more_bytes / 2**20:+,.2f} MiB"
        )


def fallbacks(config: ModelConfig, type_name: str = "q4_k_m") -> list[Fallback]:
    """What does not get the type that the mixture wants for it; nothing where all rows fit.

    Raises ModelError for a model that no GGUF file can hold.
    """
    with tempfile.TemporaryDirectory() as folder:  # where the exporter reads a shape from
        fsio.write_json(Path(folder) / "config.json", family(config.family).to_hf(config))
        known, shape = read_shape(Path(folder))
    found: dict[tuple[str, int], Fallback] = {}
    for tensor in plan_tensors(known, shape, weight_shapes(known, shape), type_name):
        if tensor.wanted == tensor.type:
            continue
        matrix, row_length = tensor.name.removesuffix(".weight").split(".")[-1], tensor.shape[-1]
        entry = found.setdefault((matrix, row_length), Fallback(matrix, row_length, {}, 0))
        entry.types[tensor.wanted.name] = tensor.type.name
        block, block_bytes = GGML_QUANT_SIZES[tensor.wanted]
        wanted_bytes = math.prod(tensor.shape) * block_bytes // block
        entry.more_bytes += num_bytes(tensor.shape, tensor.type) - wanted_bytes
    return list(found.values())
