"""The peer of bench/serve.py that is transformers: `generate`, greedy. Runs in bench/peers/hf.

Its own defaults (SDPA, a dynamic cache); prompts of a batch are padded on the left, and a row whose
answer is long enough counts as ended. Arguments: JOB VARIANT, of which `bf16` and `fp32` are known.
Prints one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from typing import Any

import torch
from serve_job import Answers, ServeJob, figures
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Watch(StoppingCriteria):
    """Notes when each step ends; ends a row that has its tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return self.lengths <= len(self.times)


def main() -> None:
    job, variant = ServeJob(**json.loads(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(job.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(job.folder, dtype=DTYPES[variant])
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts: list[list[int]], lengths: list[int]) -> Answers:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        watch = Watch(lengths)
        answers = Answers(time.perf_counter())
        found = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max(lengths),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        for row, length in zip(found[:, longest:].tolist(), lengths, strict=True):
            answers.ids.append(row[:length])
            answers.times.append(watch.times[:length])
        return answers

    found = figures(job, generate)
    names = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    print(json.dumps({**found, "versions": names}))


if __name__ == "__main__":
    main()
