"""The decoder's forward pass in C++ (decoder.cpp), on the weights where torch has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from mule.errors import ModelError
from mule.generate.forward import Part
from mule.generate.native.build import library
from mule.models.block import Block
from mule.models.cache import SlotCache
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.mlp import GatedMLP
from mule.models.norm import RMSNorm
from mule.models.rope import Angles, changes_at, local_angles, model_angles

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)
_ROPES = ("none", "full", "local")
_OURS = {f"mule.models.{name}" for name in ("decoder", "block", "attention", "mlp")}


class _Layer(ctypes.Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = (
        ("matrices", _POINTER * len(_MATRICES)),
        ("biases", _POINTER * len(_MATRICES)),
        ("norms", _POINTER * len(_NORMS)),
        ("window", _LONG),
        ("rope", _LONG),
    )


class _Model(ctypes.Structure):
    """`Model` of decoder.cpp."""

    _fields_ = (
        *((name, _LONG) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "inner")),
        *((name, _LONG) for name in ("vocabulary", "context", "slots", "turned")),
        *((name, _LONG) for name in ("is_bf16", "is_gelu", "threads")),
        *((name, _FLOAT) for name in ("norm_eps", "attention_scale", "residual_scale")),
        *((name, _FLOAT) for name in ("embedding_scale", "logit_scale", "logit_softcap")),
        *((name, _POINTER) for name in ("layer", "embedding", "head", "final_norm")),
        *((name, _POINTER) for name in ("keys", "values")),
        ("cos", _POINTER * 3),
        ("sin", _POINTER * 3),
    )


class _Tokens(ctypes.Structure):
    """`Tokens` of decoder.cpp."""

    _fields_ = (
        ("count", _LONG),
        *((name, _POINTER) for name in ("ids", "slots", "positions", "is_long")),
        ("wanted_count", _LONG),
        ("wanted", _POINTER),
    )


def can_be_native(model: Decoder) -> bool:
    """Whether the C++ computes this model: on the processor, in fp32 or bf16, without adapters."""
    weights = list(model.parameters())
    dtypes = {weight.dtype for weight in weights}
    plain = {nn.Linear, nn.Embedding, RMSNorm, nn.ModuleList}
    return (
        all(weight.device.type == "cpu" and weight.is_contiguous() for weight in weights)
        and dtypes in ({torch.float32}, {torch.bfloat16})
        and type(model) is Decoder
        and all(type(m) in plain or type(m).__module__ in _OURS for m in model.modules())
        and library() is not None
    )


class NativeForward:
    """A `Forward` for models that `can_be_native`.

    A token's logits depend on its own conversation only, to the last bit. The weights are read
    where they are and must not move; norms and biases are those of now.
    """

    chunk_tokens, idle_chunk_tokens = 128, 512

    def __init__(self, model: Decoder, num_slots: int, context_tokens: int) -> None:
        loaded = library()
        assert loaded is not None
        self._library, self._model = loaded, model
        self._vocab_size = model.config.vocab_size
        self._long_text = changes_at(model.config)
        self.cache = SlotCache(model.config, num_slots, context_tokens, model.lm_head.weight)
        self._kept: list[torch.Tensor] = []  # what the pointers point at
        self._layers = (_Layer * model.config.num_layers)(*map(self._layer, model.model.layers))
        self._native = self._described(model, num_slots, context_tokens)
        sizes = [ctypes.sizeof(kind) for kind in (_Layer, _Model, _Tokens)]
        assert sizes == [loaded.mule_sizes(n) for n in range(3)]

    def extend(self, parts: Sequence[Part]) -> torch.Tensor:
        """Append every part to its slot; logits (n, V) fp32 of the wanted parts."""
        ids = np.concatenate([np.asarray(part.ids, np.int64) for part in parts])
        lengths = [len(part.ids) for part in parts]
        slots = np.repeat(np.array([part.slot for part in parts], np.int64), lengths)
        positions = np.concatenate(
            [np.arange(part.start, part.start + len(part.ids), dtype=np.int64) for part in parts]
        )
        is_long = np.repeat(np.array([self._is_long(part) for part in parts], np.uint8), lengths)
        last = np.cumsum(lengths) - 1
        wanted = last[[part.wanted for part in parts]].astype(np.int64)
        self._check(ids, positions)
        tokens = _Tokens(
            len(ids),
            *(array.ctypes.data for array in (ids, slots, positions, is_long)),
            len(wanted),
            wanted.ctypes.data,
        )
        logits = torch.empty(len(wanted), self._vocab_size)
        failed = self._library.mule_forward(
            ctypes.byref(self._native), ctypes.byref(tokens), logits.data_ptr()
        )
        if failed:
            raise ModelError("there is no memory left for this step", "serve fewer rows at once")
        return logits

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        """Give a slot the first tokens of another."""
        self.cache.copy(source, destination, num_tokens)

    def clear(self, slot: int) -> None:
        """Nothing to do: what a slot does not hold is never read."""

    def _is_long(self, part: Part) -> bool:
        return self._long_text is not None and part.text_tokens > self._long_text

    def _check(self, ids: np.ndarray, positions: np.ndarray) -> None:
        """C++ reads and writes where it is told to."""
        assert 0 <= ids.min() and ids.max() < self._vocab_size
        assert 0 <= positions.min() and positions.max() < self._native.context

    # ------------------------------------------------------------ the model, as C++ sees it

    def _described(self, model: Decoder, num_slots: int, context_tokens: int) -> _Model:
        c = model.config
        head = model.lm_head.weight
        short, long, local = self._tables(c, context_tokens)
        scale = head.new_full((), c.embedding_scale)  # rounded to the weights' precision
        return _Model(
            layers=c.num_layers,
            hidden=c.hidden_size,
            heads=c.num_heads,
            kv_heads=c.num_kv_heads,
            head_dim=c.head_dim,
            inner=c.intermediate_size,
            vocabulary=c.vocab_size,
            context=self.cache.keys.shape[3],
            slots=num_slots,
            turned=c.turned_dim,
            is_bf16=head.dtype == torch.bfloat16,
            is_gelu=c.activation == "gelu_tanh",
            threads=torch.get_num_threads(),
            norm_eps=c.norm_eps,
            attention_scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            residual_scale=c.residual_scale,
            embedding_scale=scale.item(),
            logit_scale=c.logit_scale,
            logit_softcap=c.logit_softcap or 0.0,
            layer=ctypes.addressof(self._layers),
            embedding=model.model.embed_tokens.weight.data_ptr(),
            head=head.data_ptr(),
            final_norm=self._norm(model.model.norm),
            keys=self.cache.keys.data_ptr(),
            values=self.cache.values.data_ptr(),
            cos=(_POINTER * 3)(short[0], long[0], local[0]),
            sin=(_POINTER * 3)(short[1], long[1], local[1]),
        )

    def _tables(self, c: ModelConfig, context_tokens: int) -> list[tuple[int | None, int | None]]:
        """cos and sin of every position: of short texts, of long ones, of the sliding layers."""
        positions = torch.arange(context_tokens)[None]
        short = model_angles(positions, c, cached_length=1)
        long = None
        if self._long_text is not None:
            long = model_angles(positions, c, cached_length=self._long_text + 1)
        local = local_angles(positions, c) if c.rope_local_theta is not None else None
        return [self._kept_angles(angles) for angles in (short, long, local)]

    def _kept_angles(self, angles: Angles | None) -> tuple[int | None, int | None]:
        if angles is None:
            return None, None
        return self._keep(angles[0]), self._keep(angles[1])

    def _layer(self, block: nn.Module) -> _Layer:
        assert isinstance(block, Block) and isinstance(block.mlp, GatedMLP)
        attention, mlp, rows = block.self_attn, block.mlp, block.self_attn.sizes
        if attention.fused:
            qkv = _split(attention.qkv_proj, rows)
            gate_up = _split(mlp.gate_up_proj, [mlp.gate_up_proj.out_features // 2] * 2)
        else:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            qkv = [(p.weight, p.bias) for p in projections]
            gate_up = [(p.weight, p.bias) for p in (mlp.gate_proj, mlp.up_proj)]
        o, down = attention.o_proj, mlp.down_proj
        found = [*qkv, (o.weight, o.bias), *gate_up, (down.weight, down.bias)]
        norms = dict(block.named_modules())
        return _Layer(
            matrices=(_POINTER * len(_MATRICES))(*(weight.data_ptr() for weight, _ in found)),
            biases=(_POINTER * len(_MATRICES))(
                *(None if bias is None else self._keep(bias) for _, bias in found)
            ),
            norms=(_POINTER * len(_NORMS))(*(self._norm(norms.get(name)) for name in _NORMS)),
            window=block.kind.window or 0,
            rope=_ROPES.index(block.kind.rope),
        )

    def _norm(self, norm: nn.Module | None) -> int | None:
        if norm is None:
            return None
        assert isinstance(norm, RMSNorm)
        weight = norm.weight.detach().float()
        return self._keep(1.0 + weight if norm.plus_one else weight)

    def _keep(self, values: torch.Tensor) -> int:
        """The place of a copy in fp32 that lives as long as this."""
        self._kept.append(values.detach().float().contiguous().clone())
        return self._kept[-1].data_ptr()


def _split(fused: nn.Linear, rows: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The weights and biases of projections that are one matrix, as views."""
    weights = fused.weight.split(list(rows))
    biases = [None] * len(rows) if fused.bias is None else fused.bias.split(list(rows))
    return list(zip(weights, biases, strict=True))
