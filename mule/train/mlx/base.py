"""The frozen base as mlx-lm's model, and beside its layers the adapter that torch holds."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mule import fsio
from mule.adapters.lora import LoraLinear
from mule.errors import ModelError, UserError
from mule.models.tensor_file import stored_tensors

if TYPE_CHECKING:
    import mlx.nn as nn


def require_mlx() -> None:
    """UserError unless mlx and mlx-lm are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("mlx", "mlx_lm")):
        raise UserError(
            "adapter.engine = mlx needs Apple's mlx and mlx-lm, which are not installed",
            "install the extra: pip install 'mule[mlx]'; or remove adapter.engine",
        )


def load_base(folder: Path, precision: str) -> nn.Module:
    """mlx-lm's model of a folder, frozen, in `precision` (bf16, fp16 or fp32).

    Raises ModelError for a folder whose code would have to run, and for what mlx-lm cannot read.
    """
    require_mlx()
    import mlx.core as mx
    from mlx_lm.utils import load_model

    config = fsio.read_json(folder / "config.json")
    if config.get("model_file"):
        raise ModelError(
            f"{folder}: config.json names a program to run ({config['model_file']})",
            "use a model of a family that mlx-lm knows; Mule runs no code of a model folder",
        )
    for file in sorted(folder.glob("*.safetensors")):
        stored_tensors(file)  # checked before native code reads it
    try:
        model, _ = load_model(folder)
    except (ValueError, FileNotFoundError) as error:
        raise ModelError(
            f"{folder}: mlx-lm cannot read it ({error})", "remove adapter.engine=mlx"
        ) from None
    model.set_dtype({"bf16": mx.bfloat16, "fp16": mx.float16, "fp32": mx.float32}[precision])
    model.freeze()
    return model


@dataclass(frozen=True)
class Adapted:
    """A layer that both sides have: `layer` holds the factors, `twin` computes with them.

    torch has A (r, in) and B (out, r), mlx-lm's LoRALinear their transposes.
    """

    path: tuple[str, ...]
    layer: LoraLinear
    twin: Any

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer.lora_A.weight, self.layer.lora_B.weight

    def hand_over(self) -> None:
        """Copy the factors to mlx, in fp32."""
        import mlx.core as mx

        for key, factor in zip(("lora_a", "lora_b"), self.factors, strict=True):
            self.twin[key] = mx.array(np.ascontiguousarray(factor.detach().float().numpy().T))

    def gradients(self, tree: Any) -> Iterator[torch.Tensor]:
        """Those of A and B out of mlx's tree of gradients."""
        for part in self.path:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        for key, factor in zip(("lora_a", "lora_b"), self.factors, strict=True):
            gradient = torch.from_numpy(np.array(tree[key]).T.copy())
            yield gradient.to(factor.dtype)


def add_adapter(base: nn.Module, name: str, layer: LoraLinear) -> Adapted:
    """Put mlx-lm's LoRA around the layer `name` of the base, in place.

    Its `scale` is the whole factor: our alpha/r, with rsLoRA alpha/sqrt(r).
    """
    from mlx.utils import tree_unflatten
    from mlx_lm.tuner.lora import LoRALinear

    if layer.lora_magnitude_vector is not None:
        raise UserError(
            "adapter.lora.use_dora is not computed by adapter.engine = mlx",
            "remove adapter.lora.use_dora, or adapter.engine=mlx",
        )
    modules: dict[str, Any] = dict(base.named_modules())
    if name not in modules:
        raise ModelError(
            f"mlx-lm's model has no layer {name}", "remove adapter.engine=mlx, or name other layers"
        )
    twin = LoRALinear.from_base(
        modules[name], r=layer.lora_A.out_features, dropout=layer.dropout, scale=layer.scale
    )
    twin.linear.freeze()
    base.update_modules(tree_unflatten([(name, twin)]))
    return Adapted(tuple(name.split(".")), layer, twin)
