"""From the tensors of a foreign state dict to a model folder, and the proof that nothing changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mule.errors import CheckFailed, ModelError
from mule.models.folder import load_model, model_state
from mule.models.foreign import Part
from mule.models.pickled import Tensor, Unpickled
from mule.models.tensor_file import open_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Half a unit in the last place, relative to the value; a subnormal of fp16 may lose 2^-25.
_ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SUBNORMAL = 2.0**-25
_BLOCK = 128  # rows and columns that share a scale. Source: DeepSeek-V3, section 3.3.2
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class Proof:
    """The folder, read back, against the file: weights with equal bytes, and the others.

    `bit_identical` counts weights whose bytes have the SHA-256 of the original ones (after joining
    what was cut, and widening undone); `rounded` those in a narrower or dequantised type, whose
    greatest difference is relative to the largest value of their tensor.
    """

    bit_identical: int
    rounded: int
    greatest_difference: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def narrowest_dtype(found: Unpickled, parts: Mapping[str, Part]) -> torch.dtype:
    """The narrowest of bf16, fp16 and fp32 that holds every weight as it is; float8 goes to bf16."""
    names = {found.tensors[part.source].dtype for part in parts.values()}
    wide = {name for name in names if not name.startswith("float8")}
    if wide <= {"bfloat16"}:
        return torch.bfloat16
    return torch.float16 if wide == {"float16"} == names else torch.float32


def converted(
    found: Unpickled, parts: Mapping[str, Part], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights of a model folder in `dtype`; a part of a fused matrix is copied out of it.

    Raises ModelError for values that are not finite, before or after the change of type.
    """
    state = {}
    for first, names in _groups(parts):
        whole = _read(found, first)
        for name in names:
            rows = whole[parts[name].start : parts[name].stop]
            state[name] = _narrowed(rows, dtype, first.source)
    return {name: state[name] for name in parts}


@torch.no_grad()
def proven(folder: Path, found: Unpickled, parts: Mapping[str, Part], dtype: torch.dtype) -> Proof:
    """Open the folder as any command would, and compare every weight with the pickle file's.

    Raises CheckFailed when a weight differs by more than the rounding of its type.
    """
    written = model_state(load_model(folder, dtype=dtype))
    if written.keys() != parts.keys():
        raise CheckFailed(
            f"{folder}: holds other weights than were written",
            "report this: a conversion must not lose or add weights",
        )
    identical, rounded, greatest = 0, 0, 0.0
    for first, names in _groups(parts):
        joined = torch.cat([written[name] for name in names])
        if first.scale is None and _is_original(joined, found.tensors[first.source]):
            identical += len(names)
            continue
        rounded += len(names)
        greatest = max(greatest, _rounding(joined, _read(found, first), first.source))
    return Proof(identical, rounded, greatest)


def _is_original(joined: torch.Tensor, original: Tensor) -> bool:
    values = joined.to(getattr(torch, original.dtype)).reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(values).hexdigest() == original.sha256


def _rounding(joined: torch.Tensor, original: torch.Tensor, source: str) -> float:
    """Greatest difference relative to the greatest value; CheckFailed beyond rounding."""
    exact = original if original.dtype == torch.float64 else original.float()
    off = (joined.to(exact.dtype) - exact).abs()
    if (off > exact.abs() * (1.01 * _ROUNDING[joined.dtype]) + _SUBNORMAL).any():
        raise CheckFailed(
            f"{source} differs by {float(off.max()):.3g} from the file's after the conversion",
            "report this: a conversion may only round to the chosen type",
        )
    return float(off.max() / exact.abs().max().clamp(min=1e-30))


def dequantised(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 values of a float8 `weight` (R, C) times its scale.

    A scale is one number, one for each row (R,) or (R, 1), or one for each block of 128 x 128. The
    value is weight x scale for `weight_scale` and `weight_scale_inv` alike: both names are of
    the factor that undoes the quantisation. Raises ValueError for another shape of the scale.
    """
    values, factors = weight.float(), scale.float()
    if factors.numel() == 1:
        return values.mul_(factors.reshape(()))
    rows, columns = values.shape
    if factors.shape in ((rows,), (rows, 1)):
        return values.mul_(factors.reshape(rows, 1))
    if factors.shape != (-(-rows // _BLOCK), -(-columns // _BLOCK)):
        raise ValueError(tuple(factors.shape))
    for number, row in enumerate(factors):
        block = slice(number * _BLOCK, (number + 1) * _BLOCK)
        values[block].mul_(row.repeat_interleave(_BLOCK)[:columns])
    return values


def _read(found: Unpickled, part: Part) -> torch.Tensor:
    """The whole stored tensor of a part as it is, a float8 one as fp32 values."""
    source, scale = part.source, part.scale
    with open_tensors(found.file) as tensors:
        weight = tensors.get_tensor(source)
        factors = tensors.get_tensor(scale) if scale else None
    if weight.dtype in _FLOAT8:
        if factors is None:
            weight = weight.float()
        else:
            try:
                weight = dequantised(weight, factors)
            except ValueError as error:
                raise ModelError(
                    f"{scale} has shape {error}, which is neither one number, nor one for each row "
                    f"of {source} {tuple(weight.shape)}, nor one for each block of 128 x 128",
                    "dequantise the model where it was made, and convert that",
                ) from None
    if not torch.isfinite(weight).all():
        raise ModelError(f"{source} holds NaN or infinite values", "use an earlier checkpoint")
    return weight


def _narrowed(rows: torch.Tensor, dtype: torch.dtype, source: str) -> torch.Tensor:
    weight = rows.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(weight).all():
        raise ModelError(
            f"{source} holds values up to {float(rows.abs().max()):.3g}, beyond {dtype}",
            "keep its range: --dtype bf16",
        )
    return weight


def _groups(parts: Mapping[str, Part]) -> list[tuple[Part, list[str]]]:
    """The weights that were one tensor, in the order of their rows, with the first one's part.

    Two weights may be the same tensor (tied in the file, not in the config): a group each.
    """
    groups: dict[str, list[tuple[Part, list[str]]]] = {}
    for name, part in parts.items():
        if part.start == 0:
            groups.setdefault(part.source, []).append((part, []))
        groups[part.source][-1][1].append(name)
    return [group for same in groups.values() for group in same]
