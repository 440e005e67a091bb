"""The models that a merge is compared with, each block of them in memory only while it computes.

An adapter of QLoRA was trained on a base in 4 bits, so on other weights than the folder's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from mule.adapters.delta import Delta
from mule.adapters.lora import attach, merge_lora
from mule.adapters.nf4 import QUANTIZED, NF4Linear, round_trip
from mule.adapters.qlora import block_matrices
from mule.export.merge_probe import Distance, Rows, distance, logits_of
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.stored import Names
from mule.models.streamed import WeightReader, streamed_decoder

# (name of a weight, its values) -> what an adapter was trained on
Values = Callable[[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Forms:
    """A base, with the values that an adapter is merged into, and the adapter on it; in fp32."""

    folder: Path
    config: ModelConfig
    deltas: Mapping[str, Delta]
    values: Values | None = None

    def base(self) -> Decoder:
        return streamed_decoder(self.config, self._fill)

    def adapter(self) -> Decoder:
        """As it is served, not merged."""
        return streamed_decoder(self.config, self._fill_adapter)

    def merged(self, dtypes: Mapping[str, torch.dtype] | None = None) -> Decoder:
        """The adapter folded in, in fp32; then rounded to `dtypes`, by the names of weights."""

        def fill(name: str, part: nn.Module) -> None:
            self._fill_adapter(name, part)
            merge_lora(part)
            for stored, place in self._stored(name, part) if dtypes else ():
                place.copy_(place.to((dtypes or {})[self._reader.stored_name(stored)]))

        return streamed_decoder(self.config, fill)

    def in_4_bits(self, *, double_quant: bool) -> Decoder:
        """The adapter on the base as QLoRA trains it."""

        def fill(name: str, part: nn.Module) -> None:
            self._fill(name, part)
            for layer, linear in list(part.named_modules()) if ".layers." in name else ():
                if isinstance(linear, nn.Linear):
                    weight = linear.weight.detach()
                    small = NF4Linear(weight, linear.bias, double_quant=double_quant)
                    part.set_submodule(layer, small)
            attach(part, self._of(name))

        return streamed_decoder(self.config, fill)

    @cached_property
    def _reader(self) -> WeightReader:
        return WeightReader(self.folder)

    @cached_property
    def _names(self) -> Names:
        return Names(self.config)

    def _fill(self, name: str, part: nn.Module) -> None:
        for stored, place in self._stored(name, part):
            tensor, values = self._reader.read(stored), self.values
            place.copy_(values(stored, tensor) if values else tensor)

    def _stored(self, name: str, part: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """What the folder calls the weights of a part, with the views of them that are filled."""
        for weight, parameter in part.named_parameters():
            for stored in self._names.parts(f"{name}.{weight}"):
                yield stored, self._names.place(stored).of(parameter.detach())

    def _fill_adapter(self, name: str, part: nn.Module) -> None:
        self._fill(name, part)
        attach(part, self._of(name))

    def _of(self, part: str) -> dict[str, Delta]:
        """The changes in a part, by the names of weights in it."""
        inside = {n: delta for n, delta in self.deltas.items() if n.startswith(f"{part}.")}
        return {name.removeprefix(f"{part}."): delta for name, delta in inside.items()}


def quantized_values(config: ModelConfig, quantized: str) -> Values:
    """The base's weights as training with QLoRA saw them: through 4 bits and back."""
    with torch.device("meta"):
        names = Names(config).all_stored(block_matrices(Decoder(config)))

    def values(name: str, weight: torch.Tensor) -> torch.Tensor:
        return round_trip(weight, quantized) if name in names else weight

    return values


def from_trained(forms: Forms, quantized: str, rows: Rows) -> dict[str, Distance]:
    """How far merging onto the quantised base, and onto the original one, is from what was trained.

    That is the adapter on the base in 4 bits. In fp32, before rounding to the type of the output.
    """
    original = replace(forms, values=None)
    seen = replace(forms, values=quantized_values(forms.config, quantized))
    trained = logits_of(original.in_4_bits(double_quant=quantized == QUANTIZED[True]), rows)
    return {
        "quantized": distance(rows, trained, logits_of(seen.merged(), rows)),
        "original": distance(rows, trained, logits_of(original.merged(), rows)),
    }
