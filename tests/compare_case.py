"""Made setups and run folders, for the tests of comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule.compare.derive import completed
from mule.compare.sourced import Kind, Setup, Value
from mule.run import Run

RESOLVED = """\
model: {{path: base, family: llama}}
tokenizer: {{}}
data: {{train: [chats.jsonl], format: messages, max_seq_length: 64}}
train: {{seed: {seed}, steps: {steps}, step_rows: 4, micro_batch_rows: {micro}, precision: fp32}}
optim: {{learning_rate: {rate}, warmup_steps: 2}}
"""


def setup(kind: Kind = "fine-tune", **values: Any) -> Setup:
    """A setup of these values, completed."""
    told = {key: Value(value, "made for a test") for key, value in values.items()}
    return completed(Setup("mine", "mine", kind, "recipe", told))


def write_run(
    root: Path, name: str, losses: list[float], *, seed: int = 0, rate: float = 2e-5, micro: int = 2
) -> Run:
    """A run folder as training leaves it; the last update has a validation loss a little higher."""
    run = Run.create(root, name, "model: {path: base}\n")
    resolved = RESOLVED.format(seed=seed, steps=len(losses), rate=rate, micro=micro)
    run.write_resolved(resolved.replace(", family: llama", ""))
    run.write_lineage({"tokenizer": "t", "machine": {"cpu": "a processor", "cores": 2}})
    with run.lock():
        run.start_attempt(from_step=0)
        for step, loss in enumerate(losses, 1):
            row: dict[str, Any] = {"step": step, "epoch": step / 8, "loss": loss, "grad_norm": 1.0}
            row |= {"num_targets": 100, "tokens_per_second": 1000.0, "memory_bytes": 2**30}
            last = {"val_loss": loss + 0.1} if step in (len(losses) // 2, len(losses)) else {}
            run.log_metrics(row | last)
        run.log_event("finished", step=len(losses))
    return run
