"""Real configurations of other projects, and the one mistake that is planted into each.

`originals/` holds their settings as facts (the project, the file and the commit are in its first
line). A mistake is one edit: `old` becomes `new`, or `new` alone is added at the end. `code` is the
check that must name it, `key` the setting it must point at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ORIGINALS = Path(__file__).parent / "originals"

# Originals that hold a mistake of their own: a warm-up of 25 and 1,000 of some 31 and 60 updates
# (2,000 rows in updates of 64 and 32).
WRONG_AS_PUBLISHED = {
    "litgpt-llama-3.2-1b-full.yaml": "warm-up-too-long",
    "litgpt-tiny-llama-full.yaml": "warm-up-too-long",
}


@dataclass(frozen=True)
class Planted:
    file: str
    old: str
    new: str
    code: str
    key: str

    def text(self) -> str:
        """The configuration with its mistake."""
        text = (ORIGINALS / self.file).read_text(encoding="utf-8")
        if not self.old:
            return f"{text.rstrip()}\n{self.new}\n"
        assert text.count(self.old) == 1, (self.file, self.old)
        return text.replace(self.old, self.new)


PLANTED = (
    Planted(
        "axolotl-llama-3-lora-1b.yml",
        *("learning_rate: 0.0002", "learning_rate: 0.02"),
        *("rate-too-high", "learning_rate"),
    ),
    Planted(
        "axolotl-llama-3-qlora.yml",
        *("early_stopping_patience:", "early_stopping_patience: 3"),
        *("stopping-without-validation", "early_stopping_patience"),
    ),
    Planted(
        "axolotl-llama-3-fft-8b.yaml",
        *("sequence_len: 8192", "sequence_len: 32768"),
        *("beyond-context", "sequence_len"),
    ),
    Planted(
        "axolotl-gemma-3-1b-qlora.yml",
        *("chat_template: gemma3", "chat_template: llama3"),
        *("foreign-template", "chat_template"),
    ),
    Planted(
        "axolotl-llama-3-instruct-lora-8b.yml",
        *("type: chat_template", "type: alpaca"),
        *("data-of-another-kind", "datasets"),
    ),
    Planted(
        "axolotl-lfm2-350m-fft.yaml",
        *("micro_batch_size: 4", "micro_batch_size: 256"),
        *("whole-as-part", "micro_batch_size"),
    ),
    Planted(
        "axolotl-mistral-7b.yml",
        *("weight_decay: 0.0", "weight_decay: 10"),
        *("decay-too-large", "weight_decay"),
    ),
    Planted(
        "axolotl-cogito-3b-lora.yml",
        *("sequence_len: 4096", "sequence_len: 64"),
        *("rows-too-short", "sequence_len"),
    ),
    Planted(
        "llama-factory-llama3-lora.yaml",
        *("lora_target: all", "lora_target: q_proj,v_porj"),
        *("target-misspelt", "lora_target"),
    ),
    Planted(
        "llama-factory-llama3-qlora.yaml",
        *("finetuning_type: lora", "finetuning_type: full"),
        *("quantised-full", "quantization_bit"),
    ),
    Planted(
        "llama-factory-llama3-full.yaml",
        *("num_train_epochs: 3.0", "num_train_epochs: 0"),
        *("length-zero", "num_train_epochs"),
    ),
    Planted(
        "llama-factory-llama3-fsdp-qlora.yaml",
        *("", "bf16: true"),
        *("two-precisions", "fp16"),
    ),
    Planted(
        "llama-factory-qwen3-lora.yaml",
        *("", "train_on_prompt: true"),
        *("questions-trained", "train_on_prompt"),
    ),
    Planted(
        "llama-factory-llama3-pissa.yaml",
        *("learning_rate: 1.0e-4", "learning_rat: 1.0e-4"),
        *("key-misspelt", "learning_rat"),
    ),
    Planted(
        "trl-zephyr-7b-qlora.yaml",
        *("lora_alpha: 16", "lora_alpha: 0"),
        *("alpha-zero", "lora_alpha"),
    ),
    Planted(
        "trl-smollm2-1.7b.yaml",
        *("", "adam_beta1: 0.999\nadam_beta2: 0.9"),
        *("betas-swapped", "adam_beta1"),
    ),
    Planted(
        "trl-smollm2-360m.yaml",
        *("max_steps: -1", "max_steps: 20"),
        *("trial-left-over", "max_steps"),
    ),
    Planted(
        "trl-zephyr-2b-gemma.yaml",
        *("", "max_grad_norm: 0"),
        *("clip-off", "max_grad_norm"),
    ),
    Planted(
        "trl-qwen2-lora.sh",
        *("--push_to_hub", "--warmup_ratio 10"),
        *("warm-up-too-long", "warmup_ratio"),
    ),
    Planted(
        "litgpt-llama-3.2-1b-lora.yaml",
        *("micro_batch_size: 1", "micro_batch_size: 64"),
        *("part-above-whole", "train.micro_batch_size"),
    ),
    Planted(
        "litgpt-phi-2-qlora.yaml",
        *("lora_r: 8", "lora_r: 0"),
        *("rank-zero", "lora_r"),
    ),
    Planted(
        "litgpt-tinystories.yaml",
        *("lr_warmup_steps: 1000", "lr_warmup_steps: 100000"),
        *("warm-up-too-long", "train.lr_warmup_steps"),
    ),
    Planted(
        "mlx-lm-lora.yaml",
        *("scale: 20.0", "scale: 320.0"),
        *("scale-too-large", "lora_parameters.scale"),
    ),
    Planted(
        "donkeytune.env",
        *("LR          ?= 1e-5", "LR          ?= 1e-3"),
        *("rate-too-high", "LR"),
    ),
)


# Every kind of mistake, on every original where it can stand: (code, the keys that may carry it, how
# the value is spoilt). Written from the kinds alone, and not looked at again for single files.
KINDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("rate-too-high", ("learning_rate", "lr", "LR"), "times 100"),
    ("decay-too-large", ("weight_decay",), "10"),
    ("rank-zero", ("lora_r", "lora_rank", "rank", "RANK"), "0"),
    ("alpha-zero", ("lora_alpha", "scale"), "0"),
    ("scale-too-large", ("lora_alpha", "scale"), "times 100"),
    ("length-zero", ("num_epochs", "num_train_epochs", "epochs", "iters", "ITERS"), "0"),
    ("too-many-epochs", ("num_epochs", "num_train_epochs", "epochs"), "100"),
    ("warm-up-too-long", ("warmup_ratio",), "10"),
    ("whole-as-part", ("micro_batch_size", "per_device_train_batch_size", "batch_size"), "512"),
    ("beyond-context", ("sequence_len", "cutoff_len", "max_length", "max_seq_length"), "2000000"),
    ("rows-too-short", ("sequence_len", "cutoff_len", "max_length", "max_seq_length"), "32"),
    ("too-much-held-out", ("val_set_size", "val_size", "val_split_fraction"), "0.9"),
    ("dropout-too-large", ("lora_dropout", "dropout"), "0.9"),
)


def spoilt(text: str, keys: tuple[str, ...], how: str) -> str | None:
    """The text with the value of the first of `keys` that has one spoilt, None where none has."""
    pattern = rf"(?m)^(\s*(?:--)?(?:{'|'.join(keys)})(?::| +\?=| )\s*)([\d.][\d.e+-]*)"
    found = re.search(pattern, text)
    if found is None:
        return None
    value = f"{float(found[2]) * 100:g}" if how == "times 100" else how
    return text[: found.start(2)] + value + text[found.end(2) :]
