"""The loop: one for pretraining, SFT and LoRA. It schedules; `train_step` does the work."""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from mule import progress
from mule.batch import Batch
from mule.data.loader import ValidSet
from mule.errors import CheckFailed, Interrupted
from mule.evaluate.loss import HeldOutLoss, held_out_loss
from mule.generate.engine import greedy_answers
from mule.models import cost
from mule.run import Run
from mule.train.assemble import Parts
from mule.train.checkpoint import load_checkpoint, save_checkpoint
from mule.train.meter import Meter, peak_memory_bytes
from mule.train.schedule import learning_rate
from mule.train.signals import StopRequest, stop_on_signal
from mule.train.step import NonFiniteStep, StepResult, train_step

_MAX_REFUSED_IN_A_ROW = 5
_SAMPLE_TOKENS = 64
_RECENT_STEPS = 20  # the reported training loss is the mean over these


def fit(run: Run, parts: Parts) -> dict[str, Any]:
    """Train to the last step, resuming from the run's newest good checkpoint; the summary.

    Raises Interrupted after saving on SIGINT or SIGTERM, CheckFailed when updates stay non-finite.
    """
    trainer = _Trainer(run, parts)
    start = trainer.resume()
    num_steps = parts.resolved.num_steps
    with stop_on_signal(alone=parts.group.is_alone) as stop, _progress(parts, start) as bar:
        for step in range(start, num_steps):
            result = trainer.update(step, stop)
            done = step + 1
            last = done == num_steps
            if last or done % int(parts.recipe.evaluate.every_steps) == 0:
                trainer.evaluate(done)
            trainer.log(done, result, bar)
            due = done % int(parts.recipe.checkpoint.every_steps) == 0
            # After a refused update there is nothing new, and the weights may be what is broken.
            if last or stop.signum or (due and result is not None):
                trainer.save(done)
            if stop.signum and not last:
                _leave(run, stop, done, num_steps)
    return trainer.summary(num_steps)


class _Trainer:
    """The parts of the loop's body, in the order in which they happen."""

    def __init__(self, run: Run, parts: Parts) -> None:
        self.run, self.parts, self.group, recipe = run, parts, parts.group, parts.recipe
        lora = recipe.adapter.kind == "lora"
        flops = cost.lora_flops_per_token if lora else cost.train_flops_per_token
        row_length = parts.train.shards.row_length
        self.meter = Meter(flops(parts.config, row_length), parts.matmul_peak_flops)
        self.device = torch.device(recipe.train.device)
        self.rate = learning_rate(
            recipe.optim, int(recipe.optim.warmup_steps or 0), parts.resolved.num_steps
        )
        self.recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.held_out: dict[str, float] = {}
        self.best = math.inf
        self.refused = 0

    def resume(self) -> int:
        """Load the newest good checkpoint; the number of updates already done."""
        found = self.group.from_first(self._newest_checkpoint)
        step = 0 if found is None else load_checkpoint(self.run.checkpoint_dir(found), self.parts)
        self._agree_on_weights(step)
        self.run.start_attempt(from_step=step)
        if not self.group.is_alone:
            sizes = {"world_size": self.group.world_size, "machines": self.group.num_machines}
            self.run.log_event("processes", **sizes)
        if found is None:
            return 0
        lowest = math.inf
        for row in self.run.metrics():
            if row["step"] <= step:
                self.recent.append(row["loss"])
                lowest = min(lowest, row.get("val_loss", math.inf))
                if "val_loss" in row:
                    self.held_out = {key: row[key] for key in ("val_loss", "val_perplexity")}
        self._point_to_best(step, lowest)
        progress.note(f"resuming after update {step}")
        return step

    def update(self, step: int, stop: StopRequest) -> StepResult | None:
        """One update; None when it was refused because loss or gradient were not finite."""
        started_at = time.perf_counter()
        recipe = self.parts.recipe
        batches, seeds = self._micro_batches(step)
        try:
            result = train_step(
                self.parts.model,
                self.parts.optimizer,
                batches,
                lr=self.rate(step),
                max_grad_norm=recipe.optim.max_grad_norm,
                dropout_seeds=seeds if recipe.adapter.lora.dropout > 0 else (),
                group=self.group,
                stop=stop,
            )
        except NonFiniteStep as error:
            self._refuse(step, error)
            return None
        self.refused = 0
        tokens = self.parts.train.rows_per_update * self.parts.train.shards.row_length
        self.meter.add(time.perf_counter() - started_at, tokens)
        self.recent.append(result.loss)
        return result

    def evaluate(self, done: int) -> None:
        """Validation loss on the fixed set, and answers to the user's prompts."""
        if self.parts.valid is not None:
            found = self._held_out_loss(self.parts.valid)
            self.held_out = {"val_loss": found.loss, "val_perplexity": found.perplexity}
        prompts = self.parts.recipe.evaluate.prompts
        if prompts and self.group.is_first:
            self.run.log_samples(done, dict(zip(prompts, self._answers(prompts))))

    def log(self, done: int, result: StepResult | None, bar: progress.Task) -> None:
        """One row of metrics, and the live line."""
        if result is None:
            bar.advance(1)
            return
        row = {
            "step": done,
            "epoch": self.parts.train.epoch_of(done),
            "loss": result.loss,
            "learning_rate": self.rate(done - 1),
            "grad_norm": result.grad_norm,
            "num_targets": result.num_targets,
            "memory_bytes": peak_memory_bytes(),
            **self.meter.rates(),
        }
        evaluated = done % int(self.parts.recipe.evaluate.every_steps) == 0
        if self.held_out and (evaluated or done == self.parts.resolved.num_steps):
            row |= self.held_out
        self.run.log_metrics(row)
        bar.advance(1, **(row | self.held_out))

    def save(self, done: int) -> None:
        """Commit a checkpoint, once all processes are found to have the same weights."""
        self._agree_on_weights(done)
        self.group.from_first(lambda: self._commit(done))

    def _agree_on_weights(self, done: int) -> None:
        """CheckFailed when processes that must hold the same bits do not."""
        self.group.agree(
            f"the weights after update {done}",
            self.parts.optimizer.digest,
            "give every machine the same files and software; the last checkpoint is good: "
            "go on from it with --resume",
        )

    def _commit(self, done: int) -> None:
        """Write a checkpoint, then point to it."""
        self.run.sync()  # first: a checkpoint must not outlive the rows that led to it
        save_checkpoint(self.run.checkpoint_dir(done), self.parts, done)
        self.run.set_latest(done)
        self._set_best(done)
        self.run.prune(self.parts.recipe.checkpoint.keep)

    def _point_to_best(self, step: int, lowest: float) -> None:
        """Take the best up from its pointer; make up for one that a killed process did not write.

        `lowest` is the lowest loss logged, for a pointer beyond `step`, which comes again.
        """
        pointer = self.run.best()
        if pointer is not None:
            self.best = pointer["val_loss"] if pointer["step"] <= step else lowest
        if self.group.is_first:
            self._set_best(step)

    def _set_best(self, done: int) -> None:
        loss = self.held_out.get("val_loss", math.inf)
        if loss < self.best:
            self.best = loss
            self.run.set_best(done, loss)

    def summary(self, num_steps: int) -> dict[str, Any]:
        """What `mule train --json` prints."""
        overall = self.meter.overall()
        return {
            "run": str(self.run.folder),
            "steps": num_steps,
            "train_loss": sum(self.recent) / max(len(self.recent), 1),
            "val_loss": self.held_out.get("val_loss"),
            "tokens": self.meter.num_tokens,
            "tokens_per_second": overall["tokens_per_second"],
            "share_of_peak": overall["share_of_peak"],
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _micro_batches(self, step: int) -> tuple[list[Batch], list[int]]:
        """This process's rows, cut; one dropout seed for each part, from (seed, step, first row)."""
        seed, size = self.parts.recipe.train.seed, int(self.parts.recipe.train.micro_batch_rows)
        rows = self.parts.train.rows_for_step(step)
        share = self.group.share(len(rows))
        cuts = range(share.start, share.stop, size)
        parts = (rows[i : min(i + size, share.stop)] for i in cuts)
        batches = [self.parts.train.batch(part).to(self.device) for part in parts]
        return batches, [stable_seed(seed, step, i) for i in cuts]

    def _newest_checkpoint(self) -> int | None:
        """How many updates the newest good checkpoint holds."""
        found = self.run.latest_checkpoint()
        return None if found is None else found[0]

    def _held_out_loss(self, valid: ValidSet) -> HeldOutLoss:
        """Over the whole set, each process having summed its share of the rows."""
        found = held_out_loss(self.parts.model, valid.batches(self.group.share(valid.num_rows)))
        if self.group.is_alone:
            return found
        sums = [found.loss * found.num_targets, found.num_targets]
        total = torch.tensor(sums, dtype=torch.float64, device=self.device)
        self.group.sum_(total)
        nll, count = total.tolist()
        return HeldOutLoss(nll / max(count, 1), round(count))

    def _refuse(self, step: int, error: NonFiniteStep) -> None:
        self.refused += 1
        self.run.log_event("update refused", step=step + 1, cause=str(error))
        progress.note(f"update {step + 1} refused ({error}); the weights are untouched", "warning")
        if self.refused >= _MAX_REFUSED_IN_A_ROW:
            rate = self.parts.recipe.optim.learning_rate
            raise CheckFailed(
                f"{self.refused} updates in a row were not finite, the last one {step + 1}: {error}",
                f"lower optim.learning_rate (now {rate:g}); the last checkpoint is good",
            )

    def _answers(self, prompts: list[str]) -> list[str]:
        parts, tokenizer = self.parts, self.parts.tokenizer
        chat = parts.train.shards.kind == "chat"
        ids = [
            tokenizer.encode_prompt([{"role": "user", "content": text}])
            if chat
            else tokenizer.encode(text)
            for text in prompts
        ]
        room = parts.config.max_position_embeddings - max(len(i) for i in ids)
        answers = greedy_answers(
            parts.model.eval(),
            ids,
            max_tokens=min(_SAMPLE_TOKENS, room),
            stop_ids=tokenizer.stop_ids,
            vocab_size=tokenizer.vocab_size,
        )
        parts.model.train()
        return [tokenizer.decode(answer, skip_special=True) for answer in answers]


def stable_seed(*values: int) -> int:
    """A 63-bit seed from integers; equal on every machine, unlike hash()."""
    digest = hashlib.blake2b(np.array(values, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def _progress(parts: Parts, start: int) -> Iterator[progress.Task]:
    with progress.task("Training", total=parts.resolved.num_steps, unit="step") as bar:
        if start:
            bar.advance(start)
        yield bar


def _leave(run: Run, stop: StopRequest, done: int, num_steps: int) -> None:
    assert stop.signum is not None
    run.log_event("interrupted", step=done, signal=stop.signum)
    raise Interrupted(
        stop.signum,
        f"stopped after update {done} of {num_steps}; everything is saved in {run.folder}",
        f"go on with: mule train {run.folder}/recipe.yaml --resume",
    )
