"""What a run records of itself for the doctor: facts, the adapter's effect, and about its answers."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.commands import train
from mule.doctor.examine import examine
from mule.doctor.history import FACTS, History, read_history
from mule.run import Run
from tests.life.tiny_life import CHAT_RECIPE, LORA, write_data

_BASE = ("train.steps=60", "data.max_seq_length=64", "evaluate.every_steps=30")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data and a base that has learned the language of it."""
    folder = tmp_path_factory.mktemp("facts")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.run(Path("pretrain.yaml"), list(_BASE), name="base")
        _write_chats(folder)
        yield folder


def _write_chats(folder: Path) -> None:
    """Chats in the words of the base, with answers long enough to be recognised."""
    rng = random.Random(7)
    lines = (folder / "text.txt").read_text().splitlines()
    chats = [
        {
            "messages": [
                {"role": "user", "content": rng.choice(lines)},
                {"role": "assistant", "content": f"{rng.choice(lines)} {rng.choice(lines)}"},
            ]
        }
        for _ in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "tune.yaml").write_text(CHAT_RECIPE.replace("path: BASE", "path: runs/base"))
    (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("path: BASE", "path: runs/base") + LORA)


def _trained(name: str, recipe: str, *overrides: str, length: int = 120) -> History:
    train.run(Path(recipe), [f"data.max_seq_length={length}", *overrides], name=name)
    return read_history(Run.open(Path("runs") / name))


def _codes(history: History) -> dict[str, str]:
    """The findings of D4 to D8, by code."""
    return {f.code: f.found.severity for f in examine(history) if f.code > "D4"}


def test_a_new_model_records_its_data_and_no_base(home: Path) -> None:
    history = read_history(Run.open("runs/base"))
    facts = history.facts
    assert facts.keys() >= {"data", "labels", "vocab_size", "seconds"} and "base" not in facts
    assert facts["data"]["kind"] == "text" and facts["labels"]["trained_share"] == 1.0
    assert facts["seconds"] < 10
    row = history.rows[-1]
    assert 0 <= row["core_wait_share"] < 1 and 2**20 < row["memory_now_bytes"]
    assert not _codes(history)


def test_a_resumed_run_keeps_its_facts(home: Path) -> None:
    file = Path("runs/base") / FACTS
    marked = fsio.read_json(file) | {"mark": 1}
    fsio.write_json(file, marked)
    train.run(Path("runs/base/recipe.yaml"), [], resume=True)
    assert fsio.read_json(file) == marked


def test_a_sound_fine_tune_knows_its_base_and_is_quiet(home: Path) -> None:
    history = _trained("tune", "tune.yaml", "evaluate.prompts=[the cat]")
    base = history.facts["base"]
    assert base["order_gain"] > 0.3 and base["order_gain"] > 3 * base["order_gain_error"]
    assert base["num_texts"] >= 3 and not base["template_differs"]
    assert history.facts["labels"]["stopped_answers_share"] == 1.0
    assert "D802" not in _codes(history) and "D504" not in _codes(history)
    sample = history.samples[-1]
    for about in ("tokens", "stopped", "copied"):
        assert sample[about].keys() == {"the cat"}
    assert sample["stopped"]["the cat"] is (sample["tokens"]["the cat"] < 64)


def test_a_base_of_random_weights_is_found_before_it_costs_time(home: Path) -> None:
    import torch

    from mule.adapters.source import find_source
    from mule.models.decoder import empty_decoder
    from mule.models.folder import model_state, read_config, save_model
    from mule.tokenizer import Tokenizer

    source = find_source("runs/base").model_dir
    assert source is not None
    config, tokenizer = read_config(source), Tokenizer.load(source)
    model = empty_decoder(config, torch.float32)
    model.init_weights(seed=9)
    with fsio.atomic_folder(home / "random") as folder:
        tokenizer.save(folder)
        save_model(model_state(model), config, folder)
    history = _trained("wrong", "tune.yaml", "model.path=random")
    assert abs(history.facts["base"]["order_gain"]) < 0.1
    assert _codes(history)["D802"] == "alarm"


def test_another_chat_template_than_the_bases_own(home: Path) -> None:
    from mule.adapters.source import find_source

    source = find_source("runs/tune").model_dir
    assert source is not None
    shutil.copytree(source, home / "reworded", ignore=shutil.ignore_patterns("*.safetensors"))
    template = (home / "reworded/chat_template.jinja").read_text()
    words = template.replace("<|im_start|>", "near a hill ")
    assert words != template
    (home / "reworded/chat_template.jinja").write_text(words)
    settings = ("model.path=runs/tune", "tokenizer.path=reworded", "train.steps=4")
    base = _trained("template", "tune.yaml", *settings).facts["base"]
    assert base["template_differs"] and base["template_cost_error"] > 0
    assert base["template_cost"] > -0.5


def test_an_adapter_logs_how_far_it_changes_its_base(home: Path) -> None:
    sound = _trained("lora", "lora.yaml")
    changes = sound.series("adapter_change")
    assert len(changes) == 4 and changes.values[-1] > 0.001
    assert "D801" not in _codes(sound)
    idle = _trained("idle", "lora.yaml", "optim.learning_rate=1e-8")
    assert 0 < idle.series("adapter_change").values[-1] < 1e-4
    assert _codes(idle)["D801"] == "warning"


def test_leaks_and_twins_in_real_files(home: Path) -> None:
    rows = (home / "chats.jsonl").read_text().splitlines()
    (home / "twice.jsonl").write_text("\n".join([*rows[:20], *rows[:20]]) + "\n")
    (home / "held.jsonl").write_text("\n".join(rows[10:30]) + "\n")
    given: tuple[Any, ...] = ("data.train=[twice.jsonl]", "data.valid=[held.jsonl]")
    history = _trained("leak", "tune.yaml", *given)
    codes = _codes(history)
    assert codes["D403"] == codes["D501"] == "warning"
    data = history.facts["data"]
    assert data["valid_repeated"] == 10 and data["repeated_share"] == 0.5


def test_answers_that_are_cut_off_do_not_learn_to_end(home: Path) -> None:
    history = _trained("cut", "tune.yaml", "data.too_long=truncate", length=40)
    codes = _codes(history)
    assert codes["D504"] in ("alarm", "warning") and codes["D505"] == "warning"
