"""Tasks written for lm-evaluation-harness give the same numbers there.

It runs where the extra `eval` is installed: in this environment, or, to leave its pins alone, in one
of its own at bench/peers/lm-eval (python -m venv, then pip install -c constraints.txt -e '.[eval]'
with transformers and accelerate).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mule.adapters.source import find_source
from mule.evaluate.items import Task, load_task
from mule.evaluate.lm_eval import write
from mule.evaluate.measure import Outcome, measure
from mule.evaluate.subject import Subject
from tests.parity.tiny_gguf import save_tiny, tiny_tokenizer

PEER = Path(__file__).parents[2] / "bench" / "peers" / "lm-eval" / "bin" / "python"
QUESTIONS = ("The sea was", "It wasn't the first", "def add(a: int", "They'd been told, again")


def interpreter() -> str:
    if importlib.util.find_spec("lm_eval") is not None:
        return sys.executable
    if not PEER.is_file():
        pytest.skip("lm-evaluation-harness is not here: the extra `eval`, or bench/peers/lm-eval")
    return str(PEER)


def harness(model: Path, folder: Path, names: list[str]) -> dict[str, Any]:
    """What lm_eval finds, and every sample of it."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    words += ["--include_path", str(folder), "--tasks", ",".join(names), "--device", "cpu"]
    words += ["--batch_size", "8", "--log_samples", "--output_path", str(folder / "out")]
    ran = subprocess.run(
        [interpreter(), "-m", "lm_eval", "run", *words],
        env={**os.environ, **offline, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    samples = {
        name: [json.loads(line) for line in one.read_text().splitlines()]
        for name in names
        for one in file.parent.glob(f"samples_{name}_*.jsonl")
    }
    return {"results": json.loads(file.read_text())["results"], "samples": samples}


def mine(model: Path, task: Task) -> Outcome:
    return measure(Subject("model", find_source(str(model)), knows_chats=False), task)


@pytest.mark.slow
def test_the_harness_gives_the_same_numbers(tmp_path: Path) -> None:
    interpreter()
    model = tmp_path / "model"
    save_tiny(model, "qwen3", num_hidden_layers=2, vocab_size=tiny_tokenizer().vocab_size)
    text = "score: exact\nprompt: '{q}'\nanswer: '{a}'\nmax_tokens: 8\nstop: [zebra]\n"
    (tmp_path / "said.yaml").write_text(text + "data: said.jsonl\n")

    def said(answers: list[str]) -> Task:
        rows = [{"q": q, "a": a} for q, a in zip(QUESTIONS, answers, strict=True)]
        (tmp_path / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task(str(tmp_path / "said.yaml"))

    answers = [kept["answer"] for kept in mine(model, said(["?"] * 4)).answers]
    exact, general = said([*answers[:3], "another"]), load_task("general")
    names = write([general, exact], tmp_path / "lm")
    assert names == ["mule_general", "mule_said"]
    found = harness(model, tmp_path / "lm", names)

    ours = mine(model, general)
    theirs = found["results"]["mule_general"]
    assert theirs["acc,none"] == pytest.approx(ours.mean("accuracy"))
    assert theirs["acc_norm,none"] == pytest.approx(ours.mean("accuracy_norm"))
    samples = sorted(found["samples"]["mule_general"], key=lambda sample: sample["doc_id"])
    for sample, kept in zip(samples, ours.answers, strict=True):
        sums = [float(part[0]) for part in sample["filtered_resps"]]
        assert sums == pytest.approx(kept["log_likelihoods"], abs=2e-3)

    ours = mine(model, exact)
    theirs = found["results"]["mule_said"]
    assert theirs["exact_match,none"] == pytest.approx(ours.mean("exact_match")) == 0.75
