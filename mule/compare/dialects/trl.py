"""TRL: the YAML of TrlParser (`trl sft --config`), or the command line of `trl sft`.

Keys and defaults of trl 1.16 (SFTConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig);
alignment-handbook's recipes use them too, with `dataset_mixture` and `dataset_mixer`.
"""

from __future__ import annotations

from mule.compare.dialects import training_arguments as shared
from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import modules, number, truth

_SPLIT = "Mule finds the files of a folder or hub repository by their names: train, valid, test"
_KEYS: dict[str, Entry] = {
    **shared.KEYS,
    **same("model_name_or_path", "max_length", "max_seq_length", "use_rslora", "use_dora"),
    **same("lora_r", "lora_alpha", "lora_dropout"),
    "model_revision": Key("model.revision", lambda name: None if name == "main" else name),
    "lora_target_modules": Key("adapter.lora.target_modules", modules),
    "use_peft": Key("use_peft", truth),
    "load_in_4bit": Key("load_in_4bit", truth),
    "load_in_8bit": Key("load_in_8bit", truth),
    "use_bnb_nested_quant": Key("adapter.lora.double_quant", truth),
    "packing": Key("data.packing", truth),
    "num_processes": Key("devices", number),
    "dataset_name": Key("dataset_name"),
    "dataset_config": Left(
        "lost", "name the folder of the hub repository: ORG/NAME/FOLDER", ("default", None)
    ),
    "dataset_train_split": Left("lost", _SPLIT, ("train", None)),
    "dataset_test_split": Left("lost", _SPLIT, ("test", None)),
    "dataset_text_field": Key("text_field"),
    "datasets": Key("mixture"),
    "dataset_mixture.datasets": Key("mixture"),
    "dataset_mixture.test_split_size": Key("val_size", number),
    "test_split_size": Key("val_size", number),
    "dataset_mixture.seed": Left("report"),
    "dataset_mixer.*": Left("report"),
    "dataset_splits": Left("report"),
    "dataset_configs": Left("lost", "name the folder of the hub repository: ORG/NAME/FOLDER"),
    "assistant_only_loss": Key("answers_only", truth),
    "completion_only_loss": Key("answers_only", truth),
    "chat_template": Key("template"),
    "chat_template_path": Key("template"),
    "lora_modules_to_save": Left("lost", "these weights are not trained beside the adapter"),
    "loss_type": Left(
        "lost",
        "the loss is the usual one, of each token's probability",
        ("nll", "chunked_nll", None),
    ),
    "shuffle_dataset": Left("report"),
    "eos_token": Left("lost", "the model's own template says what ends an answer"),
    "env.*": Left("report"),
    **left("speed", "attn_implementation", "use_flash_attention_2", "torch_dtype", "dtype"),
    **left(
        "speed", "dataset_num_proc", "preprocessing_num_workers", "padding_free", "eval_packing"
    ),
    **left("speed", "packing_strategy", "pad_to_multiple_of", "activation_offloading", "use_cache"),
    **left("speed", "accelerate_config", "bnb_4bit_*", "model_init_kwargs*", "dataset_streaming"),
    **left(
        "report", "trust_remote_code", "config", "pad_token", "dataset_kwargs*", "lora_task_type"
    ),
    **left("report", "truncation_mode", "auto_insert_empty_system_msg", "seed_data"),
}


def _read(setup: ForeignSetup) -> None:
    shared.settle(setup)
    shared.put_bits(setup)
    setup.put(
        "method", "lora" if setup.value("use_peft") is True else "full", setup.given.get("use_peft")
    )
    mixture = setup.value("mixture")
    entries = mixture if isinstance(mixture, list) else []
    sets = [_entry(entry) for entry in entries if isinstance(entry, dict)]
    source = setup.facts.get("mixture")
    if not sets and setup.value("dataset_name") is not None:
        source = setup.facts["dataset_name"]
        columns = (
            {"text": setup.value("text_field")}
            if setup.value("text_field", "text") != "text"
            else {}
        )
        sets = [DataSet(str(source.value), columns=columns)]
    mixer = [key for key in setup.given if key.startswith("dataset_mixer.")]
    if not sets and mixer:
        sets = [DataSet(key.removeprefix("dataset_mixer.")) for key in mixer]
        put_sets(setup, sets, setup.given[mixer[0]])
    elif sets and source is not None:
        put_sets(setup, sets, setup.given.get(source.key))


def _entry(entry: dict) -> DataSet:
    path = str(entry.get("path") or entry.get("id") or "")
    part = f"split {entry['split']}" if entry.get("split") not in (None, "train") else ""
    share = entry.get("weight", entry.get("fraction"))
    part = f"{part}, {share} of it".strip(", ") if share not in (None, 1, 1.0) else part
    return DataSet(path, part=part)


def _traps(setup: ForeignSetup) -> list[Trap]:
    found = shared.batch_trap(setup)
    if setup.value("answers_only") is not True:
        text = (
            "without assistant_only_loss, TRL trains on the whole chat: system prompt and "
            "questions too. Mule trains the answers only, so the two losses cannot be compared"
        )
        found.append(Trap("assistant_only_loss", text))
    lora = [key for key in setup.given if key.startswith("lora_")]
    if lora and setup.value("use_peft") is not True and not setup.is_stated("bits"):
        text = f"{', '.join(lora)} do nothing without use_peft: true; all weights are trained"
        found.append(Trap(lora[0], text))
    return found


DIALECT = Dialect(
    name="trl",
    title="TRL",
    version="1.16.0",
    keys=_KEYS,
    signs=frozenset(
        {
            *(
                "dataset_name",
                "dataset_train_split",
                "dataset_test_split",
                "dataset_mixture.datasets",
            ),
            *("use_peft", "assistant_only_loss", "completion_only_loss", "packing_strategy"),
            *("attn_implementation", "dataset_num_proc", "torch_dtype", "dataset_text_field"),
            *("dataset_splits", "use_bnb_nested_quant", "model_revision"),
        }
    ),
    defaults={
        **shared.DEFAULTS,
        "optim.learning_rate": 2e-5,
        "data.max_seq_length": 1024,
        "data.packing": False,
        "data.too_long": "truncate",
        "adapter.lora.r": 16,
        "adapter.lora.alpha": 32,
        "adapter.lora.dropout": 0.05,
        "adapter.lora.double_quant": False,
        "validates": False,
        "devices": 1,
    },
    read=_read,
    traps=_traps,
)
