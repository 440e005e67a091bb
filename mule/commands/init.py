"""`mule init`: an example of data and recipe, to be replaced by one's own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from mule.errors import UserError

_BASE = "demo/runs/sft"  # what `mule demo` leaves behind
_FIRST_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"  # to begin with: small, and answers in many languages
_TRAIN = (
    ("How often should I oil my chain?", "Every 150 kilometres, and after every ride in the rain."),
    ("My brakes squeal. What can I do?", "Clean the rim and the pads. If it goes on, come by."),
    (
        "Do you sell used bikes?",
        "Yes, five or six at any time. Each one is checked before it goes.",
    ),
    ("When are you open?", "Tuesday to Saturday, from nine to six. On Mondays we ride ourselves."),
    ("What does a new tube cost?", "Eight euros, and five more if we put it in for you."),
    ("Can you fix a flat while I wait?", "Yes, it takes about fifteen minutes. There is coffee."),
    ("Which tyre pressure is right?", "It is printed on the side of the tyre. Stay in the middle."),
    ("My gears jump.", "The cable has probably stretched. Turn the adjuster half a turn out."),
    (
        "Do you repair electric bikes?",
        "Wheels, brakes and gears, yes. For the motor ask its maker.",
    ),
    ("Is my helmet still good?", "After a fall it is not. Otherwise change it every five years."),
)
_DIALOGUES = (
    (
        ("I want to book a check-up.", "Gladly! Which bike is it, and which day suits you?"),
        ("A city bike, on Friday.", "Friday at ten is free. Please bring the key of the lock."),
    ),
    (
        ("My saddle hurts.", "Is it the height, or is it too soft or too hard?"),
        ("I think it is too low.", "With the heel on the pedal your leg should be straight."),
    ),
)
_VALID = (
    ("How do I clean my bike?", "With warm water, a brush and a little soap. Never a steam jet."),
    ("Do you buy old bikes?", "If they can still be ridden, yes. Bring it and we have a look."),
    ("My light does not work.", "Check the plug at the hub first. If it sits well, come by."),
    ("How long does a repair take?", "Most are done the next day. In spring allow three."),
)
_OF_THE_DEMO = """\
train:
  epochs: 80 # passes over the data: a dozen chats are learned by heart, thousands need 1 to 3
  step_examples: 4 # chats in one update

optim:
  learning_rate: 5e-3 # for the demo's model of 4M weights; 2e-4 from a billion on

"""
_BY_HEART = """\
  valid_share: 0 # so small a model can only learn them by heart; of a larger one, see how it does
  # on chats that it does not learn: valid: [{valid}]"""
_RECIPE = """\
# yaml-language-server: $schema=recipe.schema.json
# Teach a model the manner of a bicycle workshop: a LoRA adapter on a few chats.
# Look at the data: mule data preview {recipe}
# Train:            mule train {recipe}
# Paths are relative to the folder the command runs in. Every key: docs/configuration.md

name: {name}

model:
  # The model to adapt: a run, a folder in Hugging Face layout, or a hub id.
  path: {base}

data:
  # A chat a line: {{"messages": [{{"role": "user", "content": "..."}}, ...]}}
  # Only the assistant's words are learned.
  train: [{train}]
{valid}
  max_seq_length: 256 # tokens; longer chats are left out. At most the model's context

adapter:
  kind: lora # small matrices beside the frozen weights; `none` trains every weight
  lora:
    r: {rank} # their rank: more can learn more, and takes more memory
    alpha: {alpha}

{training}evaluate:
  prompts: ["When are you open?"] # answered along the way, to see the model learn
"""


def run(folder: Path = Path(), *, model: str | None = None) -> dict[str, Any]:
    """Write data, a recipe for `model` and its schema into `folder`; of no model, for the demo's.

    Raises UserError when one of the files is there.
    """
    from mule import fsio
    from mule.config.docs import SCHEMA, json_schema

    train, valid = folder / "data" / "train.jsonl", folder / "data" / "valid.jsonl"
    recipe, schema = folder / "recipe.yaml", folder / SCHEMA
    _refuse_existing(folder, [train, valid, recipe, schema])
    fsio.write_text(train, _chats([*((turn,) for turn in _TRAIN), *_DIALOGUES]))
    fsio.write_text(valid, _chats([(turn,) for turn in _VALID]))
    fsio.write_json(schema, json_schema())
    fsio.write_text(recipe, _recipe_text(folder, recipe, (train, valid), model))
    return {
        "recipe": str(recipe),
        "train": str(train),
        "valid": str(valid),
        "schema": str(schema),
        "next": _next(folder, recipe, model),
    }


def _recipe_text(folder: Path, recipe: Path, data: tuple[Path, Path], model: str | None) -> str:
    """The recipe; paths are written as JSON strings, which every name survives."""
    train, valid = (json.dumps(str(file), ensure_ascii=False) for file in data)
    name = "".join(c if c.isascii() and c.isalnum() else "-" for c in folder.resolve().name)
    return _RECIPE.format(
        recipe=recipe,
        name=json.dumps(name.strip("-")[:100] or "example"),
        base=json.dumps(model, ensure_ascii=False) if model else _BASE,
        train=train,
        valid=f"  valid: [{valid}]" if model else _BY_HEART.format(valid=valid),
        rank=8 if model else 32,
        alpha=16 if model else 32,
        training="" if model else _OF_THE_DEMO,
    )


def _chats(dialogues: list[tuple[tuple[str, str], ...]]) -> str:
    """The dialogues as JSONL, each a tuple of (question, answer)."""
    lines = []
    for dialogue in dialogues:
        messages = []
        for question, answer in dialogue:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


def _refuse_existing(folder: Path, files: list[Path]) -> None:
    for file in files:
        if file.exists():
            raise UserError(
                f"{file} is already there, and is not overwritten",
                f"choose another folder: mule init {folder / 'example'}",
            )


def _next(folder: Path, recipe: Path, model: str | None) -> str:
    """Look at the data, once there is a model whose tokenizer reads it; else train one of the hub."""
    from mule import progress

    if model is None and (Path(_BASE) / "latest.json").is_file():
        return f"mule data preview {shlex.quote(str(recipe))}"
    if model is None:
        progress.note(f"the recipe adapts {_BASE}, which `mule demo` makes without a network")
    name, data = (shlex.quote(text) for text in (model or _FIRST_MODEL, str(folder / "data")))
    return f"mule train --model {name} --data {data} --export q4_k_m"
