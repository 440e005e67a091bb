"""Low-rank adapters on our decoder: LoRA, rsLoRA and DoRA, with PEFT's semantics and names.

Sources: Hu et al. 2021, section 4.1 (LoRA): y = W x + (alpha / r) B A x; Kalajdzievski 2023
(rsLoRA): alpha / sqrt(r); Liu et al. 2024 (DoRA), equation 5 and section 4.3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from mule.adapters.delta import Delta, read_deltas
from mule.adapters.lora_files import DOWN, MAGNITUDE, PREFIX, UP, lora_scale
from mule.adapters.nf4 import FixedBuffers, NF4Linear
from mule.config.adapter import LoraSection
from mule.config.hints import near
from mule.errors import ModelError
from mule.models.decoder import Decoder
from mule.models.stored import Names

BaseLinear = nn.Linear | NF4Linear


class LoraLinear(FixedBuffers):
    """A frozen linear layer and its low-rank update: y = W x + b + scale B A x.

    With DoRA the rows of W + scale B A have the lengths in `lora_magnitude_vector` instead of their
    own; as in the paper, no gradient flows through their own.
    """

    lora_magnitude_vector: nn.Parameter | None
    row_squares: torch.Tensor  # with DoRA: the squared lengths of the rows of W, fp32
    start_A: torch.Tensor | None  # with PiSSA: what was taken out of W, A0 and B0, fp32
    start_B: torch.Tensor | None

    def __init__(
        self, base: BaseLinear, r: int, scale: float, *, dropout: float, dora: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.scale, self.dropout = base, scale, dropout
        self.lora_A = nn.Linear(base.in_features, r, bias=False)
        self.lora_B = nn.Linear(r, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("start_A", None, persistent=False)
        self.register_buffer("start_B", None, persistent=False)
        self.lora_magnitude_vector = None
        if dora:
            squares = dense_weight(base).square().sum(dim=1)
            self.register_buffer("row_squares", squares, persistent=False)
            self.lora_magnitude_vector = nn.Parameter(squares.sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        dropped = F.dropout(x, self.dropout, True) if self.dropout and self.training else x
        update = self.lora_B(self.lora_A(dropped) * self.scale)
        if self.lora_magnitude_vector is None:
            return y + update
        factor = (self.lora_magnitude_vector.float() / self._row_lengths()).to(x.dtype)
        if dropped is x:
            scaled = factor * (self._without_bias(y) + update)
            return scaled if self.base_layer.bias is None else scaled + self.base_layer.bias
        base = self._without_bias(self.base_layer(dropped))
        return y + (factor - 1) * base + factor * update

    def _without_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.base_layer.bias is None else y - self.base_layer.bias

    @torch.no_grad()
    def _row_lengths(self) -> torch.Tensor:
        """Of W + scale B A, fp32 (out,), without making it: |w|^2 + 2 s w.u + s^2 |u|^2, u = B A."""
        down, up = self.lora_A.weight, self.lora_B.weight.float()
        across = self._without_bias(self.base_layer(down)).float().T  # W A^T, (out, r)
        within = up @ (down.float() @ down.float().T)  # B A A^T, (out, r)
        change = (up * (2 * self.scale * across + self.scale**2 * within)).sum(dim=1)
        return (self.row_squares + change).clamp(min=1e-30).sqrt()


def dense_weight(layer: BaseLinear) -> torch.Tensor:
    """The weight (out, in) of a frozen layer, fp32."""
    return layer.dense() if isinstance(layer, NF4Linear) else layer.weight.detach().float()


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapted layers, by their names in transformers."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def add_lora(model: Decoder, settings: LoraSection, *, seed: int = 0) -> None:
    """Freeze `model` and put a fresh adapter (B = 0) beside each targeted layer, in place.

    ModelError when a target or `last_layers` names what the model does not have.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in targeted(model, settings):
            scale = lora_scale(settings.r, settings.alpha, rslora=settings.use_rslora)
            _wrap(model, name, settings.r, scale, dropout=settings.dropout, dora=settings.use_dora)


def targeted(model: Decoder, settings: LoraSection) -> list[str]:
    """The names of the layers that get an adapter: the blocks' linear layers that are named by
    themselves or by their ends, in the last blocks only when `last_layers` says so."""
    num_layers = model.config.num_layers
    if settings.last_layers > num_layers:
        raise ModelError(
            f"adapter.lora.last_layers = {settings.last_layers}, but the model has {num_layers} "
            "blocks",
            f"set adapter.lora.last_layers to {num_layers} or less, or to -1 for all",
        )
    first = settings.first_block(num_layers)
    linear, elsewhere = _by_their_names(model)
    found: set[str] = set()
    for target in linear if settings.target_modules == "all-linear" else settings.target_modules:
        named = {name for name in linear if f".{name}".endswith(f".{target}")}
        if other := [name for name in elsewhere if f".{name}".endswith(f".{target}")]:
            raise _other_name(target, other[0], elsewhere[other[0]], linear)
        if not named:
            raise _unknown_target(target, linear)
        found |= {name for name in named if _block_of(name) >= first}
    if not found:
        raise ModelError(
            f"adapter.lora.target_modules names layers below the last {settings.last_layers} blocks "
            "only: nothing would be adapted",
            "remove adapter.lora.last_layers, or name layers of these blocks",
        )
    return [name for name in linear if name in found]


def _linear_layers(model: Decoder) -> Iterator[tuple[str, BaseLinear]]:
    """The linear layers of the blocks, by name; an adapter's own are not among them."""
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, BaseLinear) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


def _by_their_names(model: Decoder) -> tuple[list[str], dict[str, str]]:
    """The linear layers that files call what we do, and those that they call something else."""
    names, linear, elsewhere = Names(model.config), [], {}
    for name, _ in _linear_layers(model):
        stored = names.parts(f"{name}.weight")
        if stored == (f"{name}.weight",):
            linear.append(name)
        else:
            elsewhere[name] = stored[0].removesuffix(".weight")
    return linear, elsewhere


def _other_name(target: str, name: str, stored: str, linear: list[str]) -> ModelError:
    ends = dict.fromkeys(one.rpartition(".")[2] for one in linear)
    return ModelError(
        f"adapter.lora.target_modules names {target}: files of this family call {name} {stored}, and "
        "no program would find the adapter of this layer again",
        f"choose among {', '.join(ends)}",
    )


def _unknown_target(target: str, linear: list[str]) -> ModelError:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    if target.rpartition(".")[2] in ("lm_head", "embed_tokens"):
        return ModelError(
            f"adapter.lora.target_modules names {target}: Mule adapts the linear layers of blocks, "
            "not the embedding or the head",
            f"choose among {', '.join(ends)}",
        )
    close = near(target, linear if "." in target else ends)
    meant = f"; did you mean {close}?" if close else ""
    return ModelError(
        f"adapter.lora.target_modules names {target}, which the model does not have{meant}",
        f"choose among {', '.join(ends)}",
    )


def _block_of(name: str) -> int:
    number = re.search(r"\.layers\.(\d+)\.", f".{name}")
    assert number is not None
    return int(number[1])


def _wrap(
    model: nn.Module, name: str, r: int, scale: float, *, dropout: float, dora: bool
) -> LoraLinear:
    base = model.get_submodule(name)
    assert isinstance(base, BaseLinear)
    layer = LoraLinear(base, r, scale, dropout=dropout, dora=dora)
    device = dense_device(base)
    if device.type != "meta":  # there, another library holds the base, and this is its adapter
        for part in (layer.lora_A, layer.lora_B):
            part.to(device)
    model.set_submodule(name, layer)
    return layer


def dense_device(layer: BaseLinear) -> torch.device:
    return (layer.codes if isinstance(layer, NF4Linear) else layer.weight).device


def lora_state(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapter weights under the names of PEFT's files, from names in the model."""
    return {PREFIX + name: tensor for name, tensor in named.items() if ".lora_" in name}


def load_lora(model: Decoder, folder: Path | str) -> None:
    """Add the adapter of `folder` to `model`, each layer with its own rank and scale.

    ModelError when it is of another kind, or does not fit the model.
    """
    deltas = read_deltas(folder)
    check_fits(model, deltas, folder)
    model.requires_grad_(False)
    attach(model, deltas)


def attach(root: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Put the adapter of each weight, by its name below `root`, beside its layer."""
    for name, delta in deltas.items():
        module = name.removesuffix(".weight")
        layer = _wrap(root, module, delta.r, delta.scale, dropout=0.0, dora=delta.use_dora)
        fill(layer, delta.tensors())


@torch.no_grad()
def fill(layer: LoraLinear, tensors: dict[str, torch.Tensor]) -> None:
    """Copy A, B and m, by the ends of PEFT's names."""
    layer.lora_A.weight.copy_(tensors[DOWN])
    layer.lora_B.weight.copy_(tensors[UP])
    if layer.lora_magnitude_vector is not None:
        layer.lora_magnitude_vector.copy_(tensors[MAGNITUDE])


def check_fits(model: Decoder, deltas: dict[str, Delta], folder: Path | str) -> None:
    """ModelError naming the first weight of the adapter that the model does not have as it is."""
    shapes = {
        f"{name}.weight": (layer.out_features, layer.in_features)
        for name, layer in _linear_layers(model)
    }
    for name, delta in deltas.items():
        if name not in shapes:
            raise ModelError(
                f"{folder}: changes {name}, which is no linear layer of this model's blocks",
                "give the base model that this adapter was trained on",
            )
        if shapes[name] != delta.shape:
            raise ModelError(
                f"{folder}: is for a {name} of shape {delta.shape}; the model's is {shapes[name]}",
                "give the base model that this adapter was trained on",
            )


def _dense_linear(layer: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    """A linear layer of the same shape and bias, its weight still to be set."""
    with torch.device("meta"):
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
    dense.weight = nn.Parameter(
        torch.empty(dense.weight.shape, dtype=dtype, device=dense_device(layer)), False
    )
    dense.register_parameter("bias", layer.bias)
    return dense


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Fold every adapter into its layer in fp32 and remove it; the number of layers changed."""
    layers = list(lora_layers(model))
    for name, layer in layers:
        base, dtype = layer.base_layer, layer.lora_A.weight.dtype
        down, up = layer.lora_A.weight.float(), layer.lora_B.weight.float()
        merged = torch.addmm(dense_weight(base), up, down, alpha=layer.scale)
        if isinstance(base, NF4Linear):  # the sum does not fit into 4 bits
            base = _dense_linear(base, dtype)
        if layer.lora_magnitude_vector is not None:
            lengths = torch.linalg.vector_norm(merged, dim=1)
            merged *= (layer.lora_magnitude_vector.float() / lengths)[:, None]
        base.weight.copy_(merged)
        model.set_submodule(name, base)
    return len(layers)
