"""The keys of transformers' TrainingArguments, which TRL and LLaMA-Factory hand on.

Read from transformers 5.23: `warmup_steps` below 1 is a share, `max_steps: -1` is not set, and a
constant schedule ignores its warm-up.
"""

from __future__ import annotations

from typing import Any

from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import above_zero, number, run_name, truth, whole

_NOISE = "no noise is added to the embeddings"
KEYS: dict[str, Entry] = {
    **same("learning_rate", "weight_decay", "max_grad_norm", "seed"),
    **same("adam_beta1", "adam_beta2", "adam_epsilon", "save_total_limit"),
    "num_train_epochs": Key("train.epochs", number),
    "max_steps": Key("train.steps", whole),
    "per_device_train_batch_size": Key("micro_rows", number),
    "gradient_accumulation_steps": Key("accumulation", number),
    "lr_scheduler_type": Key("schedule"),
    "lr_scheduler_kwargs.min_lr": Key("optim.min_learning_rate", number),
    "lr_scheduler_kwargs.min_lr_rate": Key("min_lr_share", number),
    "warmup_steps": Key("optim.warmup_steps", above_zero),
    "warmup_ratio": Key("warmup_share", number),
    "optim": Key("optimizer"),
    "bf16": Key("bf16", truth),
    "fp16": Key("fp16", truth),
    "output_dir": Key("name", run_name),
    "save_steps": Key("checkpoint.every_steps", whole),
    "eval_steps": Key("evaluate.every_steps", whole),
    "eval_strategy": Key("eval_strategy"),
    "evaluation_strategy": Key("eval_strategy"),
    "do_eval": Left("report"),
    "save_strategy": Left("report", "Mule saves at each evaluation, and at the end"),
    "load_best_model_at_end": Left("report", "the best checkpoint is always kept"),
    "neftune_noise_alpha": Left("lost", _NOISE),
    "label_smoothing_factor": Left("lost", "targets are not smoothed"),
    "group_by_length": Left("speed"),
    "resume_from_checkpoint": Left("lost", "begin anew; Mule's own runs go on with --resume"),
    "deepspeed": Left("speed", "train.sharding: auto divides the model where it must"),
    "fsdp": Left("speed", "train.sharding: auto divides the model where it must"),
    **left("speed", "fsdp_config*", "deepspeed.*", "gradient_checkpointing*", "torch_compile*"),
    **left("speed", "tf32", "use_liger_kernel", "auto_find_batch_size", "torch_empty_cache_steps"),
    **left("speed", "dataloader_*", "ddp_*", "per_device_eval_batch_size", "accelerator_config*"),
    **left("speed", "average_tokens_across_devices", "optim_args", "low_cpu_mem_usage"),
    **left("report", "logging_*", "log_level*", "report_to", "run_name", "disable_tqdm", "project"),
    **left("report", "push_to_hub", "hub_*", "overwrite_output_dir", "save_only_model"),
    **left("report", "save_safetensors", "remove_unused_columns", "do_train", "eval_on_start"),
    **left("report", "metric_for_best_model", "greater_is_better", "trackio_*", "data_seed"),
    **left("report", "eval_accumulation_steps", "include_*", "local_rank", "eval_delay"),
}

DEFAULTS: dict[str, Any] = {
    "optim.learning_rate": 5e-5,
    "schedule": "linear",
    "train.epochs": 3.0,
    "micro_rows": 8,
    "accumulation": 1,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0.0,
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "optim.max_grad_norm": 1.0,
    "train.seed": 42,
}


def settle(setup: ForeignSetup) -> None:
    """What transformers makes of several keys at once."""
    steps = setup.number("optim.warmup_steps")
    if steps is not None and 0 < steps < 1:  # a share, since transformers 5
        fact = setup.facts.pop("optim.warmup_steps")
        setup.put("warmup_share", steps, setup.given[fact.key])
    strategy = setup.value("eval_strategy")
    if strategy is not None:
        setup.put("validates", strategy not in (False, "no"), _given(setup, "eval_strategy"))


def put_bits(setup: ForeignSetup) -> bool:
    """The bits that load_in_4bit or load_in_8bit asks for; whether one of them does."""
    for bits in (4, 8):
        if setup.value(key := f"load_in_{bits}bit") is True:
            setup.put("bits", bits, setup.given[key])
            return True
    return False


def _given(setup: ForeignSetup, fact: str) -> Any:
    found = setup.facts[fact]
    return setup.given.get(found.key)


def batch_trap(setup: ForeignSetup) -> list[Trap]:
    """The launcher, not the file, says on how many devices it runs."""
    if "devices" in setup.facts and not setup.is_stated("devices"):
        rows, steps = setup.value("micro_rows", 1), setup.value("accumulation", 1)
        key = setup.facts["micro_rows"].key or "the batch"
        count = setup.value("devices")
        text = (
            f"{key} is what one device takes at once: an update has {rows:g} x {steps:g} x the "
            f"number of devices rows. The file does not say how many; imported for {count}: "
            "--devices N if it ran on more"
        )
        return [Trap(key, text)]
    return []
