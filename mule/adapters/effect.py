"""How much an adapter changes its base: the size of the update beside that of the weights."""

from __future__ import annotations

import torch

from mule.adapters.lora import LoraLinear, dense_weight, lora_layers
from mule.models.decoder import Decoder


class AdapterEffect:
    """Of a model's adapted layers; the sizes of the frozen weights are measured once."""

    def __init__(self, model: Decoder) -> None:
        is_elsewhere = any(weight.is_meta for weight in model.parameters())  # in mlx's memory
        self._layers = [] if is_elsewhere else [layer for _, layer in lora_layers(model)]
        self._weights: float | None = None

    @torch.no_grad()
    def change(self) -> float | None:
        """|scale B A| / |W| over all layers together (Frobenius); None without an adapter.

        With DoRA the changed magnitudes count too; what PiSSA took out of W is no change.
        """
        if not self._layers:
            return None
        if self._weights is None:
            self._weights = sum(_square(dense_weight(x.base_layer)) for x in self._layers)
        changed = sum(map(_update_square, self._layers))
        return (changed / max(self._weights, 1e-30)) ** 0.5


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().sum())


def _update_square(layer: LoraLinear) -> float:
    """|B A|^2 without making B A: the sum over B^T B times A A^T."""
    down, up = layer.lora_A.weight.float(), layer.lora_B.weight.float()
    if layer.start_A is not None and layer.start_B is not None:
        down = torch.cat((down, layer.start_A.to(down.device)))
        up = torch.cat((up, -layer.start_B.to(up.device)), dim=1)
    square = float(((up.T @ up) * (down @ down.T)).sum()) * layer.scale**2
    if layer.lora_magnitude_vector is not None:
        moved = layer.lora_magnitude_vector.float() - layer.row_squares.sqrt()
        square += _square(moved)
    return max(square, 0.0)
