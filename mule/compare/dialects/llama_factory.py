"""LLaMA-Factory: the YAML or JSON of `llamafactory-cli train`, or its command line.

Keys and defaults of llamafactory 0.9.5. Its data sets are names of `data/dataset_info.json`, which
is read where it lies beside the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mule.compare.dialects import training_arguments as shared
from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import modules, number, truth, whole, words
from mule.errors import UserError

_OTHER_STAGES = {"rm": "reward modelling", "ppo": "PPO", "dpo": "DPO", "kto": "KTO"}
_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini")
_MOST_INFO_BYTES = 5_000_000
_KEYS: dict[str, Entry] = {
    **shared.KEYS,
    **same("model_name_or_path", "cutoff_len", "use_dora", "use_rslora", "lora_rank"),
    **same("lora_alpha", "lora_dropout", "adapter_name_or_path"),
    "model_revision": Key("model.revision", lambda name: None if name == "main" else name),
    "stage": Key("stage"),
    "finetuning_type": Key("finetuning_type"),
    "lora_target": Key("adapter.lora.target_modules", modules),
    "pissa_init": Key("pissa_init", truth),
    "quantization_bit": Key("bits", number),
    "double_quantization": Key("adapter.lora.double_quant", truth),
    "dataset": Key("dataset", words),
    "eval_dataset": Key("eval_dataset", words),
    "dataset_dir": Key("dataset_dir"),
    "template": Key("template"),
    "val_size": Key("val_size", number),
    "max_samples": Key("max_samples", whole),
    "packing": Key("packing", truth),
    "neat_packing": Key("neat_packing", truth),
    "train_on_prompt": Key("on_prompt", truth),
    "use_muon": Key("use_muon", truth),
    "early_stopping_steps": Key("evaluate.patience", whole),
    "additional_target": Left("lost", "these weights are not trained beside the adapter"),
    "loraplus_lr_ratio": Left("lost", "LoRA+ is not there: A and B learn at one rate"),
    "mask_history": Left("lost", "every answer of a chat is trained, not only the last"),
    "train_from_scratch": Left(
        "lost", "give the new model's shape: model.size: 25m, no model.path"
    ),
    "rope_scaling": Left("lost", "positions stay as the model has them"),
    "mixture_of_depths": Left("lost", "every token passes every block"),
    "use_llama_pro": Left("lost", "no blocks are added"),
    "freeze_trainable_layers": Left("lost", "name what stays as it is in train.freeze"),
    "freeze_trainable_modules": Left("lost", "name what stays as it is in train.freeze"),
    "new_special_tokens": Left("lost", "no token is added", (None,)),
    "add_tokens": Left("lost", "no token is added", (None,)),
    "use_dft_loss": Left("lost", "the loss is the usual one, of each token's probability"),
    "use_asft_loss": Left("lost", "the loss is the usual one, of each token's probability"),
    "use_eaft_loss": Left("lost", "the loss is the usual one, of each token's probability"),
    "mix_strategy": Left(
        "lost", "the files are joined; mule data mix mixes them by shares", ("concat", None)
    ),
    "interleave_probs": Left("lost", "the files are joined; mule data mix mixes them by shares"),
    "default_system": Left("lost", "write the system prompt into the chats"),
    "disable_shuffling": Left("lost", "the data is shuffled"),
    "shift_attn": Left("lost", "attention sees every earlier token"),
    **{
        name: Key("optimizer", lambda on, n=name: n.removeprefix("use_") if on is True else None)
        for name in _OPTIMIZERS
    },
    **left("speed", "flash_attn", "use_unsloth*", "enable_liger_kernel", "upcast_*", "pure_bf16"),
    **left("speed", "preprocessing_*", "streaming", "buffer_size", "quantization_method"),
    **left(
        "speed",
        "quantization_type",
        "quantization_device_map",
        "use_kt",
        "kt_*",
        "use_reentrant_gc",
    ),
    **left("speed", "disable_gradient_checkpointing", "infer_*", "ray_*", "resources_per_worker*"),
    **left(
        "report", "plot_loss", "overwrite_cache", "trust_remote_code", "use_swanlab", "swanlab_*"
    ),
    **left("report", "tokenized_path", "cache_dir", "pissa_iter", "pissa_convert", "media_dir"),
    **left(
        "report", "tool_format", "enable_thinking", "preserve_thinking", "ignore_pad_token_for_loss"
    ),
    **left(
        "report", "galore_*", "apollo_*", "badam_*", "loraplus_lr_embedding", "placement_strategy"
    ),
    **left(
        "report", "resize_vocab", "use_fast_tokenizer", "split_special_tokens", "compute_accuracy"
    ),
    **left("report", "image_*", "video_*", "freeze_vision_tower", "freeze_multi_modal_projector"),
    **left("report", "hf_hub_token", "ms_hub_token", "predict_with_generate", "create_new_adapter"),
}


def _read(setup: ForeignSetup) -> None:
    shared.settle(setup)
    stage = str(setup.value("stage", "sft"))
    if str(stage) in _OTHER_STAGES:
        raise UserError(
            f"{setup.place('stage')} = {stage}: {_OTHER_STAGES[stage]} has no equivalent; Mule "
            "pretrains and fine-tunes on texts and chats",
            "import a file of stage pt or sft",
        )
    setup.put("pretrain", stage == "pt", setup.given.get("stage"))
    kind = setup.value("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        happens = "there is no such method: LoRA is taken instead"
        setup.lose(setup.given["finetuning_type"], happens)
    setup.put("method", "full" if kind == "full" else "lora", setup.given.get("finetuning_type"))
    if setup.value("adapter.lora.alpha") is None and (rank := setup.number("adapter.lora.r")):
        setup.put("adapter.lora.alpha", 2 * rank, note="twice the rank, as LLaMA-Factory assumes")
    if setup.value("pissa_init") is True:
        setup.put("adapter.lora.init", "pissa", setup.given["pissa_init"])
    if setup.value("use_muon") is True:
        setup.put("optimizer", "muon", setup.given["use_muon"])
    packing = setup.value("packing", setup.value("neat_packing", stage == "pt"))
    source = "neat_packing" if setup.value("neat_packing") is True else "packing"
    setup.put("data.packing", bool(packing or setup.value("neat_packing")), setup.given.get(source))
    _read_sets(setup)


def _read_sets(setup: ForeignSetup) -> None:
    """The data sets by what dataset_info.json says of their names."""
    folder = Path(str(setup.value("dataset_dir", "data")))
    places = (Path(setup.file).parent / folder, folder, Path(setup.file).parent)
    info_file = next(
        (p / "dataset_info.json" for p in places if (p / "dataset_info.json").is_file()), None
    )
    info: dict[str, Any] = {}
    if info_file is not None and info_file.stat().st_size <= _MOST_INFO_BYTES:
        info = _info(info_file)
        folder = info_file.parent
    for fact, is_valid in (("dataset", False), ("eval_dataset", True)):
        names = setup.value(fact)
        if names:
            sets = [_entry(name, info, folder, is_valid=is_valid) for name in names]
            put_sets(setup, sets, setup.given[fact])


def _info(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}", "mend it, or move it away") from None
    return found if isinstance(found, dict) else {}


def _entry(name: str, info: dict[str, Any], folder: Path, *, is_valid: bool) -> DataSet:
    entry = info.get(name) if isinstance(info.get(name), dict) else None
    if entry is None:
        return DataSet(str(folder / f"{name}.json"), part="a guess", is_valid=is_valid, name=name)
    path = entry.get("hf_hub_url") or str(folder / str(entry.get("file_name", name)))
    columns, tags = _map(entry, "columns"), _map(entry, "tags")
    if entry.get("ranking") or "kto_tag" in columns:
        return DataSet(str(path), "preference", is_valid=is_valid, name=name)
    if entry.get("formatting", "alpaca") == "sharegpt":
        chats = tags.get("content_tag", "value") == "content"
        ours = "messages" if chats else "conversations"
        theirs = columns.get("messages", "conversations")
        renamed = {} if theirs == ours else {ours: str(theirs)}
        return DataSet(
            str(path), "messages" if chats else "sharegpt", renamed, is_valid=is_valid, name=name
        )
    if columns.get("prompt") == "text" and "response" not in columns:
        return DataSet(str(path), is_valid=is_valid, name=name)
    names = {"prompt": "instruction", "query": "input", "response": "output"}
    renamed = {
        ours: str(columns[key]) for key, ours in names.items() if columns.get(key, ours) != ours
    }
    return DataSet(str(path), "alpaca", renamed, is_valid=is_valid, name=name)


def _map(entry: dict[str, Any], key: str) -> dict[str, Any]:
    found = entry.get(key)
    return found if isinstance(found, dict) else {}


def _traps(setup: ForeignSetup) -> list[Trap]:
    found = shared.batch_trap(setup)
    if setup.value("packing") is True and setup.value("neat_packing") is not True:
        text = (
            "without neat_packing, examples packed into one row see each other there; Mule always "
            "keeps chats apart"
        )
        found.append(Trap("packing", text))
    return found


DIALECT = Dialect(
    name="llama-factory",
    title="LLaMA-Factory",
    version="0.9.5",
    keys=_KEYS,
    signs=frozenset(
        {
            *("stage", "finetuning_type", "lora_rank", "lora_target", "template", "cutoff_len"),
            *("dataset", "val_size", "quantization_bit", "overwrite_cache", "plot_loss"),
            *("pissa_init", "neat_packing", "train_on_prompt", "dataset_dir", "loraplus_lr_ratio"),
        }
    ),
    defaults={
        **shared.DEFAULTS,
        "adapter.lora.r": 8,
        "data.max_seq_length": 2048,
        "data.too_long": "truncate",
        "val_size": 0.0,
        "devices": 1,
    },
    read=_read,
    traps=_traps,
)
