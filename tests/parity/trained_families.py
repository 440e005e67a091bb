"""One small trained model of each family, with chats, an adapter on some of them, kept on disk.

`python -m tests.parity.trained_families FAMILY FOLDER` makes one, in Mule's own training loop:
200 updates on the atlas (generated text), then 100 on its chats. Trained weights are what limits
for quantised files can be tested on: those of random ones have no sense.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mule import fsio, machine
from mule.locks import locked

ROOT = Path(__file__).resolve().parents[2]
# What decides how a kept model looks on disk. The training loop is not among it: a small change
# there leaves a trained model a trained model.
_MADE_BY = (
    *("tests/parity/trained_families.py", "mule/models/config.py", "mule/models/families"),
    *("mule/tokenizer/files.py", "mule/data/atlas"),
)
_DONE = "made.json"
_WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
_VOCAB = 1024
# model_type -> what its config.json says beside the sizes. Mistral's attention output has rows of
# 320, which K-quants cannot hold, and of granitemoeshared's experts down has rows of 160.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {"head_dim": 80, "sliding_window": None},
    "qwen2": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 64,
        "sliding_window": 48,
        "intermediate_size": 256,
    },
    "smollm3": {"num_hidden_layers": 4, "intermediate_size": 256},
    "phi3": {"sliding_window": None},
    "granite": {
        "tie_word_embeddings": True,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "granitemoeshared": {
        "num_local_experts": 10,
        "num_experts_per_tok": 2,
        "intermediate_size": 160,
        "shared_intermediate_size": 256,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 512,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "attention_multiplier": 0.125,
        "mamba_n_heads": 8,
        "mamba_d_head": 64,
        "mamba_d_state": 32,
        "mamba_chunk_size": 64,
    },
    "jamba": {
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 16,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
}
QUICK = ("llama", "gemma3_text")  # of which the tests run in `make test`
ADAPTED = ("llama", "qwen2")
_STAGES = {
    "text": ["data.train=[data/pretrain.txt]", "train.steps=200", "optim.learning_rate=4e-3"],
    "chat": [
        "data.train=[data/sft.jsonl]",
        "data.valid=[data/sft.valid.jsonl]",
        "train.steps=100",
        "optim.learning_rate=2e-3",
    ],
    "lora": [
        "data.train=[data/persona.jsonl]",
        "data.valid=[data/persona.valid.jsonl]",
        "train.steps=40",
        "optim.learning_rate=5e-3",
        "adapter.kind=lora",
    ],
}
_EVERY_STAGE = """train.step_rows=3 train.threads=1 train.compile=false train.precision=fp32
    train.seed=5 data.max_seq_length=96 checkpoint.keep=1 checkpoint.every_steps=1000
    evaluate.every_steps=1000 evaluate.max_rows=16"""


@dataclass(frozen=True)
class Trained:
    """The folder of one family; `run` answers chats, `adapter` is a LoRA on it where there is one."""

    family: str
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "chat"

    @property
    def adapter(self) -> Path | None:
        return self.folder / "runs" / "lora" if self.family in ADAPTED else None


@functools.cache
def trained(family: str) -> Trained:
    """The trained model of a family, made if it is not there: once a machine, not once a test."""
    cache = machine.cache_dir() / "tests" / f"trained-{_key()}"
    folder = cache / family
    with locked(cache / f"{family}.lock", lambda: None):
        if not (folder / _DONE).is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            done = subprocess.run(
                [sys.executable, "-m", __name__, family, str(folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr[-4000:]
    return Trained(family, folder)


def marked(families: tuple[str, ...] = tuple(FAMILIES)) -> list[Any]:
    """The families as parameters of a test, slow but for those in QUICK."""
    return [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in families
    ]


def _key() -> str:
    import torch

    files = [
        file
        for name in _MADE_BY
        for file in (sorted((ROOT / name).rglob("*.py")) or [ROOT / name])
        if "__pycache__" not in file.parts
    ]
    content = {str(file.relative_to(ROOT)): fsio.sha256_file(file) for file in files}
    return fsio.sha256_json([content, torch.__version__])[:16]


def main(family: str, folder: Path) -> None:
    """Make the data, a model with random weights, and train it in stages; last of all `made.json`."""
    from mule.commands import train
    from mule.data.atlas import generate
    from mule.data.atlas.plan import Sizes

    folder.mkdir(parents=True)
    os.chdir(folder)
    sizes = Sizes(pretrain_bytes=250_000, sums=300, dialogues=300, valid_rows=64)
    generate(0, Path("data"), num_countries=24, sizes=sizes)
    _write_untrained(family, Path("untrained"))
    made: dict[str, Any] = {}
    base = Path("untrained")
    for stage, words in _STAGES.items():
        if stage == "lora" and family not in ADAPTED:
            continue
        overrides = [f"model.path={base.absolute()}", *words, *_EVERY_STAGE.split()]
        summary = train.run(None, overrides, name=stage)
        made[stage] = {name: summary[name] for name in ("steps", "train_loss", "val_loss")}
        base = Path("runs") / stage
    shutil.rmtree("runs/text")  # nothing needs it any more
    fsio.write_json(Path(_DONE), made)


def _write_untrained(family_name: str, folder: Path) -> None:
    import torch

    from mule.models.decoder import empty_decoder
    from mule.models.families import family
    from mule.models.folder import model_state, save_model
    from mule.tokenizer import Tokenizer

    texts = Path("data/pretrain.txt").read_text().split("\n")
    chats = Path("data/sft.jsonl").read_text().split("\n")
    tokenizer = Tokenizer.train([*texts, *chats], _VOCAB)
    raw = _WIDE | {"vocab_size": _VOCAB} | FAMILIES[family_name] | {"model_type": family_name}
    config = family(family_name).from_hf(raw)
    model = empty_decoder(config, torch.float32)
    model.init_weights(1)
    with fsio.atomic_folder(folder) as out:
        tokenizer.save(out)
        save_model(model_state(model), config, out, extra={"eos_token_id": tokenizer.eos_id})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
