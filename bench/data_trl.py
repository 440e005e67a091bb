"""The peer of bench/data.py: what TRL does with a file before its first step. Runs in bench/peers/trl.

Arguments: one KIND trl PROCESSES FOLDER OUT. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import datasets
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

ROW_LENGTH = 1024
# ChatML as Mule writes it, with the marks by which TRL finds what the assistant says.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main(kind: str, processes: int, folder: Path, out: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    args = SFTConfig(
        output_dir=str(out / "run"),
        max_length=ROW_LENGTH,
        packing=True,
        packing_strategy="bfd" if kind == "chat" else "wrapped",
        assistant_only_loss=kind == "chat",
        dataset_num_proc=None if processes == 1 else processes,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    started = time.perf_counter()
    rows = datasets.load_dataset(
        "json",
        data_files=str(folder / f"{kind}.jsonl"),
        split="train",
        cache_dir=str(out / "cache"),
    )
    trainer = SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - started
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    print(json.dumps({"seconds": seconds, "tokens": tokens, "rows": len(trainer.train_dataset)}))


if __name__ == "__main__":
    _, _, kind, _, processes, folder, out = sys.argv
    main(kind, int(processes), Path(folder), Path(out))
