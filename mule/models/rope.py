"""Rotary positions. Source: Su et al. 2021 (RoFormer), equation 34, in Llama's half-split layout.

The kinds of scaling compute in fp32 and in the order of transformers' modeling_rope_utils: a
frequency off by one rounding turns by 0.01 at position 100,000.
"""

from __future__ import annotations

import math

import torch

from mule.models.config import ModelConfig, RopeScaling

Angles = tuple[torch.Tensor, torch.Tensor]


def rope_angles(positions: torch.Tensor, dim: int, theta: float) -> Angles:
    """cos and sin of every position, each (B, 1, T, dim / 2) fp32, for positions (B, T)."""
    return _turned(positions, _frequencies(dim, theta, positions.device))


def model_angles(
    positions: torch.Tensor, config: ModelConfig, *, cached_length: int | torch.Tensor | None = None
) -> Angles:
    """`rope_angles` as `config` scales them.

    `cached_length` is what a cache will hold with these tokens, (B,) where rows differ; None: rows
    stand for themselves, documents in them too, each of whose positions begin at 0.
    """
    scaling, dim = config.rope_scaling, config.turned_dim
    if scaling is None:
        return rope_angles(positions, dim, config.rope_theta)
    plain = _frequencies(dim, config.rope_theta, positions.device)
    if scaling.kind == "longrope":
        frequencies = _longrope(positions, plain, scaling, cached_length)
    else:
        frequencies = _STRETCH[scaling.kind](plain, config, scaling)
    cos, sin = _turned(positions, frequencies)
    magnitude = attention_factor(config)
    return (cos, sin) if magnitude == 1.0 else (cos * magnitude, sin * magnitude)


def local_angles(positions: torch.Tensor, config: ModelConfig) -> Angles:
    """`rope_angles` of the sliding layers of a model that gives them a base of their own."""
    assert config.rope_local_theta is not None
    return rope_angles(positions, config.turned_dim, config.rope_local_theta)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, head_dim); computed in fp32.

    D is twice the angles' last size; channels beyond D stay as they are.
    """
    dim = 2 * cos.shape[-1]
    first, second = x[..., :dim].float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    rotated = rotated.to(x.dtype)
    return rotated if dim == x.shape[-1] else torch.cat((rotated, x[..., dim:]), dim=-1)


def attention_factor(config: ModelConfig) -> float:
    """What cos and sin are multiplied by. Source: Peng et al. 2023 (YaRN), equation 22, and Ding et
    al. 2024 (LongRoPE) as Phi-3 computes it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor = _factor(config, scaling)
    if scaling.kind == "longrope":
        original = scaling.original_max_position_embeddings or config.max_position_embeddings
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(factor, scaling.mscale) / _mscale(factor, scaling.mscale_all_dim)
    return _mscale(factor, 1.0)


def changes_at(config: ModelConfig) -> int | None:
    """Beyond how many tokens all positions turn otherwise, also those before; None: never."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return None
    return scaling.original_max_position_embeddings or config.max_position_embeddings


def _frequencies(dim: int, theta: float, device: torch.device) -> torch.Tensor:
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    return theta**-exponents


def _turned(positions: torch.Tensor, frequencies: torch.Tensor) -> Angles:
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def _factor(config: ModelConfig, scaling: RopeScaling) -> float:
    if scaling.factor is not None:
        return scaling.factor
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    return config.max_position_embeddings / original


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _linear(plain: torch.Tensor, config: ModelConfig, scaling: RopeScaling) -> torch.Tensor:
    """Positions divided by the factor. Source: Chen et al. 2023 (position interpolation)."""
    return plain / _factor(config, scaling)


def _llama3(plain: torch.Tensor, config: ModelConfig, scaling: RopeScaling) -> torch.Tensor:
    """Long waves divided by the factor, short ones kept, a ramp between. Source: Llama 3.1's code."""
    assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
    factor, low, high = _factor(config, scaling), scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    wavelengths = 2 * math.pi / plain
    share = (original / wavelengths - low) / (high - low)
    ramp = (1 - share) * plain / factor + share * plain
    stretched = torch.where(wavelengths > original / low, plain / factor, ramp)
    return torch.where(wavelengths < original / high, plain, stretched)


def _yarn(plain: torch.Tensor, config: ModelConfig, scaling: RopeScaling) -> torch.Tensor:
    """Source: Peng et al. 2023 (YaRN), section 3.2 (NTK-by-parts)."""
    dim, theta = config.turned_dim, config.rope_theta
    original = scaling.original_max_position_embeddings or config.max_position_embeddings

    def channel(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast or 32), channel(scaling.beta_slow or 1)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp would have no width
    channels = torch.arange(dim // 2, dtype=torch.float32, device=plain.device)
    share = ((channels - low) / (high - low)).clamp(0, 1)  # of interpolation
    return plain / _factor(config, scaling) * share + plain * (1 - share)


def _longrope(
    positions: torch.Tensor,
    plain: torch.Tensor,
    scaling: RopeScaling,
    cached_length: int | torch.Tensor | None,
) -> torch.Tensor:
    """The short factors, or the long ones for a text beyond the original length: that of the whole
    text, for all its positions. Source: Ding et al. 2024 (LongRoPE), as Phi-3 computes it."""
    short, long = (
        plain / plain.new_tensor(factors) for factors in (scaling.short_factor, scaling.long_factor)
    )
    original = scaling.original_max_position_embeddings
    if original is None:
        return short
    if isinstance(cached_length, torch.Tensor):
        return torch.where((cached_length > original)[:, None, None, None], long, short)
    if (cached_length or positions.shape[1]) <= original:
        return short
    if cached_length is not None:
        return long
    is_long = _document_lengths(positions) > original
    return torch.where(is_long[:, None, :, None], long, short)


def _document_lengths(positions: torch.Tensor) -> torch.Tensor:
    """(B, T): the length of every token's document, in rows whose documents begin at position 0."""
    starts = torch.arange(positions.shape[1], device=positions.device) - positions
    longest = torch.zeros_like(positions).scatter_reduce(1, starts, positions, "amax")
    return longest.gather(1, starts) + 1


_STRETCH = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
