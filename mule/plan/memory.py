"""What training takes of memory, in closed form. Pure functions; no torch.

Activations are those of eager PyTorch on a CPU; a compiled run and a GPU, whose norms are one
kernel, keep less. Checked against what PyTorch allocates by tests/unit/test_memory_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from mule.config.schema import LoraSection, Recipe, TrainSection
from mule.models import cost
from mule.models.config import ModelConfig

_ADAMW_BYTES, _MOMENTUM_BYTES = 8, 4  # two moments, or one, in fp32
_8BIT_BYTES = 2 + 8 / 256  # two moments, and a scale of each for every 256 elements
_MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as in bitsandbytes
_LOSS_CHUNK_TOKENS = 512  # as mule.models.loss cuts them
_LOSS_LOGIT_BYTES = 14  # of eager softmax at its peak: logits, fp32 scores, the targets' places
_DENSE_TOKENS = 512  # up to this length the CPU's attention takes a mask, as mule.models.attention
# Temporaries of the backward pass beside what is kept, in what one block keeps; measured.
_AT_WORK = {"none": 0.4, "selective": 1.0, "full": 1.3}
_USABLE_SHARE = 0.7  # the rest is for fragmentation, and for other programs


@dataclass(frozen=True)
class _Tensors:
    """Trained tensors of one kind: how many, of how many elements."""

    count: int
    elements: int
    is_block_matrix: bool = False
    is_head: bool = False

    def moment_bytes(self, optimizer: str) -> float:
        """Bytes of one element's moments; as the rules of mule.train.rules take parameters."""
        if optimizer == "muon" and self.is_block_matrix:
            return _MOMENTUM_BYTES
        is_decayed = self.is_block_matrix or self.is_head
        if optimizer == "adamw8bit" and is_decayed and self.elements >= _MIN_8BIT_ELEMENTS:
            return _8BIT_BYTES
        return _ADAMW_BYTES


def width(precision: str) -> int:
    """Bytes of a number in the forward and backward pass; fp8 exists inside products only."""
    return 4 if precision == "fp32" else 2


def state_bytes(config: ModelConfig, recipe: Recipe, *, accumulates: bool) -> dict[str, int]:
    """Bytes that stay for the whole run: weights, masters, gradients, gradient_sums, moments, average.

    `accumulates` says that an update has several micro-batches. In fp32 the weights are the masters.
    """
    size = width(str(recipe.train.precision))
    tensors = _trained(config, recipe)
    trained = sum(t.count * t.elements for t in tensors)
    frozen = cost.total_params(config) if recipe.adapter.kind == "lora" else 0
    moments = sum(t.count * t.elements * t.moment_bytes(recipe.optim.kind) for t in tensors)
    return {
        "weights": (trained + frozen) * size,
        "masters": trained * 4 if size < 4 else 0,
        "gradients": trained * size,
        "gradient_sums": trained * 4 if accumulates else 0,
        "moments": round(moments),
        "average": trained * 4 if recipe.optim.ema_decay is not None else 0,
    }


def loss_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of the loss whatever the batch: a chunk's logits, and the gradient of the head."""
    chunk = _LOSS_CHUNK_TOKENS * config.vocab_size * _LOSS_LOGIT_BYTES
    return chunk + config.vocab_size * config.hidden_size * width(precision)


def activation_bytes_per_token(
    config: ModelConfig, train: TrainSection, checkpointing: str, mask_length: int = 0
) -> float:
    """Bytes of one token at the peak of the backward pass: what is kept, and the block at work.

    `mask_length` is the row length where attention takes a mask (`mask_length`), else 0.
    """
    block = _block_bytes(config, train, mask_length)
    kept = kept_bytes_per_token(config, train, checkpointing, mask_length)
    return kept + _AT_WORK[checkpointing] * block


def kept_bytes_per_token(
    config: ModelConfig, train: TrainSection, checkpointing: str, mask_length: int = 0
) -> float:
    """Bytes of one token that wait from the forward to the backward pass."""
    size, hidden = width(str(train.precision)), config.hidden_size
    block = {
        "none": _block_bytes(config, train, mask_length),
        "selective": _products_bytes(config, size) + size * hidden,
        "full": size * hidden,
    }[checkpointing]
    # The last norm's two tensors, the loss's gradient, and the rotary angles that all share.
    outside = (8 + size) * hidden + 4 * config.head_dim
    return config.num_layers * block + outside


def mask_length(row_length: int, device: str, *, isolated: bool) -> int:
    """The row length where attention gets a mask over (row, row); 0 where it gets none."""
    by_document = device == "cpu" and row_length > _DENSE_TOKENS
    return row_length if isolated and not by_document else 0


def free_for_activations(
    config: ModelConfig, recipe: Recipe, available_bytes: int, num_shards: int = 1
) -> float:
    """Bytes that activations may take of what is available before the model is made.

    `num_shards` processes divide the state among them.
    """
    accumulates = recipe.train.step_rows != 1
    state = sum(state_bytes(config, recipe, accumulates=accumulates).values()) / num_shards
    left = available_bytes - state - loss_bytes(config, str(recipe.train.precision))
    return max(0.0, _USABLE_SHARE * left)


def _block_bytes(c: ModelConfig, train: TrainSection, mask_length: int) -> float:
    """Bytes that a block keeps of one token when nothing is computed again.

    A norm keeps its input and the normed one in fp32, and what follows keeps its result; SwiGLU
    both projections, the activation and the product; attention q, k, v, y, y with its heads side by
    side, and the mask; dropout its own.
    """
    size = width(str(train.precision))
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    norms = 2 * (8 + size) * c.hidden_size + (8 * (queries + keys) if c.qk_norm else 0)
    attention = size * (3 * queries + 2 * keys + mask_length) + 4 * c.num_heads
    dropped = 2 * size * c.hidden_size if train.dropout else 0
    return norms + attention + 4 * size * c.intermediate_size + dropped


def _products_bytes(c: ModelConfig, size: int) -> float:
    """Bytes of the results of a block's matrix products and attention, for one token."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    attention = size * 2 * (queries + keys) + 4 * c.num_heads
    return attention + size * 2 * (c.hidden_size + c.intermediate_size)


def _trained(config: ModelConfig, recipe: Recipe) -> list[_Tensors]:
    """The tensors that have gradients, masters and moments."""
    layers = config.num_layers
    shapes = _block_matrices(config)
    if recipe.adapter.kind == "lora":
        lora = recipe.adapter.lora
        return [
            _Tensors(layers, lora.r * side, is_block_matrix=True)
            for name in _lora_targets(lora, shapes)
            for side in shapes[name]
        ]
    table = config.vocab_size * config.hidden_size
    norms = cost.layer_params(config) - sum(a * b for a, b in shapes.values())
    matrices = [_Tensors(layers, a * b, is_block_matrix=True) for a, b in shapes.values()]
    head = [] if config.tie_embeddings else [_Tensors(1, table, is_head=True)]
    others = [_Tensors(1, table), _Tensors(1, layers * norms + config.hidden_size)]
    return matrices + head + others


def _lora_targets(lora: LoraSection, shapes: dict[str, tuple[int, int]]) -> list[str]:
    if lora.target_modules == "all-linear":
        return list(shapes)
    return [name for name in lora.target_modules if name in shapes]


def _block_matrices(c: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's linear layers."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    hidden, inner = c.hidden_size, c.intermediate_size
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
