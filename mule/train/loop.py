"""The loop: one for pretraining, SFT and LoRA. It schedules; `train_step` does the work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import torch

from mule import progress
from mule.adapters.effect import AdapterEffect
from mule.adapters.trunk import remove_kept_rows
from mule.batch import Batch
from mule.errors import Interrupted
from mule.plan.killed import killed_in_words
from mule.plan.memory import adapter_bytes
from mule.plan.schedule import learning_rate
from mule.run import Run
from mule.train.assemble import Parts
from mule.train.ema import save_ema
from mule.train.evaluator import Evaluator
from mule.train.goal import goal_fields
from mule.train.guard import Guard
from mule.train.keeper import Keeper
from mule.train.meter import Clock, Meter, memory_now_bytes, memory_of_all, peak_memory_bytes
from mule.train.out_of_memory import explained, free_memory, is_out_of_memory
from mule.train.rehearsal import rehearse
from mule.train.signals import StopRequest, stop_on_signal
from mule.train.step import Overflow, RefusedStep, StepResult, train_step
from mule.train.watch import Watch

_AVERAGE = "ema"  # the model folder of the averaged weights, in the run's
_ROUTING_EVERY_STEPS = 20  # at least
_STOPPED_EARLY = "stopped early"  # the event


def fit(run: Run, parts: Parts) -> dict[str, Any]:
    """Train to the last step, resuming from the run's newest good checkpoint; the summary.

    Raises Interrupted after saving on SIGINT or SIGTERM, CheckFailed when updates stay refused and
    going back does not help, UserError when memory runs out for a single row.
    """
    trainer = _Trainer(run, parts)
    start = trainer.resume()
    trainer.evaluate_again(start)
    num_steps = start if trainer.ended_early(start) else parts.resolved.num_steps
    stopping = stop_on_signal(alone=parts.group.is_alone)
    memory = explained(parts.recipe, lambda: trainer.rows_at_once)
    with stopping as stop, memory, _progress(parts, start) as bar:
        done = start
        if start == 0:
            rehearse(run, parts, trainer)
            trainer.evaluator.answer(0)
        for step in range(start, num_steps):
            result = trainer.update(step, stop)
            done = step + 1
            last = done == num_steps
            # After a refused update there is nothing new to look at, or to save.
            if last or (result and done % int(parts.recipe.evaluate.every_steps) == 0):
                if not trainer.evaluator.evaluate(done, stop):
                    trainer.leave_in_evaluation(done, result, bar, stop)
                last = last or trainer.evaluator.history.why_stop() is not None
            trainer.log(done, result, bar)
            due = result and trainer.is_to_be_saved(done)
            if trainer.guard.is_stuck:
                trainer.roll_back(done, trainer.guard.why_stuck())
            elif last or due:
                trainer.save(done)
            elif stop.signum and result:
                trainer.save_before_leaving(done)
            if trainer.ended_early(done):
                break
            if stop.signum and not last:
                _leave(run, stop, done, num_steps)
    remove_kept_rows(run.folder)
    if parts.optimizer.ema_weights():
        save_ema(run.folder / _AVERAGE, parts)  # again, should a finished run be resumed
    return trainer.summary(done)


class _Trainer:
    """The parts of the loop's body, in the order in which they happen."""

    def __init__(self, run: Run, parts: Parts) -> None:
        self.run, self.parts, self.group, recipe = run, parts, parts.group, parts.recipe
        self.meter = Meter(parts.flops_per_token, parts.matmul_peak_flops)
        self.device = torch.device(recipe.train.device)
        self.rate = learning_rate(
            recipe.optim, int(recipe.optim.warmup_steps or 0), parts.resolved.num_steps
        )
        self.guard, self.keeper = Guard(recipe.optim.max_spike), Keeper(run, parts)
        self.evaluator, self.effect = Evaluator(run, parts), AdapterEffect(parts.model)
        self.watch = Watch(run, recipe, writes=self.group.is_first)
        self.goal: dict[str, Any] = {}  # what the last evaluation said of it
        self.rows_at_once = int(recipe.train.micro_batch_rows)  # fewer where memory ran out

    def resume(self) -> int:
        """Load the newest good checkpoint; the number of updates already done."""
        found = self.keeper.load_newest()
        step = found or 0
        self.keeper.agree_on_weights(step)
        _tell_of_a_kill(self.run)
        self.run.start_attempt(from_step=step)
        if not self.group.is_alone:
            sizes = {"world_size": self.group.world_size, "machines": self.group.num_machines}
            self.run.log_event("processes", **sizes)
        if found is None:
            return 0
        self._remember(step)
        self.keeper.point_to_best(step, self.evaluator.val_loss_of(step))
        progress.note(f"resuming after update {step}")
        return step

    def evaluate_again(self, done: int) -> None:
        """Make up for an evaluation that a stop ended, as a run that was never stopped has it."""
        rows = [row for row in self.run.metrics() if row["step"] == done]
        if not rows or not self.evaluator.owes(done):
            return
        self.evaluator.evaluate(done, StopRequest())
        row = {key: rows[0][key] for key in rows[0] if key not in ("at", "attempt")}
        self.run.log_metrics(row | self.evaluator.losses)
        self.keeper.point_to_best(done, self.evaluator.val_loss_of(done))

    def leave_in_evaluation(
        self, done: int, result: StepResult | None, bar: progress.Task, stop: StopRequest
    ) -> NoReturn:
        """Save and leave; the resumed run begins with the evaluation."""
        self.log(done, result, bar)
        self.save_before_leaving(done)
        _leave(self.run, stop, done, self.parts.resolved.num_steps)

    def update(self, step: int, stop: StopRequest) -> StepResult | None:
        """One update; None when it was refused: loss or gradient not finite, or a spike."""
        began = Clock.read()
        try:
            result = self._train_step(step, stop)
        except Overflow as error:  # expected in fp16 now and then
            self.run.log_event("update skipped", step=step + 1, cause=str(error))
            return None
        except RefusedStep as error:
            self.guard.refused(step + 1)
            self.run.log_event("update refused", step=step + 1, cause=str(error))
            told = f"update {step + 1} refused ({error}); the weights are untouched"
            progress.note(told, "warning")
            return None
        self.guard.applied(result.loss, result.grad_norm)
        self.evaluator.history.trained(result.loss)
        tokens = self.parts.train.rows_per_update * self.parts.train.shards.row_length
        self.meter.add(began, tokens)
        return result

    def _train_step(self, step: int, stop: StopRequest) -> StepResult:
        """`train_step`, repeated with half the rows at once where memory runs out."""
        recipe, is_decided = self.parts.recipe, False

        def refuse(loss: float, grad_norm: float) -> str | None:
            nonlocal is_decided
            is_decided = True  # the processes have agreed, and weights change next
            return self.guard.spike(loss, grad_norm)

        while True:
            try:
                batches, seeds = self._micro_batches(step)
                return train_step(
                    self.parts.model,
                    self.parts.optimizer,
                    batches,
                    lr=self.rate(step),
                    max_grad_norm=recipe.optim.max_grad_norm,
                    dropout_seeds=seeds,
                    group=self.group,
                    stop=stop,
                    scaler=self.parts.scaler,
                    refuse=refuse,
                )
            except (RuntimeError, MemoryError) as error:
                if is_decided or not self.may_halve(error):
                    raise
            self.halve(step)  # when the exception is gone, and with it the tensors it held

    def may_halve(self, error: Exception) -> bool:
        """Whether the update fits perhaps with fewer rows at once; shards must all be cut alike."""
        whole = not self.parts.is_sharded
        return is_out_of_memory(error) and self.rows_at_once > 1 and whole

    def halve(self, step: int) -> None:
        """Clear what the failed attempt left, and take half the rows at once from now on."""
        self.parts.optimizer.zero_grad()
        free_memory()
        before, self.rows_at_once = self.rows_at_once, -(-self.rows_at_once // 2)
        self.run.log_event(
            "micro-batch halved", step=step + 1, rows=self.rows_at_once, rows_before=before
        )
        progress.note(
            f"update {step + 1}: out of memory with {before} rows at once, repeated with "
            f"{self.rows_at_once}; to begin with that, set train.micro_batch_rows: "
            f"{self.rows_at_once}",
            "warning",
        )

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
            "memory_now_bytes": memory_now_bytes(),
            **self.meter.rates(),
        }
        if scaler := self.parts.scaler:
            row |= {"loss_scale": scaler.scale, "skipped_updates": scaler.num_overflows}
        evaluated = done % int(self.parts.recipe.evaluate.every_steps) == 0
        evaluated = evaluated or done == self.parts.resolved.num_steps
        if evaluated:
            row |= {**self.evaluator.losses, "devices": self._devices(), **self._effect()}
            if self.group.is_first:
                self.goal = goal_fields(self.parts.recipe, self.run, row)
            row |= self.goal
        balance = self.parts.model.balance
        if balance is not None and (evaluated or done % _ROUTING_EVERY_STEPS == 0):
            self.run.log_metrics(row | {"moe": balance.report(self.group.sum_)})
        else:
            self.run.log_metrics(row)
        if evaluated:
            self.watch.look(done, is_last=done == self.parts.resolved.num_steps)
        bar.advance(1, **(row | self.evaluator.losses | self.watch.line | self.goal))

    def is_to_be_saved(self, done: int) -> bool:
        """Whether the schedule wants a checkpoint, or the best weights so far are to be kept.

        The latter where the run may end early: then the schedule alone could miss them.
        """
        scheduled = done % int(self.parts.recipe.checkpoint.every_steps) == 0
        history = self.evaluator.history
        measured = self.evaluator.val_loss_of(done) is not None
        return scheduled or (history.patience is not None and measured and history.is_best_now)

    def ended_early(self, done: int) -> bool:
        """Whether evaluate.patience has ended the run; that is said, and logged once."""
        why = self.evaluator.history.why_stop()
        if why is None:
            return False
        if self.group.from_first(lambda: not self.run.standing_events(_STOPPED_EARLY)):
            self.run.log_event(_STOPPED_EARLY, step=done, cause=why)
            progress.note(f"stopped early after update {done}: {why}")
            return True
        again = "adapter.warm_start" if self.parts.recipe.adapter.kind != "none" else "model.path"
        progress.note(
            f"this run is finished: it stopped early after update {done} ({why}). To go on from "
            f"its best weights, start another: --name ANOTHER {again}={self.run.folder}"
        )
        return True

    def save(self, done: int) -> None:
        """Commit a checkpoint; roll back instead when the weights are broken."""
        if self.keeper.are_weights_finite():
            self.keeper.save(done, self.evaluator.val_loss_of(done))
        else:
            self.roll_back(done, f"the weights after update {done} are not finite")

    def save_before_leaving(self, done: int) -> None:
        """Commit a checkpoint beside the schedule, but nothing broken.

        Then, and when the update was refused, the resumed run begins at the last checkpoint: it
        comes to the trouble again, and does about it what a run that was never stopped does.
        """
        if self.keeper.are_weights_finite():
            self.keeper.save(done, None)  # a run that was never stopped does not have it

    def roll_back(self, done: int, cause: str) -> None:
        """Take the weights of a checkpoint, and go on with the data after update `done`.

        The checkpoint that is committed then is all a resumed run needs: killed before, it comes
        to the same point again; killed after, it goes on from there.
        """
        checkpoint = self.keeper.way_back()
        rate = float(self.parts.recipe.optim.learning_rate)
        self.guard.check_may_roll_back(cause, checkpoint, rate)
        assert checkpoint is not None
        self.run.log_event("rolled back", step=done, to=checkpoint, cause=cause)
        self.keeper.load(checkpoint)
        self._remember(done)
        self.keeper.save(done, None)
        progress.note(
            f"{cause}: went back to the weights after update {checkpoint}, and on with the data "
            f"after update {done}",
            "warning",
        )

    def _remember(self, done: int) -> None:
        """What the logs say about the first `done` updates; the first process reads them."""
        past = self.group.from_first(lambda: _past(self.run, done))
        self.guard.restore(past["guard"])
        self.evaluator.restore(past["evaluator"])

    def summary(self, done: int) -> dict[str, Any]:
        """What `mule train --json` prints."""
        overall, best = self.meter.overall(), self.evaluator.history.best
        return {
            "run": str(self.run.folder),
            "steps": done,
            "stopped_early": self.evaluator.history.why_stop(),
            "train_loss": self.guard.recent_loss(),
            "val_loss": self.evaluator.losses.get("val_loss"),
            "best_val_loss": best.val_loss if best else None,
            "best_step": best.step if best else None,
            **self._averaged(),
            **self._adapter(),
            "tokens": self.meter.num_tokens,
            "tokens_per_second": overall["tokens_per_second"],
            "share_of_peak": overall["share_of_peak"],
            "peak_memory_bytes": peak_memory_bytes(),
            "devices": self._devices(),
        }

    def _averaged(self) -> dict[str, Any]:
        """The loss of the averaged weights and their folder, where there are some."""
        if not self.parts.optimizer.ema_weights():
            return {}
        folder = str(self.run.folder / _AVERAGE)
        return {"val_loss_ema": self.evaluator.losses.get("val_loss_ema"), "ema": folder}

    def _adapter(self) -> dict[str, int]:
        """The size of the adapter, where one is trained."""
        if self.parts.recipe.adapter.kind == "none":
            return {}
        return {"adapter_bytes": adapter_bytes(self.parts.config, self.parts.recipe)}

    def _effect(self) -> dict[str, float]:
        """How far the adapter has changed its base, where this process holds all of both."""
        change = None if self.parts.is_sharded else self.effect.change()
        return {} if change is None else {"adapter_change": change}

    def _devices(self) -> list[dict[str, Any]]:
        """What each process used of its device."""
        return memory_of_all(self.group, self.device, self.rows_at_once)

    def _micro_batches(self, step: int) -> tuple[list[Batch], list[int]]:
        """This process's rows, cut; for dropout a seed a part, from (seed, step, first row)."""
        recipe, size = self.parts.recipe, self.rows_at_once
        rows = self.parts.train.rows_for_step(step)
        cuts = self.group.cuts(len(rows), size, together=self.parts.is_sharded)
        parts = (rows[cut.start : cut.stop] for cut in cuts)
        batches = [self.parts.train.batch(part).to(self.device) for part in parts]
        if not self.parts.draws_numbers:
            return batches, []
        return batches, [stable_seed(recipe.train.seed, step, cut.start) for cut in cuts]


def _past(run: Run, done: int) -> dict[str, Any]:
    """What a resumed or rolled back run goes on from, beside its weights; fits into JSON."""
    return {"guard": Guard.read(run, done), "evaluator": Evaluator.read(run, done)}


def _tell_of_a_kill(run: Run) -> None:
    """Say that the attempt before ended without a word, if it did."""
    if row := run.killed_after():
        run.log_event("found killed", step=row["step"], memory_bytes=row.get("memory_bytes"))
        progress.note(killed_in_words(row), "warning")


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


def _leave(run: Run, stop: StopRequest, done: int, num_steps: int) -> NoReturn:
    assert stop.signum is not None
    run.log_event("interrupted", step=done, signal=stop.signum)
    latest = run.latest()
    is_saved = latest is not None and latest["step"] == done
    saved = "everything is saved" if is_saved else "all up to the last checkpoint is saved"
    raise Interrupted(
        stop.signum,
        f"stopped after update {done} of {num_steps}; {saved} in {run.folder}",
        f"go on with: mule train {run.folder}/recipe.yaml --resume",
    )
