"""A recipe or a run as a setup: the same words as the published ones, each value with its source.

What a recipe leaves to be decided is decided as training would, where that needs neither the data
prepared nor the machine; what does need them is left out, or said to be automatic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mule.compare.data_size import examples_in
from mule.compare.derive import FILLED, SHARED, UNPACKED, completed
from mule.compare.model_size import Size, size_of
from mule.compare.sourced import Setup, Value
from mule.config.dump import read_reasons, value_of
from mule.config.load import Loaded, load_recipe
from mule.config.schema import Recipe
from mule.doctor.history import FACTS, kind_of, read_history
from mule.message import Message
from mule.plan import fine_tune
from mule.run import Run

_AVERAGED_OVER = 20  # the last training loss is the mean over so much of the run: 1/20
MATRICES = "matrices"  # what Mule's weight decay is on, always
_AS_THEY_ARE = {
    "optimizer": "optim.kind",
    "schedule": "optim.schedule",
    "max_grad_norm": "optim.max_grad_norm",
    "weight_decay": "optim.weight_decay",
    "max_seq_length": "data.max_seq_length",
    "precision": "train.precision",
}
_WHERE_GIVEN = {
    "min_learning_rate": "optim.min_learning_rate",
    "warmup_steps": "optim.warmup_steps",
    "steps": "train.steps",
    "batch_rows": "train.step_rows",
}


def from_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Setup:
    """The setup that a recipe describes. Raises ConfigError as training would."""
    loaded = load_recipe(path, list(overrides), complete=False)
    values = _settings(loaded.recipe, f"{path}", loaded)
    values |= _size(size_of(loaded.recipe))
    values |= _planned(loaded.recipe, str(path))
    name = loaded.recipe.name or Path(path).stem
    kind = kind_of(loaded.recipe)
    setup = completed(Setup(name, Message("the recipe {!s}", path), kind, "recipe", values))
    return _with_warmup(setup, loaded.recipe)


def from_run(run: Run) -> Setup:
    """The setup of a run, and how it went. UserError of one that made no update."""
    history = read_history(run)
    recipe = history.recipe
    reasons = read_reasons((run.folder / "resolved.yaml").read_text(encoding="utf-8"))
    values = _settings(recipe, f"{run.folder}/resolved.yaml")
    for key, setting in (("learning_rate", "optim.learning_rate"), ("steps", "train.steps")):
        if setting in reasons and key in values:
            values[key] = _noted(values[key], reasons[setting]["reason"])
    values |= _size(size_of(recipe, run.folder))
    values |= _measured_data(run, history.facts, history.rows, recipe)
    values |= _machine(run, history.lineage, history.rows)
    values |= _losses(run, history.rows)
    return completed(
        Setup(run.name, Message("the run {!s}", run.name), kind_of(recipe), "run", values)
    )


# ---------------------------------------------------------------- settings


class _Reader:
    """The settings of a recipe as values; a loaded one tells the file and line of each."""

    def __init__(self, recipe: Recipe, source: str, loaded: Loaded | None) -> None:
        self.recipe, self._source, self._loaded = recipe, source, loaded

    def value(self, found: Any, key: str, note: str = "") -> Value:
        if self._loaded is None:
            return Value(found, f"{self._source}: {key}", note)
        if key in self._loaded.set_keys:
            return Value(found, self._loaded.place(key), note)
        return Value(found, key, note or "the default")

    def setting(self, key: str) -> Value:
        return self.value(value_of(self.recipe, key), key)


def _settings(recipe: Recipe, source: str, loaded: Loaded | None = None) -> dict[str, Value]:
    """What the recipe itself says."""
    read = _Reader(recipe, source, loaded)
    model = recipe.model.path or recipe.model.size or recipe.model.family
    found = {
        "model": read.value(model, "model.path" if recipe.model.path else "model"),
        "data": read.value(", ".join(recipe.data.train) or "none given", "data.train"),
        "decay_on": read.value(MATRICES, "optim.weight_decay", "never norms, biases, embeddings"),
        "packing": read.value(_packing(recipe), "data.packing"),
        "learning_rate": read.setting("optim.learning_rate"),
    }
    found |= {key: read.setting(name) for key, name in _AS_THEY_ARE.items()}
    found |= _pretraining(recipe)
    if recipe.optim.learning_rate == "auto":
        rate, why = fine_tune.chosen_rate(recipe)
        found["learning_rate"] = Value(rate, "optim.learning_rate", f"auto: {why}")
    optional = {key: read.setting(name) for key, name in _WHERE_GIVEN.items()}
    found |= {key: value for key, value in optional.items() if value.value}
    if recipe.adapter.kind != "none":
        targets = recipe.adapter.lora.target_modules
        words = "all linear" if targets == "all-linear" else ", ".join(targets)
        found["lora_r"] = read.setting("adapter.lora.r")
        found["lora_alpha"] = read.setting("adapter.lora.alpha")
        found["lora_targets"] = read.value(words, "adapter.lora.target_modules")
    return found


def _pretraining(recipe: Recipe) -> dict[str, Value]:
    """The learning rate of the base, where that is a run of Mule's."""
    file = Path(recipe.model.path or "") / "resolved.yaml"
    if recipe.model.path is None or not file.is_file():
        return {}
    base = load_recipe(file).recipe.optim.learning_rate
    return (
        {} if base == "auto" else {"pretraining_rate": Value(base, f"{file}: optim.learning_rate")}
    )


def _packing(recipe: Recipe) -> str:
    """Whether an update is counted in filled rows, or in examples that may share rows."""
    if kind_of(recipe) == "pretrain":
        return FILLED
    in_examples = recipe.train.step_rows is None and recipe.train.step_tokens is None
    if not recipe.data.packing:
        return UNPACKED
    return SHARED if in_examples else FILLED


def _size(size: Size | None) -> dict[str, Value]:
    if size is None:
        return {}
    rests_on = "" if size.is_exact else "a name, which rounds"
    found = {"parameters": Value(size.parameters, size.source, "", size.is_exact, rests_on)}
    if size.vocab_size:
        found["vocab_size"] = Value(size.vocab_size, size.source, "rows of the embedding")
    return found


# ---------------------------------------------------------------- a recipe before its run


def _planned(recipe: Recipe, source: str) -> dict[str, Value]:
    """Examples, length and warm-up, as training would decide them of the files as they are."""
    found = _examples(recipe)
    count = int(found["rows"].value) if "rows" in found else 0
    found |= _update(recipe, source, count) | _length(recipe, source, count)
    if recipe.train.tokens is not None:
        found["trained_tokens"] = Value(recipe.train.tokens, f"{source}: train.tokens")
    return found


def _with_warmup(setup: Setup, recipe: Recipe) -> Setup:
    """The warm-up that training chooses, once the length is known."""
    steps = setup.number("steps")
    if steps is None or recipe.optim.warmup_steps is not None:
        return setup
    chosen = min(max(1, round(0.05 * steps)), 500, max(0, int(steps) - 1))
    value = Value(chosen, "optim.warmup_steps", "auto: 5% of the run, at most 500 updates")
    return completed(replace(setup, values={**setup.values, "warmup_steps": value}))


def _examples(recipe: Recipe) -> dict[str, Value]:
    """Examples that are trained on: those of the files without the ones held out."""
    if (counted := examples_in(recipe.data)) is None:
        return {}
    from mule.data.hold_out import share_of_chats

    number, where = counted
    share = recipe.data.valid_share
    if share == "auto":
        share = share_of_chats(number)
    held_out = 0 if recipe.data.valid is not None else round(number * share)
    note = f"{held_out:,} more are held out" if held_out else ""
    return {"rows": Value(number - held_out, f"lines of {where}", note)}


def _update(recipe: Recipe, source: str, count: int) -> dict[str, Value]:
    """The size of an update, in sequences, or in tokens where that is how it is given."""
    train, length = recipe.train, recipe.data.max_seq_length
    if train.step_tokens is not None:
        rows = max(1, train.step_tokens // length)
        tokens = Value(rows * length, f"{source}: train.step_tokens")
        return {"batch_tokens": tokens, "batch_rows": Value(rows, f"{source}: train.step_tokens")}
    if train.step_examples is not None:
        note = "in packed rows, as many as hold so many examples" if recipe.data.packing else ""
        return {"batch_rows": Value(train.step_examples, f"{source}: train.step_examples", note)}
    if train.step_rows is not None:
        return {}
    if kind_of(recipe) == "pretrain":
        return {
            "batch_rows": Value(max(1, 8192 // length), "train.step_rows", "about 8,192 tokens")
        }
    if count:
        chosen = fine_tune.chosen_examples(count)
        return {"batch_rows": Value(chosen, "train.step_examples", f"chosen for {count:,} chats")}
    return {}


def _length(recipe: Recipe, source: str, count: int) -> dict[str, Value]:
    train = recipe.train
    if train.epochs is not None:
        return {"epochs": Value(train.epochs, f"{source}: train.epochs")}
    if train.steps is not None or train.tokens is not None:
        return {}
    if kind_of(recipe) == "pretrain":
        return {"epochs": Value(1.0, "train.epochs", "the default")}
    if count:
        chosen = float(fine_tune.chosen_epochs(count))
        return {"epochs": Value(chosen, "train.epochs", f"chosen for {count:,} chats")}
    return {}


# ---------------------------------------------------------------- a run


def _measured_data(
    run: Run, facts: dict[str, Any], rows: Sequence[dict[str, Any]], recipe: Recipe
) -> dict[str, Value]:
    """Examples, tokens and epochs, as the run counted them."""
    found: dict[str, Value] = {}
    data, where = facts.get("data", {}), f"{run.folder}/{FACTS}"
    if number := data.get("num_examples"):
        found["rows"] = Value(number, where, f"in {data['num_rows']:,} rows")
    if number := data.get("num_tokens"):
        found["data_tokens"] = Value(number, where)
    last = rows[-1] if rows else {}
    if last.get("epoch") and recipe.train.steps:
        epochs = last["epoch"] * recipe.train.steps / last["step"]
        found["epochs"] = Value(epochs, f"{run.folder}/metrics.jsonl: epoch")
    if rows:
        targets = sum(row.get("num_targets", 0) for row in rows)
        source = f"{run.folder}/metrics.jsonl: num_targets"
        found["trained_tokens"] = Value(targets, source, f"in {len(rows):,} updates")
    return found


def _machine(run: Run, lineage: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    machine = lineage.get("machine", {})
    devices = next((row["devices"] for row in reversed(rows) if row.get("devices")), [])
    names = [device.get("name") or device.get("device", "") for device in devices]
    gpus = [name for name in names if name and name != "cpu"]
    if gpus:
        found["hardware"] = Value(
            f"{len(gpus)} x {gpus[0]}", f"{run.folder}/metrics.jsonl: devices"
        )
    elif machine.get("cpu"):
        text = f"{machine['cores']} cores, {machine['cpu']}"
        found["hardware"] = Value(text, f"{run.folder}/lineage.json: machine")
    if seconds := training_seconds(run):
        found["hours"] = Value(seconds / 3600, f"{run.folder}: times of its events and updates")
    return found


def training_seconds(run: Run) -> float:
    """From the start of each attempt to its last update, together."""
    starts = {e["attempt"]: e["at"] for e in run.events() if e["kind"] == "started"}
    ends: dict[int, float] = {}
    for row in run.metrics():
        ends[row["attempt"]] = max(row["at"], ends.get(row["attempt"], 0.0))
    return sum(max(0.0, end - starts[number]) for number, end in ends.items() if number in starts)


def _losses(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Value]:
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    if not losses:
        return {}
    where = f"{run.folder}/metrics.jsonl"
    first = Value(losses[0], f"{where}: loss", f"training loss of update {rows[0]['step']}")
    held_out = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    if held_out:
        last = Value(held_out[-1], f"{where}: val_loss", "validation")
    else:
        tail = losses[-max(1, len(losses) // _AVERAGED_OVER) :]
        last = Value(sum(tail) / len(tail), f"{where}: loss", f"mean of {len(tail)} updates")
    return {"initial_loss": first, "final_loss": last}


def _noted(value: Value, note: str) -> Value:
    return replace(value, note=note)
