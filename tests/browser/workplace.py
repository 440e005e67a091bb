"""A working folder as a person has one after a day: data, runs of each sort, an exported model.

`python -m tests.browser.workplace FOLDER` makes it, in half a minute. It is kept on disk, named by
what makes it; tests work in copies.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mule import fsio, machine
from mule.locks import locked
from mule.run import Run
from tests.life.tiny_life import write_data

ROOT = Path(__file__).resolve().parents[2]
BASE, FAULTY, CHAT, ADAPTER = "base", "too-hot", "talk", "persona"
DATA, FLAWED_DATA = "chats.jsonl", "flawed.jsonl"
GGUF = f"exports/{CHAT}"
# What a kept folder looks like; the training loop is not among it: a run stays a run.
_MADE_BY = ("tests/browser/workplace.py", "tests/life/tiny_life.py", "mule/run.py")
_DONE = "made.json"

_COMMON = """\
train.threads=1 train.compile=false train.precision=fp32 train.seed=3
checkpoint.every_steps=20 checkpoint.keep=2 evaluate.every_steps=5 evaluate.max_rows=8"""
_SHAPE = """\
model.family=qwen3 model.hidden_size=64 model.num_layers=2 model.num_heads=4 model.num_kv_heads=2
model.head_dim=16 model.intermediate_size=96 model.max_position_embeddings=256
tokenizer.vocab_size=320 data.train=[text.txt] data.format=text data.max_seq_length=48
train.step_rows=6"""
_TALK = f"data.train=[{DATA}] data.format=messages data.max_seq_length=64 train.step_rows=4"
_STAGES = {
    BASE: f"{_SHAPE} train.steps=60 optim.learning_rate=0.01",
    # The planted fault: half of the run warms up to a rate at which every update replaces the weights.
    FAULTY: f"{_SHAPE} train.steps=80 optim.learning_rate=0.3 optim.warmup_steps=40",
    CHAT: f"model.path=runs/{BASE} {_TALK} train.steps=40 optim.learning_rate=0.01",
    ADAPTER: f"model.path=runs/{CHAT} {_TALK} train.steps=20 optim.learning_rate=0.02 "
    "adapter.kind=lora adapter.lora.r=3 adapter.lora.alpha=6",
}
_PROMPT = "the young king saw"


def kept_workplace() -> Path:
    """The folder, made if it is not there: once a machine, not once a test."""
    sums = [fsio.sha256_file(ROOT / name) for name in _MADE_BY]
    cache = machine.cache_dir() / "tests" / f"workplace-{fsio.sha256_json(sums)[:16]}"
    folder = cache / "folder"
    with locked(cache / "lock", lambda: None):
        if not (folder / _DONE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            made = subprocess.run(
                [sys.executable, "-m", __name__, str(folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert made.returncode == 0, made.stderr[-4000:]
    return folder


def make(folder: Path) -> None:
    """Data, four runs and a GGUF file, all by Mule's own commands; last of all `made.json`."""
    from mule.commands import export, train

    write_data(folder)
    _write_flawed(folder)
    os.chdir(folder)
    for name, words in _STAGES.items():
        prompts = f"evaluate.prompts=['{_PROMPT}']"
        train.run(None, [*words.split(), *_COMMON.split(), prompts], name=name)
    export.run(f"runs/{CHAT}", types=["f16", "q8_0"], out=Path(GGUF))
    steps = {name: Run.open(name).metrics()[-1]["step"] for name in _STAGES}
    fsio.write_json(_DONE, steps)


def _write_flawed(folder: Path) -> None:
    """Chats with a fault in every third row: said twice, without an answer, markup that is text."""
    chats = [json.loads(line) for line in (folder / DATA).read_text().splitlines()][:12]
    chats[3] = chats[0]
    chats[6]["messages"][-1]["content"] = ""
    chats[9]["messages"][-1]["content"] = "<img src=x onerror=\"document.title='broken in'\"> red."
    fsio.write_text(folder / FLAWED_DATA, "".join(json.dumps(chat) + "\n" for chat in chats))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
