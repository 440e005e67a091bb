"""What an update or an evaluation has to do, as seconds at a machine's ideal rates. Pure; no torch.

Kinds of work: `products` of matrices at the measured matmul peak, and the bytes of their operands;
attention in C++ (`attention_native`), or torch's inside whole rows (`attention`) and by `documents` of
packed ones; what is done number by number (`pointwise`), eager or compiled, as bytes of memory; the
`softmax` of the loss; state-space layers; experts; the `optimizer`; and the calls themselves
(`operations`), which small models wait for.
mule/plan/fitted.json says how many times its ideal time each takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mule.config.schema import Recipe
from mule.models import cost
from mule.models.config import ModelConfig
from mule.plan import memory
from mule.plan.block_memory import (
    adapted_matrices,
    attends_natively,
    block_bytes,
    linear_layers,
)
from mule.plan.peak import micro_batches, rows_at_once
from mule.plan.resolve import Facts

Work = dict[str, float]

_CHUNK_TOKENS = 512  # of the loss, as mule.models.loss cuts them
_TILE = 64  # queries and keys that mule/native/attention.h computes at once
_BLOCK_QUERIES = 256  # of the backward pass by document, as in mule.models.packed_attention
# Passes over what a block keeps: forward one, backward two, what is computed again one more.
_POINTWISE_PASSES = {"none": 3, "selective": 4, "full": 4}
# fp32 numbers that an update reads and writes for each weight: AdamW, by blocks that stay in a cache
# or in one compiled pass; Muon's momentum; 8-bit moments. The gradient's norm and clearing included.
_UPDATE_NUMBERS = {"adamw": 9, "compiled": 9, "muon": 12, "adamw8bit": 7}
_SUM_NUMBERS, _AVERAGE_NUMBERS = 4, 3  # to add a micro-batch's gradients; to move an average
_NEWTON_SCHULZ_STEPS = 5  # of Muon
# Calls of kernels, forward and backward, counted in the code.
_BLOCK_CALLS, _MAMBA_CALLS, _EXPERT_CALLS, _ADAPTER_CALLS = 95, 190, 24, 13
_COMPILED_CALLS = 0.3  # of them remain
_SCAN_NUMBERS = 20  # that mamba1's scan reads and writes for each state of a channel


@dataclass(frozen=True)
class Speed:
    """What a machine can do: FLOP/s in the run's precision and in bf16, bytes/s, seconds a call."""

    matmul_flops: float
    bf16_flops: float
    read_bytes: float
    operation_s: float
    link_bytes: float = math.inf  # between its devices


def update_work(
    config: ModelConfig, recipe: Recipe, facts: Facts, speed: Speed, *, trunk_kept: bool = False
) -> Work:
    """Of one update of one process; with `trunk_kept` the frozen blocks were computed before."""
    parts = micro_batches(recipe, facts)
    rows = rows_at_once(recipe, facts)
    one = _Pass(config, recipe, facts, speed, rows).training(trunk_kept=trunk_kept)
    found = {name: parts * value for name, value in one.items()}
    found |= _optimizer(config, recipe, speed, parts, facts)
    found["updates"] = 1.0
    return found


def evaluation_work(
    config: ModelConfig, recipe: Recipe, facts: Facts, speed: Speed, *, trunk_kept: bool = False
) -> Work:
    """Of one evaluation: the validation rows once forward, never compiled."""
    if not facts.num_valid_rows:
        return {}
    train = recipe.train.model_copy(update={"compile": False})
    recipe = recipe.model_copy(update={"train": train})
    rows = rows_at_once(recipe, facts)
    parts = math.ceil(facts.num_valid_rows / rows / facts.num_processes)
    one = _Pass(config, recipe, facts, speed, rows).forward(trunk_kept=trunk_kept)
    return {name: parts * value for name, value in one.items()}


class _Pass:
    """One micro-batch of `rows` rows."""

    def __init__(
        self, config: ModelConfig, recipe: Recipe, facts: Facts, speed: Speed, rows: int
    ) -> None:
        self.c, self.recipe, self.facts, self.speed = config, recipe, facts, speed
        self.tokens = rows * facts.row_length
        self.targets = rows * facts.targets_per_row
        self.size = memory.width(str(recipe.train.precision))
        self.kind = str(recipe.train.activation_checkpointing)
        self.is_adapter = recipe.adapter.kind != "none"
        first = recipe.adapter.lora.first_block(config.num_layers) if self.is_adapter else 0
        self.frozen, self.trained = range(first), range(first, config.num_layers)
        self.is_native = attends_natively(config, recipe.train)
        mask = memory.mask_length(config, recipe.train, facts.row_length, isolated=facts.isolated)
        self.by_document = facts.isolated and not mask

    def training(self, *, trunk_kept: bool) -> Work:
        """Forward and backward."""
        again = 1 if self.kind == "full" else 0
        products = (2 if self.is_adapter else 3) + again
        frozen = () if trunk_kept else self.frozen
        found = self._blocks(self.trained, products, 3 + again, _POINTWISE_PASSES[self.kind])
        found = _sum(found, self._blocks(frozen, 1, 1, 1))
        return _sum(found, self._loss(2 if self.is_adapter else 3), self._calls(trunk_kept))

    def forward(self, *, trunk_kept: bool) -> Work:
        """Forward alone."""
        layers = self.trained if trunk_kept else range(self.c.num_layers)
        calls = self._calls(trunk_kept)
        calls = {name: value / 3 for name, value in calls.items()}
        return _sum(self._blocks(layers, 1, 1, 1), self._loss(1), calls)

    def _blocks(self, layers: range | tuple[()], products: int, mixings: int, passes: int) -> Work:
        """Of so many passes over the matrices, the mixing of tokens and the numbers between."""
        found: Work = {}
        for layer in layers:
            found = _sum(
                found,
                self._products(layer, products),
                self._mixing(layer, mixings),
                self._pointwise(layer, passes),
            )
        return found

    def _products(self, layer: int, times: int) -> Work:
        """Of linear layers, experts, adapters, and the making of weights that are in 4 bits."""
        shapes = list(linear_layers(self.c, layer).values())
        found = _sum(*(self._product(inputs, outputs, times) for inputs, outputs in shapes))
        if self.is_adapter:
            rank = self.recipe.adapter.lora.r
            for inputs, outputs in adapted_matrices(self.c, self.recipe.adapter.lora, layer):
                found = _sum(found, self._product(rank, inputs + outputs, times + 1))
        if self.recipe.adapter.kind == "qlora":
            elements = sum(inputs * outputs for inputs, outputs in shapes)
            found["dequantized"] = times * elements * 2 * self.size / self.speed.read_bytes
        if self.c.moe is not None and self.c.has_experts(layer):
            moe = self.c.moe
            an_expert = 3 * self.c.hidden_size * moe.intermediate_size
            flops = 2 * self.tokens * moe.experts_per_token * an_expert * times
            weights = moe.num_experts * an_expert * self.size * (times + 1)
            found["experts"] = flops / self.speed.matmul_flops
            found["product_bytes"] += weights / self.speed.read_bytes
        return found

    def _product(self, inputs: int, outputs: int, times: int) -> Work:
        flops = 2.0 * self.tokens * inputs * outputs * times
        numbers = self.tokens * (inputs + outputs) + inputs * outputs
        return {
            "products": flops / self.speed.matmul_flops,
            "product_bytes": times * self.size * numbers / self.speed.read_bytes,
        }

    def _mixing(self, layer: int, times: int) -> Work:
        """Of attention, or of a state-space layer's recurrence."""
        length, c = self.facts.row_length, self.c
        if c.mamba is not None and c.has_mamba(layer):
            if c.mamba.kind == "mamba1":
                numbers = _SCAN_NUMBERS * c.mamba.inner_size * c.mamba.state_size
                return {"scan": 4 * numbers * times * self.tokens / self.speed.read_bytes}
            flops = times * self.tokens * cost.mixing_flops(c, layer, length)
            return {"recurrence": flops / self.speed.matmul_flops}
        examples = max(1.0, self.facts.examples_per_row) if self.facts.isolated else 1.0
        if self.is_native:
            flops = cost.mixing_flops(c, layer, round(length / examples))
            flops += 4 * _TILE / 2 * c.num_heads * c.head_dim  # half of a tile is hidden
            return {"attention_native": times * self.tokens * flops / self.speed.matmul_flops}
        if self.by_document:
            keys = length / examples / 2 + _BLOCK_QUERIES / 2
            flops = 4 * min(keys, length) * c.num_heads * c.head_dim
            return {"documents": times * self.tokens * flops / self.speed.matmul_flops}
        flops = cost.mixing_flops(c, layer, length)
        if self.facts.isolated:  # a mask: the whole square is computed
            flops = 4.0 * length * c.num_heads * c.head_dim
        return {"attention": times * self.tokens * flops / self.speed.matmul_flops}

    def _pointwise(self, layer: int, passes: int) -> Work:
        train, adapter = self.recipe.train, self.recipe.adapter
        kept = block_bytes(self.c, layer, train, 0, adapter)
        name = "pointwise_compiled" if train.compile else "pointwise"
        return {name: passes * self.tokens * kept / self.speed.read_bytes}

    def _loss(self, times: int) -> Work:
        """Of the head, whose weight is read again for each chunk, and of the softmax."""
        table = self.c.vocab_size * self.c.hidden_size
        chunks = math.ceil(self.targets / _CHUNK_TOKENS)
        logits = self.targets * self.c.vocab_size
        numbers = chunks * table * (times + (1 if times == 3 else 0)) + logits * times
        return {
            "products": 2.0 * self.targets * table * times / self.speed.matmul_flops,
            "product_bytes": self.size * numbers / self.speed.read_bytes,
            "softmax": 4 * logits * min(times, 2) / self.speed.read_bytes,
        }

    def _calls(self, trunk_kept: bool) -> Work:
        """The calls of kernels, whatever they do."""
        calls = 40.0  # of the embedding, the last norm and the loss
        compiled = _COMPILED_CALLS if self.recipe.train.compile else 1.0
        for layer in range(self.c.num_layers):
            if layer in self.frozen:
                calls += 0 if trunk_kept else compiled * _BLOCK_CALLS / 3
                continue
            calls += compiled * (_MAMBA_CALLS if self.c.has_mamba(layer) else _BLOCK_CALLS)
            if self.c.moe is not None and self.c.has_experts(layer):
                calls += _EXPERT_CALLS * self.c.moe.num_experts
            if self.is_adapter:
                adapted = adapted_matrices(self.c, self.recipe.adapter.lora, layer)
                calls += compiled * _ADAPTER_CALLS * sum(1 for _ in adapted)
        return {"operations": calls * self.speed.operation_s}


def _optimizer(config: ModelConfig, recipe: Recipe, speed: Speed, parts: int, facts: Facts) -> Work:
    """Of norm, clipping, update, sums over micro-batches and processes, and the average."""
    elements = memory.trained_elements(config, recipe)
    kind = recipe.optim.kind
    alone = "compiled" if recipe.train.compile else "adamw"
    numbers = {
        "matrices": _UPDATE_NUMBERS[alone if kind == "adamw" else kind],
        "others": _UPDATE_NUMBERS[alone],
    }
    summed = parts if parts > 1 or facts.num_processes > 1 else 0
    more = _SUM_NUMBERS * summed + (_AVERAGE_NUMBERS if recipe.optim.ema_decay is not None else 0)
    total = sum(4.0 * elements[name] * (numbers[name] + more) for name in elements)
    name = "optimizer_compiled" if recipe.train.compile and kind == "adamw" else "optimizer"
    found = {name: total / speed.read_bytes}
    if kind == "muon":
        found["orthogonal"] = _newton_schulz_flops(config) / speed.bf16_flops
    if facts.num_processes > 1:
        trained = sum(elements.values())
        share = (facts.num_processes - 1) / facts.num_processes
        found["sum over processes"] = 2 * 4 * trained * share / speed.link_bytes
    return found


def _newton_schulz_flops(config: ModelConfig) -> float:
    """Of Muon's five iterations, of each matrix: X X^T, its square, and their product with X."""
    flops = 0.0
    for layer in range(config.num_layers):
        shapes = list(linear_layers(config, layer).values())
        if config.moe is not None and config.has_experts(layer):
            an_expert = (config.hidden_size, config.moe.intermediate_size)
            shapes += [an_expert] * (3 * config.moe.num_experts)
        for shape in shapes:
            short, long = sorted(shape)
            flops += 4 * short * short * long + 2 * short**3
    return _NEWTON_SCHULZ_STEPS * flops


def _sum(*works: Work) -> Work:
    names = [name for work in works for name in work]
    return {name: sum(work.get(name, 0.0) for work in works) for name in dict.fromkeys(names)}
