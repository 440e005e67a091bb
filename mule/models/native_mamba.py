"""The convolution and the decays of state-space layers in C++ (mule/native/convolution.h, decay.h).

Each is one opaque operation for the compiler, whose own kernels take three to ten times as long on a
processor (docs/log.md). All arithmetic is fp32.

Shapes: R rows, T tokens, C channels, K taps; c chunks of Q tokens, G groups, H heads of a group.
"""

from __future__ import annotations

import ctypes

import torch

from mule.models import native_training

_VECTOR = 16  # channels, and tokens of a chunk, are a multiple: whole vectors on every processor
_TAPS = (2, 3, 4)
_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Convolution(ctypes.Structure):
    """`Job` of convolution.h."""

    _fields_ = (
        *((name, _LONG) for name in ("is_bf16", "rows", "tokens", "channels", "taps", "threads")),
        *(("x", _POINTER), ("x_row", _LONG), ("x_token", _LONG)),
        *((name, _POINTER) for name in ("weight", "bias", "segments", "y")),
        *((name, _POINTER) for name in ("grad_y", "grad_x", "grad_weight", "grad_bias")),
        *(("reach", _POINTER), ("room", _POINTER)),
    )


class _Decay(ctypes.Structure):
    """`Job` of decay.h."""

    _fields_ = (
        *((name, _LONG) for name in ("is_bf16", "chunks", "tokens", "groups", "heads", "threads")),
        *((name, _POINTER) for name in ("scores", "log_decay", "segments", "weights")),
        *((name, _POINTER) for name in ("grad_weights", "grad_scores", "grad_log_decay", "room")),
    )


# ---------------------------------------------------------------- the convolution


def convolves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (R, T, C) can be convolved here, with `weight` (C, 1, K)."""
    channels, _, taps = weight.shape
    is_shaped = channels % _VECTOR == 0 and taps in _TAPS and x.dtype == weight.dtype
    return is_shaped and native_training.serves(x)


@torch.library.custom_op("mule::causal_conv", mutates_args=())
def causal_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    segments: torch.Tensor | None,
) -> torch.Tensor:
    """`CausalConv.forward` of x (R, T, C), `weight` (C, 1, K), `bias` (C), `segments` (R, T)."""
    y = x.new_empty(x.shape)
    _convolve("mule_convolution", (x, weight, bias, segments), y=y)
    return y


@causal_conv.register_fake
def _(x, weight, bias, segments):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


@torch.library.custom_op("mule::causal_conv_backward", mutates_args=())
def _conv_backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias."""
    channels, _, taps = weight.shape
    grad_x = x.new_empty(x.shape)
    grad_weight = torch.empty(taps, channels, dtype=torch.float32)
    grad_bias = torch.empty(channels, dtype=torch.float32)
    _convolve(
        "mule_convolution_backward",
        (x, weight, bias, segments),
        grad_y=grad_y.contiguous(),
        grad_x=grad_x,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
    )
    own = grad_weight.flip(0).T[:, None].contiguous()
    return grad_x, own.to(weight.dtype), grad_bias.to(weight.dtype)


@_conv_backward.register_fake
def _(grad_y, x, weight, bias, segments):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), torch.empty_like(weight), weight.new_empty(len(weight))


def _convolve(
    function: str,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    **others: torch.Tensor,
) -> None:
    x, weight, bias, segments = inputs
    x = x if x.stride(-1) == 1 else x.contiguous()
    by_tap = weight.detach()[:, 0].T.flip(0).contiguous()  # the token's own first
    bias = None if bias is None else bias.detach().to(x.dtype).contiguous()
    segments = None if segments is None else segments.contiguous()
    job = _Convolution(
        x.dtype == torch.bfloat16,
        *(*x.shape, len(by_tap), torch.get_num_threads()),
        *(x.data_ptr(), x.stride(0), x.stride(1)),
        *(_address(by_tap), _address(bias), _address(segments)),
        **{name: tensor.data_ptr() for name, tensor in others.items()},
    )
    reach = torch.empty(x.shape[:2], dtype=torch.int32)
    job.reach = reach.data_ptr()
    _run(function, "mule_convolution_room", job)


def _keep_conv(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate_conv(ctx, grad_y):  # type: ignore[no-untyped-def]
    x, weight, bias, segments = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _conv_backward(grad_y, x, weight, bias, segments)
    return grad_x, grad_weight, None if bias is None else grad_bias, None


causal_conv.register_autograd(_differentiate_conv, setup_context=_keep_conv)


# ---------------------------------------------------------------- decays


def decays(scores: torch.Tensor) -> bool:
    """Whether scores (R, c, G, Q, Q) can be decayed here."""
    return scores.shape[-1] % _VECTOR == 0 and native_training.serves(scores)


@torch.library.custom_op("mule::decayed", mutates_args=())
def decayed(
    scores: torch.Tensor, log_decay: torch.Tensor, segments: torch.Tensor | None
) -> torch.Tensor:
    """Scores (R, c, G, Q, Q) times what each token's share has decayed by, (R, c, G, H, Q, Q); 0 where
    a token sees nothing: what comes after it, and other documents.

    `log_decay` (R, c, Q, G, H) fp32, `segments` (R, c, Q).
    """
    heads = log_decay.shape[-1]
    weights = scores.new_empty(*scores.shape[:3], heads, *scores.shape[3:])
    _decay("mule_decay", (scores, log_decay, segments), weights=weights)
    return weights


@decayed.register_fake
def _(scores, log_decay, segments):  # type: ignore[no-untyped-def]
    return scores.new_empty(*scores.shape[:3], log_decay.shape[-1], *scores.shape[3:])


@torch.library.custom_op("mule::decayed_backward", mutates_args=())
def _decayed_backward(
    grad_weights: torch.Tensor,
    scores: torch.Tensor,
    log_decay: torch.Tensor,
    segments: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of scores and log_decay."""
    grad_scores, grad_decay = scores.new_empty(scores.shape), log_decay.new_empty(log_decay.shape)
    _decay(
        "mule_decay_backward",
        (scores, log_decay, segments),
        grad_weights=grad_weights.contiguous(),
        grad_scores=grad_scores,
        grad_log_decay=grad_decay,
    )
    return grad_scores, grad_decay


@_decayed_backward.register_fake
def _(grad_weights, scores, log_decay, segments):  # type: ignore[no-untyped-def]
    return scores.new_empty(scores.shape), log_decay.new_empty(log_decay.shape)


def _decay(
    function: str,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    **others: torch.Tensor,
) -> None:
    scores, log_decay, segments = (t if t is None else t.contiguous() for t in inputs)
    assert scores is not None and log_decay is not None
    rows, chunks, tokens, groups, heads = log_decay.shape
    job = _Decay(
        scores.dtype == torch.bfloat16,
        *(rows * chunks, tokens, groups, heads, torch.get_num_threads()),
        *(_address(scores), _address(log_decay), _address(segments)),
        **{name: tensor.data_ptr() for name, tensor in others.items()},
    )
    _run(function, "mule_decay_room", job)


def _keep_decayed(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate_decayed(ctx, grad_weights):  # type: ignore[no-untyped-def]
    return *_decayed_backward(grad_weights, *ctx.saved_tensors), None


decayed.register_autograd(_differentiate_decayed, setup_context=_keep_decayed)


# ---------------------------------------------------------------- calling


def _run(function: str, room_of: str, job: _Convolution | _Decay) -> None:
    """Call with room for each thread: torch's, so that a lack of memory is met as any other."""
    library = native_training.library()
    floats = getattr(library, room_of)(ctypes.byref(job))
    room = torch.empty(job.threads * floats, dtype=torch.float32)
    job.room = room.data_ptr()
    getattr(library, function)(ctypes.byref(job))


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
