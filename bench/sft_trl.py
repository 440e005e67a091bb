"""The peer of bench/sft.py: TRL's SFTTrainer with its own packing. Runs in bench/peers/trl.

Best-fit packing (its default), which TRL trains without padding: the rows of a batch become one
long row, and transformers masks attention between documents by their positions. `default` keeps
its other defaults too, gradient checkpointing among them; `kept` keeps the activations; `rows`
also takes one packed row at a time, so that the mask is of one row; `compiled` is `rows` with
torch_compile. Arguments: JOB VARIANT. Prints one line of JSON.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
from data_trl import TEMPLATE
from train_hf import Stopwatch, llama
from train_timing import (
    RunJob,
    arguments,
    begin,
    figures,
    state_bytes,
    targets_per_second,
    trainer_arguments,
    versions,
)
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


class Counting:
    """The trainer's collator, and the sizes of the batches it made."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.tokens: list[int] = []
        self.targets: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        self.tokens.append(batch["input_ids"].numel())  # nothing is padded
        self.targets.append(int((batch["labels"] != -100).sum()))
        return batch


def main() -> None:
    job, variant = arguments(RunJob)
    baseline = begin(job)
    parts = job.rows if variant in ("rows", "compiled") else 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, variant, parts, folder)
        counts = Counting(trainer.data_collator)
        trainer.data_collator = counts
        watch = Stopwatch()
        trainer.add_callback(watch)
        loss = trainer.train().training_loss
    seconds = [end - start for start, end in zip(watch.ends, watch.ends[1:])]
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    state = state_bytes(trainer.model.parameters(), optimizer)
    tokens, targets = (
        _by_update(found, parts)[: len(seconds)]  # the loader is a batch ahead
        for found in (counts.tokens, counts.targets)
    )
    found = figures(job, seconds, [loss], baseline=baseline, state=state) | {
        "tokens_per_second": targets_per_second(job, seconds, tokens),
        "targets_per_second": targets_per_second(job, seconds, targets),
        "targets_per_update": sum(targets) / len(targets),
    }
    print(json.dumps({**found, "versions": versions("trl", "transformers", "datasets")}))


def _trainer(job: RunJob, variant: str, parts: int, folder: str) -> SFTTrainer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(Path(job.folder) / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    rows = datasets.load_dataset(
        "json", data_files=f"{job.folder}/chat.jsonl", split="train", cache_dir=f"{folder}/cache"
    )
    return SFTTrainer(
        llama(job),
        args=_config(job, variant, parts, folder),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def _config(job: RunJob, variant: str, parts: int, folder: str) -> SFTConfig:
    given = trainer_arguments(job) | {
        "per_device_train_batch_size": job.rows // parts,
        "gradient_accumulation_steps": parts,
        "gradient_checkpointing": variant == "default",
        "torch_compile": variant == "compiled",
    }
    return SFTConfig(
        output_dir=folder,
        max_length=job.row_length,
        packing=True,
        assistant_only_loss=True,
        **given,
    )


def _by_update(counts: list[int], parts: int) -> list[int]:
    """Sums over the parts of each update."""
    return [sum(counts[i : i + parts]) for i in range(0, len(counts), parts)]


if __name__ == "__main__":
    main()
