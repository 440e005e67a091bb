"""mlx-lm: the YAML of `mlx_lm.lora --config`, or its command line.

Keys and defaults of mlx-lm 0.32 (mlx_lm/lora.py, tuner/trainer.py, tuner/utils.py). One iteration is
one batch, and an update after every `grad_accumulation_steps` of them.
"""

from __future__ import annotations

from mule.compare.dialects.data_sets import DataSet, put_sets
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Dialect, Entry, Key, Left, Trap, left, same
from mule.compare.dialects.values import modules, number, run_name, truth, whole
from mule.errors import UserError

_OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
KEYS: dict[str, Entry] = {
    **same("learning_rate", "seed", "max_seq_length"),
    "model": Key("model.path"),
    "data": Key("data"),
    "fine_tune_type": Key("fine_tune_type"),
    "training_mode": Key("training_mode"),
    "train_mode": Key("training_mode"),
    "num_layers": Key("num_layers", number),
    "lora_layers": Key("num_layers", number),
    "batch_size": Key("micro_rows", number),
    "grad_accumulation_steps": Key("accumulation", number),
    "iters": Key("iterations", number),
    "val_batches": Key("val_batches", number),
    "steps_per_eval": Key("eval_iterations", whole),
    "save_every": Key("save_iterations", whole),
    "optimizer": Key("optimizer"),
    "mask_prompt": Key("answers_only", truth),
    "adapter_path": Key("name", run_name),
    "lora_parameters.rank": Key("adapter.lora.r", number),
    "lora_parameters.scale": Key("lora_scale", number),
    "lora_parameters.alpha": Key("ignored_alpha", number),
    "lora_parameters.dropout": Key("adapter.lora.dropout", number),
    "lora_parameters.keys": Key("adapter.lora.target_modules", modules),
    "lr_schedule.name": Key("schedule"),
    "lr_schedule.warmup": Key("optim.warmup_steps", number),
    "lr_schedule.arguments": Key("arguments"),
    "hf_dataset.path": Key("hf_dataset"),
    "hf_dataset.name": Key("hf_dataset"),
    **{
        f"optimizer_config.{name}.{key}": Key(fact)
        for name in _OPTIMIZERS[:2]
        for key, fact in (
            ("betas", "betas"),
            ("eps", "optim.eps"),
            ("weight_decay", "optim.weight_decay"),
        )
    },
    "resume_adapter_file": Left("lost", "an adapter of mlx-lm cannot be gone on with; begin anew"),
    "lr_schedule.warmup_init": Left("report"),
    "hf_dataset.*": Left("lost", "name the columns in data.columns, the part in the file's name"),
    "optimizer_config.*": Left("report"),
    **left("speed", "grad_checkpoint", "clear_cache_threshold"),
    **left("report", "train", "test", "test_batches", "steps_per_report", "report_to", "wandb"),
    **left("report", "project_name", "trust_remote_code", "config", "adapter_file"),
}
DEFAULTS = {
    "optim.learning_rate": 1e-5,
    "optimizer": "adam",
    "micro_rows": 4,
    "accumulation": 1,
    "iterations": 1000,
    "num_layers": 16,
    "val_batches": 25,
    "data.max_seq_length": 2048,
    "data.packing": False,
    "data.too_long": "truncate",
    "schedule": "constant",
    "optim.beta1": 0.9,
    "optim.beta2": 0.999,
    "optim.eps": 1e-8,
    "adapter.lora.r": 8,
    "adapter.lora.dropout": 0.0,
    "train.seed": 0,
    "validates": True,
    "plain_constant": False,
}


def read(setup: ForeignSetup) -> None:
    """What mlx-lm makes of several keys at once."""
    mode = setup.value("training_mode", "normal")
    if mode not in ("normal", "sft"):
        problem = (
            f"{setup.place('training_mode')} = {mode}: training on preferences has no equivalent"
        )
        raise UserError(problem, "import a file that fine-tunes on chats or texts")
    kind = setup.value("fine_tune_type", "lora")
    setup.put("method", "full" if kind == "full" else "lora", setup.given.get("fine_tune_type"))
    if kind == "dora":
        setup.put("adapter.lora.use_dora", True, setup.given["fine_tune_type"])
    layers = setup.number("num_layers")
    source = setup.given.get(setup.facts["num_layers"].key) if "num_layers" in setup.facts else None
    if layers is not None and kind != "full":
        setup.put("adapter.lora.last_layers", int(layers), source)
    has_own = any(key.startswith("lora_parameters.") for key in setup.given)
    if setup.value("lora_scale") is None and not has_own:  # given in part, it must name its scale
        setup.put("lora_scale", 20.0)
    _read_optimizer(setup)
    _read_cadence(setup)
    path = setup.value("data", setup.value("hf_dataset"))
    if path is not None:
        fact = "data" if setup.value("data") is not None else "hf_dataset"
        put_sets(setup, [DataSet(str(path))], setup.given.get(setup.facts[fact].key))


def _read_optimizer(setup: ForeignSetup) -> None:
    if setup.value("optim.weight_decay") is None:
        setup.put("optim.weight_decay", 0.01 if setup.value("optimizer") == "adamw" else 0.0)
    betas = setup.value("betas")
    if isinstance(betas, list) and len(betas) == 2:
        source = setup.given[setup.facts["betas"].key]
        for name, beta in zip(("optim.beta1", "optim.beta2"), betas):
            setup.put(name, number(beta), source)
    arguments = setup.value("arguments")
    if isinstance(arguments, list) and arguments:
        source = setup.given["lr_schedule.arguments"]
        setup.put("optim.learning_rate", number(arguments[0]), source)
        if setup.value("schedule") == "cosine_decay" and len(arguments) > 2:
            setup.put("optim.min_learning_rate", number(arguments[2]), source)
        if len(arguments) > 1:
            setup.put("decay_steps", number(arguments[1]), source)
    if setup.value("optim.warmup_steps") is None:
        setup.put("optim.warmup_steps", 0)


def _read_cadence(setup: ForeignSetup) -> None:
    """Evaluations and saves count iterations there, updates here."""
    each = int(setup.number("accumulation") or 1)
    for fact, ours in (
        ("eval_iterations", "evaluate.every_steps"),
        ("save_iterations", "checkpoint.every_steps"),
    ):
        if setup.number(fact) is not None:
            every = max(1, int(setup.value(fact)) // max(1, each))
            setup.put(ours, every, setup.given.get(setup.facts[fact].key))
    batches, rows = setup.number("val_batches"), setup.number("micro_rows")
    if batches and batches > 0 and rows:
        note = f"{batches:g} batches of {rows:g}"
        source = setup.given.get(setup.facts["val_batches"].key)
        setup.put("evaluate.max_rows", int(batches * rows), source, note=note)


def traps(setup: ForeignSetup) -> list[Trap]:
    """What mlx-lm's users take for something else."""
    found = []
    scale, rank = setup.number("lora_scale"), setup.number("adapter.lora.r")
    alpha = setup.number("ignored_alpha")
    if scale is not None and rank is not None and setup.value("method") != "full":
        text = (
            f"scale multiplies the update: {scale:g} is what the others call alpha / r, so alpha is "
            f"{scale * rank:g} at rank {rank:g}"
        )
        if alpha is not None:
            text += f"; `alpha: {alpha:g}` is not read at all"
        found.append(Trap("lora_parameters.scale", text))
    if setup.value("answers_only") is not True:
        text = (
            "without mask_prompt, mlx-lm trains on the whole chat: system prompt and questions too. "
            "Mule trains the answers only, so the two losses cannot be compared"
        )
        found.append(Trap("mask_prompt", text))
    steps = setup.number("accumulation") or 1
    text = "batch_size is one iteration's, over all devices"
    text += f"; an update comes after {steps:g} of them" if steps > 1 else ", and each is an update"
    found.append(Trap("batch_size", text))
    if setup.value("method") == "full" and (setup.number("num_layers") or -1) > 0:
        count = setup.value("num_layers")
        text = (
            f"fine_tune_type: full trains only the last {count} blocks there (num_layers); the recipe "
            "trains all weights: name those that stay in train.freeze"
        )
        found.append(Trap("num_layers", text))
    text = (
        "mlx-lm never clips gradients (optim.max_grad_norm), and does not correct Adam's bias, so its "
        "first updates are up to three times as long; Mule does both"
    )
    found.append(Trap("optimizer", text))
    if str(setup.value("model.path", "")).lower().endswith(("-4bit", "-8bit", "-6bit", "-3bit")):
        text = "weights in mlx's own quantised form cannot be read: give the original model"
        found.append(Trap("model", f"{text}, and adapter.kind: qlora for 4 bits"))
    return found


DIALECT = Dialect(
    name="mlx-lm",
    title="mlx-lm",
    version="0.32.2",
    keys=KEYS,
    signs=frozenset(
        {
            *("iters", "fine_tune_type", "val_batches", "steps_per_eval", "steps_per_report"),
            *(
                "lora_parameters.rank",
                "lora_parameters.scale",
                "lora_parameters.keys",
                "grad_checkpoint",
            ),
            *("save_every", "resume_adapter_file", "adapter_path", "mask_prompt", "lora_layers"),
            *("lr_schedule.arguments", "test_batches"),
        }
    ),
    defaults=DEFAULTS,
    read=read,
    traps=traps,
)
