"""What the ways of bench/serve.py share: the prompts, the work, and what is made of its times.

Each way runs in a process and an environment of its own, so nothing of Mule is imported here.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

FIRST_ID = 16  # of the ids in prompts: special tokens come before


@dataclass(frozen=True)
class ServeJob:
    """A model folder, the same weights as a GGUF file, and how much of them to measure."""

    folder: str
    gguf: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    row_length: int  # the most tokens of a prompt and its answer
    threads: int
    prefill_tokens: int  # of the prompt whose prefill is timed
    prefills: int  # timed ones; one more warms up
    batches: tuple[tuple[int, int], ...]  # rows, and the tokens of each row's answer
    mixed_rows: int
    mixed_prompt: tuple[int, int]  # shortest and longest
    mixed_answer: tuple[int, int]
    prompt_tokens: int = 16
    head_dim: int = 64
    way: str = ""  # which of serve.py's engines this process measures


@dataclass
class Answers:
    """What came of some prompts answered at once: each row's token ids, and when they came."""

    started_at: float
    ids: list[list[int]] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)


# (prompts, how many tokens each answer must have) -> the greedy answers, of exactly that length
Generate = Callable[[list[list[int]], list[int]], Answers]


def figures(job: ServeJob, generate: Generate) -> dict[str, Any]:
    """The work of a job, in an order that is the same for every way; no prompt comes twice."""
    draw = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [draw.randrange(FIRST_ID, job.vocab_size) for _ in range(length)]

    began_at = time.perf_counter()
    prefills = []
    for _ in range(1 + job.prefills):
        found = generate([prompt(job.prefill_tokens)], [1])
        prefills.append(job.prefill_tokens / (found.times[0][0] - found.started_at))
    decode, ids = {}, {}
    for rows, tokens in job.batches:
        generate([prompt(job.prompt_tokens) for _ in range(rows)], [3] * rows)
        found = generate([prompt(job.prompt_tokens) for _ in range(rows)], [tokens] * rows)
        decode[str(rows)], ids[str(rows)] = decode_rate(found.times), found.ids
    return {
        "prefill": max(prefills[1:]),
        "decode": decode,
        "mixed": mixed_rate(job, generate, draw, prompt),
        "ids": ids,
        "seconds": time.perf_counter() - began_at,
    }


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second while every row was being answered: from the last row's first token on.

    Where a tiny model has answered one row before the next came, from the first token of all.
    """
    start = max(row[0] for row in times)
    end = min(row[-1] for row in times)
    if end <= start:
        start, end = min(row[0] for row in times), max(row[-1] for row in times)
    return sum(start < at <= end for row in times for at in row) / (end - start)


def mixed_rate(
    job: ServeJob,
    generate: Generate,
    draw: random.Random,
    prompt: Callable[[int], list[int]],
) -> float:
    """Answer tokens a second of requests of many lengths that come at once, until the last ends."""
    prompts = [prompt(draw.randint(*job.mixed_prompt)) for _ in range(job.mixed_rows)]
    lengths = [draw.randint(*job.mixed_answer) for _ in range(job.mixed_rows)]
    found = generate(prompts, lengths)
    return sum(lengths) / (max(row[-1] for row in found.times) - found.started_at)
