"""The peer of bench/train.py that is transformers: LlamaForCausalLM and Trainer. Runs in bench/peers/hf.

fp32 weights, bf16=True or, in fp32, False; SDPA, no cache, data in memory, no logs or checkpoints;
`eager`, or `compiled` with torch_compile=True. Arguments: JOB VARIANT. Prints one line of JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import torch
from torch.utils.data import Dataset
from train_timing import (
    Job,
    arguments,
    begin,
    figures,
    state_bytes,
    trainer_arguments,
    versions,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class RandomRows(Dataset):
    """Rows of random tokens; the model shifts the labels itself."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __len__(self) -> int:
        return (self.job.warm_up + self.job.timed) * self.job.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, self.job.vocab_size, (self.job.row_length,))
        return {"input_ids": ids, "labels": ids}


class Stopwatch(TrainerCallback):
    """The end of every update; from one to the next is all that the Trainer does for it."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    job, variant = arguments(Job)
    baseline = begin(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            llama(job), _arguments(job, variant, folder), train_dataset=RandomRows(job)
        )
        watch = Stopwatch()
        trainer.add_callback(watch)
        loss = trainer.train().training_loss
    seconds = [end - start for start, end in zip(watch.ends, watch.ends[1:])]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    state = state_bytes(trainer.model.parameters(), optimizer)
    found = figures(job, seconds, [loss], baseline=baseline, state=state)
    print(json.dumps({**found, "versions": versions("transformers", "accelerate")}))


def llama(job: Job) -> LlamaForCausalLM:
    """transformers' model of the job's shape, with random weights."""
    config = LlamaConfig(
        vocab_size=job.vocab_size,
        hidden_size=job.hidden_size,
        intermediate_size=job.intermediate_size,
        num_hidden_layers=job.num_layers,
        num_attention_heads=job.num_heads,
        num_key_value_heads=job.num_kv_heads,
        head_dim=job.head_dim,
        max_position_embeddings=job.row_length,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def _arguments(job: Job, variant: str, folder: str) -> TrainingArguments:
    compiled = variant == "compiled"
    return TrainingArguments(output_dir=folder, torch_compile=compiled, **trainer_arguments(job))


if __name__ == "__main__":
    main()
