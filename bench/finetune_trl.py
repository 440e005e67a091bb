"""The peer of bench/finetune.py that is TRL: SFTTrainer and PEFT. Runs in bench/peers/trl.

The chats padded to the longest of their batch, in the order of ordered.jsonl. `default` keeps TRL's
other defaults, gradient checkpointing among them; `kept` keeps the activations. In bf16 the weights
are bf16 too. Arguments: JOB VARIANT. Prints one line of JSON.
"""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import datasets
import torch
from data_trl import TEMPLATE
from finetune_job import (
    ALPHA,
    LEARNING_RATE,
    RANK,
    TARGETS,
    TuneJob,
    begin_tuning,
    ordered_chats,
    tune_figures,
)
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from sft_trl import Counting
from train_hf import Stopwatch
from train_timing import arguments, trainer_arguments, versions
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer


class Timed(Stopwatch):
    """Also when the training began."""

    began_at = 0.0

    def on_train_begin(self, *given: Any, **more: Any) -> None:
        super().on_train_begin(*given, **more)
        self.began_at = time.time()


def main() -> None:
    job, variant = arguments(TuneJob)
    baseline = begin_tuning(job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(job, variant, folder)
        counts = Counting(trainer.data_collator)
        trainer.data_collator = counts
        watch = Timed()
        trainer.add_callback(watch)
        trainer.train()
    seconds = [end - start for start, end in zip(watch.ends, watch.ends[1:])]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    made = len(seconds)
    found = tune_figures(
        job,
        seconds,
        losses,
        [job.rows] * made,
        counts.targets[:made],  # the loader may be a batch ahead
        baseline=baseline,
        begun_at=watch.began_at,
    )
    print(json.dumps({**found, "versions": versions("trl", "peft", "transformers")}))


def _trainer(job: TuneJob, variant: str, folder: str) -> SFTTrainer:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job.model)
    tokenizer.chat_template = TEMPLATE
    rows = [{"messages": chat["messages"]} for chat in ordered_chats(job)]
    trainer = SFTTrainer(
        _model(job),
        args=_config(job, variant, folder),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0.0,
            target_modules=list(TARGETS),
            layers_to_transform=job.adapted,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    start = load_file(job.adapter / "adapter_model.safetensors")
    told = set_peft_model_state_dict(trainer.model, start)
    assert not told.unexpected_keys, told.unexpected_keys
    return trainer


def _model(job: TuneJob) -> Any:
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    more = {}
    if job.quantized:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **more)


def _config(job: TuneJob, variant: str, folder: str) -> SFTConfig:
    given = trainer_arguments(job) | {
        "use_cpu": True,
        "gradient_checkpointing": variant == "default",
        "learning_rate": LEARNING_RATE,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_strategy": "steps",
        "logging_steps": 1,
    }
    return SFTConfig(
        output_dir=folder,
        max_length=job.row_length,
        assistant_only_loss=True,
        train_sampling_strategy="sequential",
        **given,
    )


if __name__ == "__main__":
    main()
