"""Axolotl: the YAML of `axolotl train`.

Keys and defaults of axolotl 0.19.0 (axolotl/utils/schemas). What a key leaves open is transformers'.
"""

from __future__ import annotations

from typing import Any

from mule.compare.dialects import training_arguments as shared
from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import modules, number, run_name, truth, whole
from mule.errors import UserError

_RL = "Mule pretrains and fine-tunes on texts and chats"
_KEYS: dict[str, Entry] = {
    **same("base_model", "learning_rate", "weight_decay", "max_grad_norm", "seed"),
    **same("adam_beta1", "adam_beta2", "adam_epsilon", "sequence_len", "save_total_limit"),
    **same("lora_r", "lora_alpha", "lora_dropout", "peft_use_dora", "peft_use_rslora"),
    **same("lora_model_dir", "early_stopping_patience"),
    "base_model_revision": Key("model.revision"),
    "revision_of_model": Key("model.revision"),
    "num_epochs": Key("train.epochs", number),
    "max_steps": Key("train.steps", whole),
    "micro_batch_size": Key("micro_rows", number),
    "batch_size": Key("batch_size", number),
    "gradient_accumulation_steps": Key("accumulation", number),
    "adapter": Key("adapter"),
    "load_in_4bit": Key("load_in_4bit", truth),
    "load_in_8bit": Key("load_in_8bit", truth),
    "lora_target_modules": Key("adapter.lora.target_modules", modules),
    "lora_target_linear": Key("target_linear", truth),
    "peft_init_lora_weights": Key("init"),
    "optimizer": Key("optimizer"),
    "lr_scheduler": Key("schedule"),
    "cosine_min_lr_ratio": Key("min_lr_share", number),
    "lr_scheduler_kwargs.min_lr": Key("optim.min_learning_rate", number),
    "lr_scheduler_kwargs.min_lr_rate": Key("min_lr_share", number),
    "warmup_steps": Key("optim.warmup_steps", number),
    "warmup_ratio": Key("warmup_share", number),
    "sample_packing": Key("data.packing", truth),
    "excess_length_strategy": Key("data.too_long", lambda word: {"raise": "error"}.get(word, word)),
    "bf16": Key("bf16", truth),
    "bfloat16": Key("bf16", truth),
    "fp16": Key("fp16", truth),
    "float16": Key("fp16", truth),
    "val_set_size": Key("val_size", number),
    "datasets": Key("datasets"),
    "test_datasets": Key("test_datasets"),
    "pretraining_dataset": Key("pretraining_dataset"),
    "chat_template": Key("template"),
    "train_on_inputs": Key("on_prompt", truth),
    "output_dir": Key("name", run_name),
    "eval_steps": Key("evaluate.every_steps", whole),
    "save_steps": Key("checkpoint.every_steps", whole),
    "rl": Key("rl"),
    "reward_model": Key("reward_model"),
    "evals_per_epoch": Left("report", "Mule measures about ten times a run"),
    "saves_per_epoch": Left("report", "Mule saves at evaluations, and at the end"),
    "eval_strategy": Left("report"),
    "save_strategy": Left("report"),
    "lora_modules_to_save": Left("lost", "these weights are not trained beside the adapter"),
    "neftune_noise_alpha": Left("lost", "no noise is added to the embeddings"),
    "loraplus_lr_ratio": Left("lost", "LoRA+ is not there: A and B learn at one rate"),
    "chat_template_jinja": Left("lost", "the model's own template is used"),
    "default_system_message": Left("lost", "write the system prompt into the chats"),
    "eot_tokens": Left("report", "the model's own template says what ends a turn"),
    "special_tokens.*": Left("report", "the model's own tokenizer is used as it is"),
    "tokens": Left("lost", "no token is added"),
    "tokens.*": Left("report", "the model's own tokenizer is used as it is"),
    "reinit_weights": Left("lost", "give the new model's shape: model.size: 25m, no model.path"),
    "max_packed_sequence_len": Left("lost", "sample_packing took its place: data.packing"),
    "added_tokens_overrides*": Left("lost", "no token is added"),
    "embedding_lr": Left("lost", "one learning rate for all weights"),
    "embedding_lr_scale": Left("lost", "one learning rate for all weights"),
    "lr_groups": Left("lost", "one learning rate for all weights"),
    "unfrozen_parameters": Left(
        "lost", "all weights of the language model are trained; train.freeze names what is not"
    ),
    "peft_layers_to_transform": Left("lost", "adapter.lora.last_layers adapts the last blocks"),
    "lora_target_parameters": Left("lost", "experts' weights get no adapter by name"),
    "relora_steps": Left("lost", "the adapter is not merged and begun again"),
    "jagged_restart_steps": Left("lost", "the learning rate is not restarted"),
    "s2_attention": Left("lost", "attention sees every earlier token"),
    "use_pose": Left("lost", "positions are not skipped"),
    "cosine_constant_lr_ratio": Left("lost", "the cosine goes to the end"),
    "resume_from_checkpoint": Left("lost", "begin anew; Mule's own runs go on with --resume"),
    "curriculum_sampling": Left("lost", "the data is shuffled"),
    "sample_packing_sequentially": Left("lost", "the data is shuffled"),
    "dataset_exact_deduplication": Left("lost", "mule data mix leaves out what is there twice"),
    "group_by_length": Left("speed"),
    "deepspeed": Left("speed", "train.sharding: auto divides the model where it must"),
    "fsdp": Left("speed", "train.sharding: auto divides the model where it must"),
    **left("speed", "fsdp_config*", "gradient_checkpointing*", "activation_offloading", "tf32"),
    **left("speed", "flash_attention", "flash_attn_*", "xformers_attention", "sdp_attention"),
    **left(
        "speed",
        "attention",
        "torchdistx_path",
        "flex_attention",
        "eager_attention",
        "attn_implementation",
        "sage_attention",
    ),
    **left("speed", "torch_compile*", "liger_*", "cut_cross_entropy", "chunked_cross_entropy*"),
    **left("speed", "plugins", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
    **left("speed", "eval_sample_packing", "pad_to_sequence_len", "sample_packing_*"),
    **left("speed", "dataset_processes", "dataset_num_proc", "dataloader_*", "low_cpu_mem_usage"),
    **left("speed", "ddp*", "device_map", "max_memory", "gpu_memory_limit", "eval_batch_size"),
    **left("speed", "sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"),
    **left("speed", "dp_shard_size", "dp_replicate_size", "optim_args*", "streaming*"),
    **left("speed", "bnb_config_kwargs*", "gradient_checkpointing_kwargs*", "lora_on_cpu"),
    **left("report", "model_type", "tokenizer_type", "tokenizer_config", "is_*_derived_model"),
    **left("report", "trust_remote_code", "strict", "dataset_prepared_path", "hub_*"),
    **left("report", "push_dataset_to_hub", "hf_use_auth_token", "wandb_*", "mlflow_*", "comet_*"),
    **left("report", "use_wandb", "use_tensorboard", "use_mlflow", "logging_steps", "debug"),
    **left("report", "local_rank", "loss_watchdog_*", "eval_table_*", "eval_max_new_tokens"),
    **left("report", "do_causal_lm_eval", "eval_causal_lm_metrics", "do_bench_eval", "bench_*"),
    **left("report", "save_safetensors", "save_only_model", "save_first_step", "special_tokens"),
    **left("report", "lora_fan_in_fan_out", "shuffle_merged_datasets", "tokenizer_use_fast"),
    **left("report", "processor_type", "tokenizer_legacy", "gptq*", "load_best_model_at_end"),
    **left(
        "report", "metric_for_best_model", "greater_is_better", "include_*", "base_model_config"
    ),
    **left("report", "auto_resume_from_checkpoints", "hf_*_token", "wandb_api_key", "profiler_*"),
    **left("report", "noisy_embedding_alpha", "lora_embedding_kernel", "min_sample_len"),
}


def _read(setup: ForeignSetup) -> None:
    for key, name in (("rl", setup.value("rl")), ("reward_model", setup.value("reward_model"))):
        if name not in (None, False):
            problem = (
                f"{setup.place(key)} = {name}: training on preferences has no equivalent; {_RL}"
            )
            raise UserError(problem, "import a file that fine-tunes on chats or texts")
    adapter = setup.value("adapter")
    setup.put("method", adapter or "full", setup.given.get("adapter"))
    if adapter not in (None, "lora", "qlora", ""):
        setup.lose(setup.given["adapter"], "there is no such adapter: LoRA is taken instead")
    if not shared.put_bits(setup) and adapter == "qlora":
        setup.put("bits", 4, setup.given["adapter"])
    if setup.value("target_linear") is True and not setup.value("adapter.lora.target_modules"):
        setup.put("adapter.lora.target_modules", "all-linear", setup.given["lora_target_linear"])
    if setup.value("init") == "pissa":
        setup.put("adapter.lora.init", "pissa", setup.given["peft_init_lora_weights"])
    total, micro = setup.number("batch_size"), setup.number("micro_rows")
    if total and micro and not setup.is_stated("accumulation"):
        setup.put("accumulation", max(1, total // micro), setup.given["batch_size"])
    if setup.value("test_datasets"):
        put_sets(
            setup, _sets(setup.value("test_datasets"), is_valid=True), setup.given["test_datasets"]
        )
    pretraining = setup.value("pretraining_dataset")
    setup.put("pretrain", bool(pretraining), setup.given.get("pretraining_dataset"))
    fact = "pretraining_dataset" if pretraining else "datasets"
    if setup.value(fact):
        put_sets(setup, _sets(setup.value(fact), pretrains=bool(pretraining)), setup.given[fact])


def _sets(entries: Any, *, is_valid: bool = False, pretrains: bool = False) -> list[DataSet]:
    entries = entries if isinstance(entries, list) else [entries]
    found = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"path": entry}
        if isinstance(entry, dict):
            found += _entry(entry, is_valid=is_valid, pretrains=pretrains)
    return found


def _entry(entry: dict[str, Any], *, is_valid: bool, pretrains: bool) -> list[DataSet]:
    files = entry.get("data_files")
    files = files if isinstance(files, list) else [files] if files else [entry.get("path")]
    name, columns = _format(entry)
    if pretrains or name == "text_rows":
        column = str(entry.get("text_column") or entry.get("field") or "text")
        name, columns = "text_rows", {} if column == "text" else {"text": column}
    parts = [str(entry["name"])] if entry.get("name") else []
    parts += [f"split {entry['split']}"] if entry.get("split") not in (None, "train") else []
    return [
        DataSet(str(file), name, columns, ", ".join(parts), is_valid=is_valid)
        for file in files
        if file
    ]


def _format(entry: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Our format of an entry, and its columns by the names the format has for them."""
    kind = entry.get("type")
    if isinstance(kind, dict):  # prompts of one's own
        fields = {
            "instruction": "field_instruction",
            "input": "field_input",
            "output": "field_output",
        }
        named = {ours: str(kind[theirs]) for ours, theirs in fields.items() if kind.get(theirs)}
        return "alpaca", {ours: theirs for ours, theirs in named.items() if ours != theirs}
    kind = str(kind or "")
    if kind.startswith("chat_template"):
        mapping = entry.get("message_property_mappings")
        mapped = mapping.get("role") if isinstance(mapping, dict) else None
        role = mapped or entry.get("message_field_role") or "role"
        ours, name = ("conversations", "sharegpt") if role == "from" else ("messages", "messages")
        theirs = str(entry.get("field_messages") or "messages")
        return name, {} if theirs == ours else {ours: theirs}
    if kind.startswith("sharegpt"):
        theirs = str(entry.get("field_messages") or "conversations")
        return "sharegpt", {} if theirs == "conversations" else {"conversations": theirs}
    if kind.startswith(("alpaca", "instruct")):
        return "alpaca", {}
    return ("text_rows", {}) if kind in ("completion", "pretrain") else ("", {})


def _traps(setup: ForeignSetup) -> list[Trap]:
    found = shared.batch_trap(setup)
    if setup.value("batch_size") is not None:
        text = (
            "Axolotl's batch_size is the whole update (micro_batch_size x "
            "gradient_accumulation_steps), and is read only where the latter is missing"
        )
        found.append(Trap("batch_size", text))
    return found


DIALECT = Dialect(
    name="axolotl",
    title="Axolotl",
    version="0.19.0",
    keys=_KEYS,
    signs=frozenset(
        {
            *("base_model", "sequence_len", "sample_packing", "val_set_size", "num_epochs"),
            *(
                "pad_to_sequence_len",
                "dataset_prepared_path",
                "lora_target_linear",
                "evals_per_epoch",
            ),
            *("saves_per_epoch", "train_on_inputs", "lora_model_dir", "pretraining_dataset"),
            *("flash_attention", "tokenizer_type", "eval_sample_packing"),
        }
    ),
    defaults={
        "schedule": "cosine",
        "train.epochs": 1.0,
        "micro_rows": 1,
        "accumulation": 1,
        "warmup_share": 0.03,
        "optim.weight_decay": 0.0,
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "optim.eps": 1e-8,
        "optim.max_grad_norm": 1.0,
        "adapter.lora.dropout": 0.0,
        "data.max_seq_length": 512,
        "data.packing": False,
        "data.too_long": "drop",
        "train.seed": 42,
        "val_size": 0.0,
        "devices": 1,
    },
    read=_read,
    traps=_traps,
)
