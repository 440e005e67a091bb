"""What the tests of a whole life share: tiny data, a tiny recipe, and ways to run commands."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mule.run import Run

REPOSITORY = Path(__file__).resolve().parents[2]
_WORDS = "the a cat dog fish bird sat ran on mat hill near red blue old young king river saw lost"

# Sizes pairwise distinct; bf16, so that masters and working weights differ.
RECIPE = """\
model: {family: qwen3, hidden_size: 32, num_layers: 2, num_heads: 4, num_kv_heads: 1, head_dim: 10,
  intermediate_size: 56, max_position_embeddings: 128}
tokenizer: {vocab_size: 300}
data: {train: [text.txt], format: text, max_seq_length: 48}
train: {seed: 3, steps: 30, step_rows: 6, micro_batch_rows: 3, threads: 1, compile: false,
  precision: bf16}
optim: {learning_rate: 0.01}
checkpoint: {every_steps: 4}
evaluate: {every_steps: 5, max_rows: 4}
"""
CHAT_RECIPE = """\
model: {path: BASE}
data: {train: [chats.jsonl], format: messages, max_seq_length: 64}
train: {seed: 3, steps: 16, step_rows: 4, micro_batch_rows: 2, threads: 1, compile: false,
  precision: fp32}
optim: {learning_rate: 0.02}
checkpoint: {every_steps: 3}
evaluate: {every_steps: 4, max_rows: 4}
"""
LORA = "adapter: {kind: lora, lora: {r: 3, alpha: 6, dropout: 0.1}}\n"


def write_data(folder: Path) -> None:
    """A text, some chats, and the two recipes, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, words = random.Random(5), _WORDS.split()

    def sentence(length: int) -> str:
        return " ".join(rng.choice(words) for _ in range(length)) + "."

    lines = [sentence(9) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    chats = [
        {
            "messages": [
                {"role": "user", "content": sentence(3)},
                {"role": "assistant", "content": sentence(4)},
            ]
        }
        for _ in range(60)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "pretrain.yaml").write_text(RECIPE)


class Server:
    """A fork server in a process of its own, asked and answering in lines of JSON."""

    def __init__(self, module: str) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, **threads},
        )
        assert self._answer() == {"ready": True}

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(
        self, job: dict[str, Any], meanwhile: Callable[[dict[str, Any]], None] | None
    ) -> dict[str, Any]:
        """How the job ended; `meanwhile` is called with what the server says when it began."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        begun = self._answer()
        if meanwhile is not None:
            meanwhile(begun)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


class Forker(Server):
    """The fork server, and the commands given to it."""

    def __init__(self, module: str = "tests.life.forker") -> None:
        super().__init__(module)

    def run(
        self,
        folder: Path,
        *words: str,
        die_at: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
        fault: dict[str, Any] | None = None,
    ) -> int:
        """Run `mule <words>` in `folder`; its exit code, negative for a signal.

        `die_at` kills it before a durable call; `meanwhile` is called with its process id; `fault`
        is met by the children of `tests.life.faults` only.
        """
        job = {"folder": str(folder), "words": words, "die_at": die_at, "fault": fault}
        begun = (lambda said: meanwhile(said["pid"])) if meanwhile else None
        return self._ask(job, begun)["code"]


def kill(pid: int) -> None:
    """SIGKILL, unless the process is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def outcome(run_folder: Path) -> dict[str, Any]:
    """All that must be bit-identical: hashes of the last state, and the log without clocks."""
    run = Run.open(run_folder)
    step, folder = run.checkpoints()[-1]
    names = ("loss", "grad_norm", "learning_rate", "num_targets", "epoch", "val_loss")
    latest = run.latest()
    assert latest is not None and latest["step"] == step
    return {
        "step": step,
        "hashes": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.glob("*.safetensors"))
        },
        "best": run.best(),
        "log": [(row["step"], *(row.get(name) for name in names)) for row in run.metrics()],
    }
