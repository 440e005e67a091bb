"""Bad input through the command line: one clear error with file, line and remedy, nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mule import fsio
from mule.cli import main as cli
from mule.run import Run
from tests.life.tiny_life import CHAT_RECIPE, LORA, Forker, outcome, write_data

Mule = Callable[..., tuple[int, str]]


@pytest.fixture
def mule(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Mule:
    """Run a command in this process: (exit code, stderr on one line)."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mule", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), " ".join(capsys.readouterr().err.split())

    return call


@pytest.fixture(scope="module")
def trained(forker: Forker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished pretraining run, and an adapter on it."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder)
    (folder / "lora.yaml").write_text(CHAT_RECIPE.replace("BASE", "runs/pretrain") + LORA)
    for recipe in ("pretrain.yaml", "lora.yaml"):
        code = forker.run(folder, "train", recipe)
        assert code == 0, (folder / "output.log").read_text()
    return folder


@pytest.fixture
def place(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the trained folder, and the current one."""
    folder = tmp_path / "place"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    return folder


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but caches, locks and logs."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and ".prepared" not in file.parts and file.name != "run.lock"
    }


# ---------------------------------------------------------------- recipes, data, models


@dataclass
class Case:
    """Files put in the folder, the words after `mule`, and what the error must say."""

    words: str
    says: list[str]
    files: dict[str, str] = field(default_factory=dict)
    prepare: Callable[[Path], Any] | None = None


def broken_chats(folder: Path) -> None:
    lines = (folder / "chats.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-9]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n")


def pickle_model(folder: Path) -> None:
    shutil.copytree(checkpoint(folder, "pretrain"), folder / "hub")
    (folder / "hub" / "model.safetensors").unlink()
    (folder / "hub" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def poisoned_model(folder: Path) -> None:
    model = folder / "poisoned"
    shutil.copytree(checkpoint(folder, "pretrain"), model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def cut_tokenizer(folder: Path) -> None:
    shutil.copytree(checkpoint(folder, "pretrain"), folder / "tok")
    file = folder / "tok" / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:700])


def move_base(folder: Path) -> None:
    (folder / "runs" / "pretrain").rename(folder / "runs" / "moved")


def other_base(folder: Path) -> None:
    model = folder / "other"
    shutil.copytree(checkpoint(folder, "pretrain"), model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def checkpoint(folder: Path, run: str) -> Path:
    return Run(folder / "runs" / run).checkpoints()[-1][1]


NEW = "train pretrain.yaml --name new"
CASES = {
    "recipe missing": Case("train pretrian.yaml", ["pretrian.yaml", "no such", "hint:"]),
    "data missing": Case(
        f"{NEW} data.train=[texts.txt]",
        ["texts.txt: no such file or folder", "hint: did you mean text.txt?"],
    ),
    "data empty": Case(
        f"{NEW} data.train=[empty.txt]",
        ["empty.txt: the file is empty", "hint: put data in it, or leave it out"],
        {"empty.txt": ""},
    ),
    "broken JSON": Case(
        f"{NEW} data.train=[chats.jsonl] data.format=messages",
        ["chats.jsonl:7: broken JSON", "hint: "],
        prepare=broken_chats,
    ),
    "unknown key": Case(
        "train bad.yaml",
        ["bad.yaml:3: optim.learnin_rate: no such key; did you mean `optim.learning_rate`?"],
        {"bad.yaml": "data: {train: [text.txt]}\noptim:\n  learnin_rate: 0.1\n"},
    ),
    "unknown key on the command line": Case(
        f"{NEW} train.step=5",
        ["command line: train.step=5: no such key; did you mean `train.steps`?"],
    ),
    "wrong type": Case(
        "train bad.yaml",
        ["bad.yaml:2", "train.steps", "many"],
        {"bad.yaml": "data: {train: [text.txt]}\ntrain: {steps: many}\n"},
    ),
    "tokenizer unreadable": Case(
        "train pretrain.yaml --name new tokenizer.vocab_size=null tokenizer.path=tok",
        ["tok/tokenizer.json: cut off or not a tokenizer", "hint: copy it again"],
        prepare=cut_tokenizer,
    ),
    "pickle weights": Case(
        "train lora.yaml --name new model.path=hub",
        [
            "hub: model.safetensors is missing (pytorch_model.bin is a pickle file, "
            "which can run code when read)",
            "mule convert hub/pytorch_model.bin --out hub-converted",
        ],
        prepare=pickle_model,
    ),
    "NaN in the base": Case(
        "train lora.yaml --name new model.path=poisoned",
        [
            "poisoned/model.safetensors: model.norm.weight holds NaN or infinite values",
            "hint: use an earlier checkpoint",
        ],
        prepare=poisoned_model,
    ),
    "adapter without its base": Case(
        "merge lora",
        [
            "its base model runs/pretrain/checkpoint-00000030 is not there",
            "hint: bring it back, or name where it is now: --base FOLDER",
        ],
        prepare=move_base,
    ),
    "adapter with another base": Case(
        "chat lora --base other --prompt hello",
        [
            "this adapter was trained on runs/pretrain/checkpoint-00000030; "
            "other differs from it in weights",
            "hint: give the original base: --base runs/pretrain/checkpoint-00000030",
        ],
        prepare=other_base,
    ),
    "adapter as a base": Case(
        "train lora.yaml --name new model.path=runs/lora",
        ["model.path = runs/lora is an adapter", "hint: merge it first: mule merge runs/lora"],
    ),
    "nothing to merge": Case("merge pretrain", ["not an adapter: there is nothing to merge"]),
    "no such device": Case(
        f"{NEW} train.device=cuda",
        [
            "train.device = cuda, but this machine has none",
            "hint: set train.device to auto or cpu",
        ],
    ),
    "name taken": Case(
        "train pretrain.yaml",
        ["runs/pretrain already exists", "go on with it: --resume", "--name pretrain-2"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_and_nothing_is_written(mule: Mule, place: Path, name: str) -> None:
    case = CASES[name]
    if name == "no such device" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    for file, text in case.files.items():
        (place / file).write_text(text)
    if case.prepare is not None:
        case.prepare(place)
    before = sums(place)
    code, err = mule(*case.words.split())
    assert code == 2, err
    assert err.startswith(("error: ", "note: ")) and err.count("error: ") == 1
    for words in case.says:
        assert words in err
    assert sums(place) == before


# ---------------------------------------------------------------- runs


def test_two_processes_cannot_write_one_run(mule: Mule, place: Path) -> None:
    run = Run.open(place / "runs" / "pretrain")
    with run.lock():
        before = sums(place)
        code, err = mule("train", "pretrain.yaml", "--resume")
        assert sums(place) == before
    assert code == 2
    assert f"runs/pretrain is being written by process {os.getpid()}" in err
    assert f"hint: wait for it, or stop it: kill {os.getpid()}" in err


def test_a_changed_recipe_cannot_resume(mule: Mule, place: Path) -> None:
    before = sums(place)
    code, err = mule(
        "train", "pretrain.yaml", "--resume", "optim.learning_rate=0.02", "train.seed=4"
    )
    assert code == 2
    assert "cannot resume with another recipe" in err
    assert "optim.learning_rate (was 0.01, is 0.02)" in err
    assert "train.seed (was 3, is 4)" in err
    assert "hint: put the old values back, or start a new run: --name ANOTHER" in err
    changed = {name for name, total in sums(place).items() if before.get(name) != total}
    assert changed == {"runs/pretrain/events.jsonl"}


def test_a_flipped_bit_falls_back_to_the_checkpoint_before(mule: Mule, place: Path) -> None:
    run = Run.open(place / "runs" / "pretrain")
    expected = outcome(run.folder)
    file = checkpoint(place, "pretrain") / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-500] ^= 4
    file.write_bytes(content)
    code, err = mule("train", "pretrain.yaml", "--resume")
    assert code == 0
    assert "checkpoint-00000030 is damaged and passed over" in err
    assert "resuming after update 28" in err
    assert outcome(run.folder) == expected
    assert "damaged" in [event["kind"] for event in run.events()]


def test_updates_that_are_not_finite_are_refused(
    mule: Mule, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mule.train import assemble as module

    original = module.assemble

    def poisoned(*args: Any) -> Any:
        parts = original(*args)
        with torch.no_grad():
            parts.model.model.norm.weight[2] = torch.nan
        return parts

    monkeypatch.setattr(module, "assemble", poisoned)
    code, err = mule("train", "pretrain.yaml", "--name", "nan")
    assert code == 1
    assert "update 1 refused (loss nan, gradient norm nan); the weights are untouched" in err
    assert "5 updates in a row were refused, 1 to 5, before the first checkpoint" in err
    assert "hint: lower optim.learning_rate (now 0.01) in a new run, or warm up longer" in err
    events = Run.open(place / "runs" / "nan").events()
    refused = [event["step"] for event in events if event["kind"] == "update refused"]
    assert refused == [1, 2, 3, 4, 5]
    assert not Run.open(place / "runs" / "nan").checkpoints()


# ---------------------------------------------------------------- a full disk


def check_stopped_by_a_full_disk(code: int, err: str, run: Run) -> None:
    assert code == 2, err
    assert "no space left on the disk" in err
    assert "free some space" in err
    assert f"go on with: mule train {run.folder}/recipe.yaml --resume" in err
    found = run.latest_checkpoint()  # checked against its manifest
    assert found is not None and 4 <= found[0] < 30
    assert not list(run.folder.glob(".partial-checkpoint-*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.25 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1250k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # rows are still mapped


def test_a_full_disk_loses_nothing(
    mule: Mule, trained: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    write_data(small_disk)
    # As if another process took the space after it was asked for.
    monkeypatch.setattr(fsio, "require_space", lambda *_: None)
    code, err = mule("train", "pretrain.yaml", "checkpoint.keep=9")
    run = Run(Path("runs/pretrain"))
    check_stopped_by_a_full_disk(code, err, run)
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    code, err = mule("train", "runs/pretrain/recipe.yaml", "--resume", "checkpoint.keep=2")
    assert code == 0, err
    assert outcome(run.folder) == outcome(trained / "runs" / "pretrain")


def test_space_is_asked_for_before_a_checkpoint(
    mule: Mule, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small_disk)
    write_data(small_disk)
    code, err = mule("train", "pretrain.yaml")
    assert code == 2
    asked = r"4 checkpoints that the run will hold needs 12\d MiB in runs/pretrain, which has 1 MiB free"
    assert re.search(asked, err)
    assert "hint: free some space, or choose another folder on a larger disk; go on with:" in err


@pytest.mark.parametrize("number", [1, 4, 9])
def test_no_space_at_any_durable_call(
    mule: Mule, place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The n-th fsync after the second checkpoint fails."""
    original, left = os.fsync, [number]
    run = Run(Path("runs/full"))

    def fsync(descriptor: int) -> None:
        if len(run.checkpoints() if run.folder.exists() else ()) >= 2:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, err = mule("train", "pretrain.yaml", "--name", "full")
    check_stopped_by_a_full_disk(code, err, run)
    monkeypatch.setattr(os, "fsync", original)
    assert mule("train", "runs/full/recipe.yaml", "--resume")[0] == 0
    assert outcome(run.folder) == outcome(place / "runs" / "pretrain")


def test_json_errors_are_objects(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mule", *NEW.split(), "data.train=[no.txt]", "--json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert caught.value.code == found["exit_code"] == 2
    assert found["ok"] is False and found["error"].startswith("no.txt: no such file or folder")
    assert "hint" in found
