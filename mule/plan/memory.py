"""What training takes of memory, in closed form. Pure functions; no torch.

Activations are those of eager PyTorch on a CPU; a compiled run and a GPU, whose norms are one
kernel, keep less. Checked against what PyTorch allocates by tests/unit/test_memory_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mule.config.adapter import AdapterSection, LoraSection
from mule.config.schema import Recipe, TrainSection
from mule.models import cost
from mule.models.config import ModelConfig
from mule.plan.block_memory import (
    adapted_matrices,
    attends_natively,
    block_bytes,
    experts_work_bytes,
    linear_layers,
    norm_bytes,
    products_bytes,
)
from mule.plan.block_memory import width as width

_ADAMW_BYTES, _MOMENTUM_BYTES = 8, 4  # two moments, or one, in fp32
_8BIT_BYTES = 2 + 8 / 256  # two moments, and a scale of each for every 256 elements
_MIN_8BIT_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as in bitsandbytes
_LOSS_CHUNK_TOKENS = 512  # as mule.models.loss cuts them
_LOSS_LOGIT_BYTES = 14  # of eager softmax at its peak: logits, fp32 scores, the targets' places
_DENSE_TOKENS = 512  # up to this length the CPU's attention takes a mask, as mule.models.attention
# Temporaries of the backward pass beside what is kept, in what one block keeps; measured.
_AT_WORK = {"none": 0.4, "selective": 1.0, "full": 1.3}
_4BIT_BLOCK, _4BIT_SCALE_BLOCK = 64, 256  # weights that share a scale; scales that share one
_USABLE_SHARE = 0.7  # the rest is for fragmentation, and for other programs
_NO_ADAPTER = AdapterSection()


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


def state_bytes(config: ModelConfig, recipe: Recipe, *, accumulates: bool) -> dict[str, int]:
    """Bytes that stay for the whole run: weights, masters, gradients, gradient_sums, moments, average.

    `accumulates` says that an update has several micro-batches. In fp32 the weights are the masters.
    `dequantized` is QLoRA's largest matrix, while it is multiplied with; `experts_at_work` the
    gradients of one block's experts, before they are added to the others.
    """
    size = width(str(recipe.train.precision))
    tensors = _trained(config, recipe)
    trained = sum(t.count * t.elements for t in tensors)
    moments = sum(t.count * t.elements * t.moment_bytes(recipe.optim.kind) for t in tensors)
    return {
        "weights": trained * size + _frozen_bytes(config, recipe, trained, size),
        "masters": trained * 4 if size < 4 else 0,
        "gradients": trained * size,
        "gradient_sums": trained * 4 if accumulates else 0,
        "moments": round(moments),
        "average": trained * 4 if recipe.optim.ema_decay is not None else 0,
        "dequantized": _dequantized_bytes(config, recipe, size),
        "experts_at_work": _experts_at_work(config, recipe, size),
    }


def trained_elements(config: ModelConfig, recipe: Recipe) -> dict[str, int]:
    """Elements of the trained matrices, whose weights decay, and of all else that is trained."""
    found = {"matrices": 0, "others": 0}
    for tensors in _trained(config, recipe):
        decays = tensors.is_block_matrix or tensors.is_head
        found["matrices" if decays else "others"] += tensors.count * tensors.elements
    return found


def adapter_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the tensors of the saved adapter, in fp32; PiSSA's is saved with twice the rank."""
    lora = recipe.adapter.lora
    factors, magnitudes = _adapter_elements(config, lora)
    return 4 * (factors * (2 if lora.init == "pissa" else 1) + magnitudes)


def quantized_bytes(elements: int, *, double_quant: bool) -> int:
    """Bytes of a matrix in NF4 with its scales, as mule.adapters.nf4 keeps it."""
    blocks = -(-elements // _4BIT_BLOCK)
    of_scales = 4 * (-(-blocks // _4BIT_SCALE_BLOCK) + 256 + 1)  # theirs, their code, an offset
    return -(-elements // 2) + (blocks + of_scales if double_quant else 4 * blocks)


def loss_bytes(config: ModelConfig, precision: str, *, head_trained: bool = True) -> int:
    """Bytes of the loss whatever the batch: a chunk's logits, and the gradient of a trained head."""
    chunk = _LOSS_CHUNK_TOKENS * config.vocab_size * _LOSS_LOGIT_BYTES
    gradient = config.vocab_size * config.hidden_size * width(precision)
    return chunk + (gradient if head_trained else 0)


def activation_bytes_per_token(
    config: ModelConfig,
    train: TrainSection,
    checkpointing: str,
    mask_length: int = 0,
    adapter: AdapterSection = _NO_ADAPTER,
) -> float:
    """Bytes of one token at the peak of the backward pass: what is kept, and the block at work.

    `mask_length` is the row length where attention takes a mask (`mask_length`), else 0.
    """
    numbers = range(config.num_layers)
    block = max(block_bytes(config, i, train, mask_length, adapter) for i in numbers)
    experts = max(experts_work_bytes(config, i, train) for i in numbers)
    kept = kept_bytes_per_token(config, train, checkpointing, mask_length, adapter)
    return kept + _AT_WORK[checkpointing] * block + experts


def kept_bytes_per_token(
    config: ModelConfig,
    train: TrainSection,
    checkpointing: str,
    mask_length: int = 0,
    adapter: AdapterSection = _NO_ADAPTER,
) -> float:
    """Bytes of one token that wait from the forward to the backward pass.

    Blocks below the first adapted one keep nothing: no gradient passes them.
    """
    size, hidden = width(str(train.precision)), config.hidden_size

    def block(layer: int) -> float:
        if checkpointing == "none":
            return block_bytes(config, layer, train, mask_length, adapter)
        products = products_bytes(config, layer, size, adapter)
        return size * hidden + (products if checkpointing == "selective" else 0)

    adapted = adapter.kind != "none"
    first = adapter.lora.first_block(config.num_layers) if adapted else 0
    # The last norm's tensors, the loss's gradient, and the rotary angles that all share.
    outside = (norm_bytes(adapter) + size) * hidden + 4 * config.head_dim
    return sum(block(layer) for layer in range(first, config.num_layers)) + outside


def mask_length(
    config: ModelConfig, train: TrainSection, row_length: int, *, isolated: bool
) -> int:
    """The row length where attention gets a mask over (row, row); 0 where it gets none."""
    by_document = train.device == "cpu" and row_length > _DENSE_TOKENS
    by_document = by_document or attends_natively(config, train)
    return row_length if isolated and not by_document else 0


def free_for_activations(
    config: ModelConfig, recipe: Recipe, available_bytes: int, num_shards: int = 1
) -> float:
    """Bytes that activations may take of what is available before the model is made.

    `num_shards` processes divide the state among them.
    """
    accumulates = recipe.train.step_rows != 1
    state = sum(state_bytes(config, recipe, accumulates=accumulates).values()) / num_shards
    head_trained = recipe.adapter.kind == "none"
    loss = loss_bytes(config, str(recipe.train.precision), head_trained=head_trained)
    left = available_bytes - state - loss
    return max(0.0, _USABLE_SHARE * left)


def _frozen_bytes(config: ModelConfig, recipe: Recipe, trained: int, size: int) -> int:
    """Of the weights that are not trained, and of what an adapter keeps of them."""
    adapter = recipe.adapter
    if adapter.kind == "none":
        return (cost.total_params(config) - trained) * size
    total = cost.total_params(config) * size
    if adapter.kind == "qlora":
        for inputs, outputs in _all_linear_layers(config):
            elements = inputs * outputs
            small = quantized_bytes(elements, double_quant=adapter.lora.double_quant)
            total += small - elements * size
    factors, magnitudes = _adapter_elements(config, adapter.lora)
    return total + 4 * (magnitudes + (factors if adapter.lora.init == "pissa" else 0))


def _experts_at_work(config: ModelConfig, recipe: Recipe, size: int) -> int:
    """Their gradients, and a fifth for what they are made of; measured."""
    if config.moe is None or recipe.adapter.kind != "none":
        return 0
    experts = 3 * config.moe.num_experts * config.hidden_size * config.moe.intermediate_size
    return experts * size * 6 // 5


def _dequantized_bytes(config: ModelConfig, recipe: Recipe, size: int) -> int:
    if recipe.adapter.kind != "qlora":
        return 0
    return size * max(inputs * outputs for inputs, outputs in _all_linear_layers(config))


def _all_linear_layers(config: ModelConfig) -> Iterator[tuple[int, int]]:
    for layer in range(config.num_layers):
        yield from linear_layers(config, layer).values()


def _trained(config: ModelConfig, recipe: Recipe) -> list[_Tensors]:
    """The tensors that have gradients, masters and moments."""
    if recipe.adapter.kind == "none":
        kept = recipe.train.freeze
        named = _named_tensors(config)
        return [t for name, t in named if not any(fnmatchcase(name, p) for p in kept)]
    lora = recipe.adapter.lora
    tensors = []
    for layer in range(config.num_layers):
        for inputs, outputs in adapted_matrices(config, lora, layer):
            tensors += [
                _Tensors(1, lora.r * side, is_block_matrix=True) for side in (inputs, outputs)
            ]
            tensors += [_Tensors(1, outputs)] if lora.use_dora else []
    return tensors


def _named_tensors(config: ModelConfig) -> Iterator[tuple[str, _Tensors]]:
    """All weights by name; the norms and biases of a block are taken together."""
    table = config.vocab_size * config.hidden_size
    yield "model.embed_tokens.weight", _Tensors(1, table)
    if not config.tie_embeddings:
        yield "lm_head.weight", _Tensors(1, table, is_head=True)
    yield "model.norm.weight", _Tensors(1, config.hidden_size)
    for layer in range(config.num_layers):
        start, left = f"model.layers.{layer}", cost.layer_params(config, layer)
        for name, elements in _block_matrices(config, layer).items():
            left -= elements
            yield f"{start}.{name}", _Tensors(1, elements, is_block_matrix=True)
        yield f"{start}.input_layernorm.weight", _Tensors(1, left)


def _block_matrices(c: ModelConfig, layer: int) -> dict[str, int]:
    """Elements of a block's matrices, those of all experts as one."""
    found = {
        f"{name}.weight": inputs * outputs
        for name, (inputs, outputs) in linear_layers(c, layer).items()
    }
    if c.moe is not None and c.has_experts(layer):
        experts = c.moe.num_experts * c.hidden_size * c.moe.intermediate_size
        found["mlp.gate.weight"] = c.moe.num_experts * c.hidden_size
        found["mlp.experts.gate_up_proj"] = 2 * experts
        found["mlp.experts.down_proj"] = experts
    return found


def _adapter_elements(config: ModelConfig, lora: LoraSection) -> tuple[int, int]:
    """Of A and B of all adapted layers together, and of DoRA's magnitudes."""
    layers = range(config.num_layers)
    found = [shape for layer in layers for shape in adapted_matrices(config, lora, layer)]
    factors = lora.r * sum(inputs + outputs for inputs, outputs in found)
    return factors, sum(outputs for _, outputs in found) if lora.use_dora else 0
