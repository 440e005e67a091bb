"""LitGPT: the YAML of `litgpt finetune_lora|finetune|pretrain --config`, or its command line.

Keys and defaults of litgpt 0.5.13 (litgpt/args.py, finetune/lora.py, finetune/full.py, pretrain.py).
"""

from __future__ import annotations

from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import number, run_name, truth, whole

# class of litgpt.data -> (hub id, our format)
_DATA: dict[str, tuple[str, str]] = {
    "Alpaca": ("yahma/alpaca-cleaned", "alpaca"),
    "Alpaca2k": ("mhenrichsen/alpaca_2k_test", "alpaca"),
    "AlpacaGPT4": ("vicgalle/alpaca-gpt4", "alpaca"),
    "Deita": ("HuggingFaceH4/deita-10k-v0-sft", "messages"),
    "LIMA": ("GAIR/lima", ""),
    "TinyStories": ("roneneldan/TinyStories", "text_rows"),
    "OpenWebText": ("Skylion007/openwebtext", "text_rows"),
}
_TARGETS = {
    "lora_query": ("q_proj",),
    "lora_key": ("k_proj",),
    "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",),
    "lora_mlp": ("gate_proj", "up_proj", "down_proj"),
    "lora_head": ("lm_head",),
}
_ON = {"lora_query": True, "lora_value": True}  # by default
_SHAPE = {
    "n_embd": "model.hidden_size",
    "n_layer": "model.num_layers",
    "n_head": "model.num_heads",
    "n_query_groups": "model.num_kv_heads",
    "head_size": "model.head_dim",
    "intermediate_size": "model.intermediate_size",
    "rope_base": "model.rope_theta",
    "padded_vocab_size": "model.vocab_size",
}
# names of litgpt/config.py that are llama's shape -> width, blocks, heads, key/value heads, inner
_NAMED: dict[str, tuple[int, int, int, int, int]] = {
    "micro-llama-300M": (1024, 12, 16, 4, 5632),
    "tiny-llama-1.1b": (2048, 22, 32, 4, 5632),
}
_KEYS: dict[str, Entry] = {
    **same("lora_r", "lora_alpha", "lora_dropout", "seed"),
    "checkpoint_dir": Key("checkpoint_dir"),
    "initial_checkpoint_dir": Key("checkpoint_dir"),
    "model_name": Key("model_name"),
    "tokenizer_dir": Key("tokenizer_dir"),
    "quantize": Key("quantize"),
    "precision": Key("dtype"),
    "out_dir": Key("name", run_name),
    "devices": Key("devices", number),
    "num_nodes": Key("nodes", number),
    "data": Key("data"),
    "data.class_path": Key("data"),
    "data.init_args.json_path": Key("json_path"),
    "data.init_args.train_data_path": Key("json_path"),
    "data.init_args.val_split_fraction": Key("val_size", number),
    "data.init_args.mask_prompt": Key("answers_only", truth),
    "data.init_args.prompt_style": Key("template"),
    "train.global_batch_size": Key("global_rows", number),
    "train.micro_batch_size": Key("micro_rows", number),
    "train.lr_warmup_steps": Key("optim.warmup_steps", number),
    "train.lr_warmup_fraction": Key("epoch_share"),
    "train.epochs": Key("train.epochs", number),
    "train.max_tokens": Key("train.tokens", number),
    "train.max_steps": Key("train.steps", whole),
    "train.max_seq_length": Key("data.max_seq_length", number),
    "train.tie_embeddings": Key("model.tie_embeddings", truth),
    "train.max_norm": Key("max_norm", number),
    "train.min_lr": Key("min_lr", number, "fine-tuning does not read it"),
    "train.save_interval": Key("checkpoint.every_steps", whole),
    "eval.interval": Key("evaluate.every_steps", whole),
    "eval.max_iters": Key("eval_batches", number),
    **{
        f"{place}{name}": Key(f"optim.{ours}", number)
        for place in ("optimizer.init_args.", "train.")
        for name, ours in (
            ("lr", "learning_rate"),
            ("learning_rate", "learning_rate"),
            ("weight_decay", "weight_decay"),
            ("beta1", "beta1"),
            ("beta2", "beta2"),
            ("eps", "eps"),
        )
    },
    "optimizer.init_args.betas": Key("betas"),
    "optimizer": Key("optimizer_class"),
    "optimizer.class_path": Key("optimizer_class"),
    **{name: Key(name, truth, "one of adapter.lora.target_modules") for name in _TARGETS},
    **{
        f"{place}.{name}": Key(fact)
        for place in ("model_config", "model")
        for name, fact in _SHAPE.items()
    },
    "train.max_time": Left("lost", "the run goes to its end; it can be stopped and resumed"),
    "galore.use_galore": Left("lost", "no GaLore here: AdamW instead"),
    "resume": Left("lost", "begin anew; Mule's own runs go on with --resume"),
    "model_config.rotary_percentage": Left(
        "lost", "positions rotate the whole head", (1.0, 1, None)
    ),
    "model.rotary_percentage": Left("lost", "positions rotate the whole head", (1.0, 1, None)),
    "model_config.parallel_residual": Left("lost", "attention comes before the feed-forward layer"),
    "model.parallel_residual": Left("lost", "attention comes before the feed-forward layer"),
    "model_config.norm_class_name": Left("lost", "the norm is RMSNorm", ("RMSNorm", None)),
    "model_config.mlp_class_name": Left(
        "lost", "the feed-forward layer is SwiGLU", ("LLaMAMLP", None)
    ),
    "model_config.bias": Left("lost", "the linear layers have no bias"),
    "model.bias": Left("lost", "the linear layers have no bias"),
    **left(
        "report", "model_config.*", "model.*", "galore.*", "logger_name", "access_token", "log.*"
    ),
    **left("report", "data.init_args.*", "train.log_interval", "eval.*", "config"),
}


def _read(setup: ForeignSetup) -> None:
    pretrains = "checkpoint_dir" not in setup.given
    setup.put("pretrain", pretrains)
    folder = str(setup.value("checkpoint_dir", "")).removeprefix("checkpoints/")
    if folder:
        setup.put("model.path", folder, setup.given[setup.facts["checkpoint_dir"].key])
    if (tokenizer := setup.value("tokenizer_dir")) and not folder:
        setup.put(
            "tokenizer.path",
            str(tokenizer).removeprefix("checkpoints/"),
            setup.given["tokenizer_dir"],
        )
    name = str(setup.value("model_name", ""))
    if pretrains and not setup.value("model.hidden_size") and name in _NAMED:
        for fact, size in zip(list(_SHAPE.values()), _shape_of(name)):
            setup.put(fact, size, setup.given["model_name"])
    if setup.value("model.hidden_size"):
        setup.put("model.family", "llama")
    else:
        setup.facts.pop("model.tie_embeddings", None)
    if not pretrains:
        _read_adapter(setup)
    _read_optimizer(setup, pretrains=pretrains)
    _read_data(setup)
    _assume(setup, pretrains=pretrains)
    batches, micro = setup.number("eval_batches"), setup.number("micro_rows")
    if batches and micro:
        note = f"{batches:g} batches of {micro:g}"
        setup.put(
            "evaluate.max_rows", int(batches * micro), setup.given["eval.max_iters"], note=note
        )


def _shape_of(name: str) -> tuple[int, ...]:
    width, blocks, heads, kv_heads, inner = _NAMED[name]
    return width, blocks, heads, kv_heads, width // heads, inner


def _assume(setup: ForeignSetup, *, pretrains: bool) -> None:
    """The defaults of its commands, which are not the same."""
    rows, warm_up = (512, 2000) if pretrains else (16, 100)
    assumed = {"global_rows": rows, "optim.warmup_steps": warm_up}
    if pretrains:
        assumed |= {"optim.min_learning_rate": 4e-5, "optim.max_grad_norm": 1.0}
    if setup.value("train.steps") is None and setup.value("train.tokens") is None:
        assumed |= {"train.tokens": 3_000_000_000_000} if pretrains else {"train.epochs": 5.0}
    for name, value in assumed.items():
        if setup.value(name) is None:
            setup.put(name, value)


def _read_adapter(setup: ForeignSetup) -> None:
    stated = [name for name in ("lora_r", *_TARGETS) if name in setup.given]
    setup.put("method", "lora" if stated else "full", setup.given[stated[0]] if stated else None)
    quantize = str(setup.value("quantize", ""))
    if quantize:
        setup.put("bits", 8 if "int8" in quantize else 4, setup.given["quantize"])
        setup.put("adapter.lora.double_quant", quantize.endswith("-dq"), setup.given["quantize"])
    on = [name for name in _TARGETS if setup.value(name, _ON.get(name, False)) is True]
    if stated:
        names = [module for name in on for module in _TARGETS[name]]
        source = next((setup.given[name] for name in on if name in setup.given), None)
        setup.put("adapter.lora.target_modules", names, source)


def _read_optimizer(setup: ForeignSetup, *, pretrains: bool) -> None:
    betas = setup.value("betas")
    if isinstance(betas, list) and len(betas) == 2:
        for name, beta in zip(("optim.beta1", "optim.beta2"), betas):
            setup.put(name, number(beta), setup.given["optimizer.init_args.betas"])
    name = str(setup.value("optimizer_class", "AdamW")).rpartition(".")[2].lower()
    if "optimizer_class" in setup.facts:
        setup.put("optimizer", name, setup.given[setup.facts["optimizer_class"].key])
    if pretrains:  # only pretraining reads these two
        for fact, ours in (
            ("min_lr", "optim.min_learning_rate"),
            ("max_norm", "optim.max_grad_norm"),
        ):
            if setup.value(fact) is not None:
                setup.put(ours, setup.value(fact), setup.given[f"train.{fact}"])
        return
    if setup.value("train.tokens") is not None:
        setup.lose(setup.given["train.max_tokens"], "LitGPT's fine-tuning refuses it: epochs count")
        setup.facts.pop("train.tokens")


def _read_data(setup: ForeignSetup) -> None:
    name = str(setup.value("data", "")).rpartition(".")[2]
    if not name:
        return
    given = setup.given[setup.facts["data"].key]
    if name in ("JSON", "TextFiles") and setup.value("json_path"):
        kind = "alpaca" if name == "JSON" else "text"
        put_sets(setup, [DataSet(str(setup.value("json_path")), kind)], given)
    elif name in _DATA:
        path, kind = _DATA[name]
        put_sets(setup, [DataSet(path, kind)], given)
    else:
        setup.lose(given, f"LitGPT prepares `{name}` itself: give the files with --data")
    setup.put("validates", True)


def _traps(setup: ForeignSetup) -> list[Trap]:
    found = []
    if "train.global_batch_size" in setup.given:
        text = (
            "global_batch_size is the whole update, over all devices; micro_batch_size only cuts it"
        )
        found.append(Trap("train.global_batch_size", text))
    if setup.value("pretrain"):
        return found
    if setup.value("answers_only") is not True:
        text = (
            "mask_prompt is false there (the default too): LitGPT trains on the questions as well. "
            "Mule trains the answers only, so the two losses cannot be compared"
        )
        found.append(Trap("data.init_args.mask_prompt", text))
    if setup.value("min_lr") is not None:
        text = "LitGPT's fine-tuning does not read min_lr: its schedule ends at 0, and so does ours"
        found.append(Trap("train.min_lr", text))
    if str(setup.value("dtype", "")) in ("bf16-true", "16-true"):
        text = (
            "the weights themselves are in 16 bits there; Mule keeps them in 32 and computes in "
            "16: more memory, and small updates are not lost"
        )
        found.append(Trap("precision", text))
    clip = "LitGPT's fine-tuning never clips gradients; Mule scales those longer than 1 down"
    return [*found, Trap("train.max_norm", f"{clip} (optim.max_grad_norm)")]


DIALECT = Dialect(
    name="litgpt",
    title="LitGPT",
    version="0.5.13",
    keys=_KEYS,
    signs=frozenset(
        {
            *("checkpoint_dir", "train.global_batch_size", "train.lr_warmup_steps", "lora_query"),
            *(
                "lora_projection",
                "eval.interval",
                "eval.max_iters",
                "logger_name",
                "data.class_path",
            ),
            *(
                "train.save_interval",
                "optimizer.class_path",
                "train.micro_batch_size",
                "model_config.n_embd",
            ),
        }
    ),
    defaults={
        "optim.learning_rate": 1e-3,
        "optim.weight_decay": 0.01,
        "optim.beta1": 0.9,
        "optim.beta2": 0.999,
        "optim.eps": 1e-8,
        "schedule": "cosine",
        "data.too_long": "truncate",
        "train.seed": 1337,
    },
    read=_read,
    traps=_traps,
)
