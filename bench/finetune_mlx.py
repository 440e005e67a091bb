"""The peer of bench/finetune.py that is mlx-lm, on a CPU. Runs in bench/peers/mlx.

Its model, LoRA layers, loss and optimizer, and its step, compiled as in its trainer, in fp32; the
chats in the order of ordered.jsonl, padded to a multiple of 32 as there. The loop is written here,
since mlx-lm's own shuffles and evaluates first. What is trained is what the others train: with
--mask-prompt alone mlx-lm would train the line end after the answer too. Arguments: JOB VARIANT.
Prints one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from finetune_job import (
    ALPHA,
    BETAS,
    LEARNING_RATE,
    RANK,
    TARGETS,
    TuneJob,
    ordered_chats,
    tune_figures,
)
from mlx_lm import load
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from train_timing import arguments, memory_bytes

_PAD_TO = 32


def main() -> None:
    job, _ = arguments(TuneJob)
    baseline = memory_bytes("VmRSS")
    mx.set_default_device(mx.cpu)
    model = _model(job)
    step = _step(model)
    chats = ordered_chats(job)
    seconds, losses, targets = [], [], []
    began_at = time.time()
    for update in range(job.warm_up + job.timed):
        started = time.perf_counter()
        loss, count = step(_batch(chats[update * job.rows : (update + 1) * job.rows]))
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        targets.append(count.item())
    made = [job.rows] * len(seconds)
    found = tune_figures(job, seconds, losses, made, targets, baseline=baseline, begun_at=began_at)
    versions = {name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")}
    print(json.dumps({**found, "versions": versions}))


def _model(job: TuneJob) -> Any:
    model, _ = load(str(job.model))
    # On a processor mlx has no fast products in bf16: minutes an update become many (docs/log.md).
    model.set_dtype(mx.float32)
    model.freeze()
    halves = {
        name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
        for name in TARGETS
    }
    settings = {
        "rank": RANK,
        "scale": ALPHA / RANK,
        "dropout": 0.0,
        "keys": [f"{half}.{name}" for name, half in halves.items()],
    }
    linear_to_lora_layers(model, job.last_layers, settings)
    model.load_weights(_start(job), strict=False)
    model.train()
    mx.eval(model.parameters())
    return model


def _start(job: TuneJob) -> list[tuple[str, mx.array]]:
    """The adapter that every way begins with, from PEFT's names and layout to mlx-lm's."""
    found = mx.load(str(job.adapter / "adapter_model.safetensors"))
    names = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    start = []
    for name, tensor in found.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        start.append((name.removeprefix("base_model.model."), tensor.T))
    return start


def _step(model: Any) -> Any:
    optimizer = mlx.optimizers.AdamW(
        learning_rate=LEARNING_RATE,
        betas=list(BETAS),
        eps=1e-8,
        weight_decay=0.0,
        bias_correction=True,
    )
    loss_and_gradient = nn.value_and_grad(model, default_loss)
    state = [model.state, optimizer.state, mx.random.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(tokens: mx.array, spans: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradient = loss_and_gradient(model, tokens, spans)
        optimizer.update(model, gradient)
        return loss, count

    def step(batch: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        found = compiled(*batch)
        mx.eval(state, found)
        return found

    return step


def _batch(chats: list[dict[str, Any]]) -> tuple[mx.array, mx.array]:
    """Token ids padded with zeros, and the first and last trained place of each row."""
    longest = max(len(chat["ids"]) for chat in chats)
    length = 1 + -(-longest // _PAD_TO) * _PAD_TO
    rows = [chat["ids"] + [0] * (length - len(chat["ids"])) for chat in chats]
    return mx.array(rows), mx.array([chat["trained"] for chat in chats])


if __name__ == "__main__":
    main()
