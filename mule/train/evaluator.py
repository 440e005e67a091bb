"""What is measured of a run at each evaluation, and what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mule import progress
from mule.data.loader import Labelled, ValidSet
from mule.data.passages import copied_stretches
from mule.errors import ModelError
from mule.evaluate.loss import HeldOutLoss, counted, held_out_loss
from mule.generate.engine import greedy_answers
from mule.run import Run
from mule.train.ema import averaged_weights
from mule.train.signals import StopRequest
from mule.train.stopping import Evaluations

if TYPE_CHECKING:
    from mule.train.assemble import Parts

_SAMPLE_TOKENS = 64
_SHOWN_CHARS = 200
_OVERFITTING = "overfitting"  # the event


class Evaluator:
    """Validation losses and answers, and the history that they make.

    `losses` are the newest, as a row of metrics has them.
    """

    def __init__(self, run: Run, parts: Parts) -> None:
        self._run, self._parts, self._group = run, parts, parts.group
        self._device = torch.device(parts.recipe.train.device)
        self.history = Evaluations(parts.recipe.evaluate.patience)
        self.losses: dict[str, Any] = {}
        self._has_warned = False

    @staticmethod
    def read(run: Run, done: int) -> dict[str, Any]:
        """What the logs say of the first `done` updates, for `restore`; fits into JSON."""
        rows = [row for row in run.metrics() if row["step"] <= done]
        last = next((row for row in reversed(rows) if "val_loss" in row), {})
        warned = any(event["step"] <= done for event in run.standing_events(_OVERFITTING))
        return {
            "losses": {key: value for key, value in last.items() if key.startswith("val_")},
            "history": Evaluations.read(rows),
            "has_warned": warned,
        }

    def restore(self, past: dict[str, Any]) -> None:
        """Go on from what `read` found."""
        self.losses, self._has_warned = past["losses"], past["has_warned"]
        self.history.restore(past["history"])

    def evaluate(self, done: int, stop: StopRequest) -> bool:
        """Validation loss on the fixed set, and answers to the user's prompts.

        False when a wish to stop ended it: nothing is kept of it then, and `owes` it. Among several
        processes an evaluation is finished, since they agree on stopping in an update.
        """
        parts = self._parts
        if parts.valid is not None:
            try:
                found = self._held_out_loss(parts.valid, stop)
                losses = found.figures(parts.valid.labels)
                if parts.optimizer.ema_weights():
                    with averaged_weights(parts.model, parts.optimizer):
                        losses["val_loss_ema"] = self._held_out_loss(parts.valid, stop).loss
            except _Stopped:
                self.losses = {}  # the row of this update has none yet
                return False
            self.losses = losses
            self.history.evaluated(done, found.loss)
            self._warn_of_overfitting(done)
        self.answer(done)
        return True

    def owes(self, done: int) -> bool:
        """Whether the evaluation after update `done` was begun, and stopped before its end."""
        due = done % int(self._parts.recipe.evaluate.every_steps) == 0
        due = due or done == self._parts.resolved.num_steps
        return due and self._parts.valid is not None and self.val_loss_of(done) is None

    def answer(self, done: int) -> None:
        """Log and show what the model answers after `done` updates; after none, the base does."""
        prompts = self._parts.recipe.evaluate.prompts
        if not prompts or not (self._group.is_first or self._parts.is_sharded):
            return
        texts, about = self._answers(prompts)
        answers = dict(zip(prompts, texts))
        self._run.log_samples(done, answers, **about)
        for prompt, answer in answers.items():
            progress.note(f"step {done}: {prompt} -> {in_short(answer)}")

    def val_loss_of(self, done: int) -> float | None:
        """The validation loss after update `done`; None when it was not measured then."""
        last = self.history.done[-1] if self.history.done else None
        return last.val_loss if last and last.step == done else None

    def _warn_of_overfitting(self, done: int) -> None:
        """Say it once in a run."""
        found = self.history.overfitting()
        if found is None or self._has_warned:
            return
        self._has_warned = True
        self._run.log_event(_OVERFITTING, step=done, cause=found)
        adapter = self._parts.recipe.adapter.kind != "none"
        dropout = "adapter.lora.dropout" if adapter else "train.dropout"
        ends = "" if self.history.patience else "evaluate.patience=2 ends such a run by itself; "
        progress.note(
            f"overfitting: {found}. The model learns its data by heart. The best checkpoint is "
            f"kept; {ends}fewer epochs, more data or {dropout}=0.1 help",
            "warning",
        )

    def _held_out_loss(self, valid: ValidSet, stop: StopRequest) -> HeldOutLoss:
        """Over the whole set, each process having summed its share of the rows."""
        size, together = valid.micro_batch_rows, self._parts.is_sharded
        cuts = list(self._group.cuts(valid.num_rows, size, together=together))
        with progress.task("Evaluating", total=size * len(cuts), unit="rows") as bar:
            batches = counted(_until(valid.batches(cuts), stop, self._group.is_alone), bar)
            found = held_out_loss(self._parts.model, batches, len(valid.labels))
        if self._group.is_alone:
            return found
        sums = [found.nll, found.counts]
        total = torch.tensor(sums, dtype=torch.float64, device=self._device)
        self._group.sum_(total)
        nll, counts = total.tolist()
        return HeldOutLoss(nll, [round(count) for count in counts])

    def _answers(self, prompts: list[str]) -> tuple[list[str], dict[str, Any]]:
        """The texts, and of each prompt's answer what its text does not show."""
        parts, tokenizer = self._parts, self._parts.tokenizer
        chat = parts.train.shards.kind == "chat"
        ids = [
            tokenizer.encode_prompt([{"role": "user", "content": text}])
            if chat
            else tokenizer.encode(text)
            for text in prompts
        ]
        room = parts.config.max_position_embeddings - max(len(i) for i in ids)
        most = min(_SAMPLE_TOKENS, room)
        try:
            answers = greedy_answers(
                parts.model.eval(),
                ids,
                max_tokens=most,
                stop_ids=tokenizer.stop_ids,
                vocab_size=tokenizer.vocab_size,
            )
        except ModelError as error:  # shown in the samples; no reason to lose a run
            return [f"({error.message})"] * len(prompts), {}
        finally:
            parts.model.train()
        copied = copied_stretches(parts.train.shards, [np.array(answer) for answer in answers])
        about = {
            "tokens": dict(zip(prompts, map(len, answers))),
            "stopped": {text: len(answer) < most for text, answer in zip(prompts, answers)},
            "copied": dict(zip(prompts, copied)),
        }
        return [tokenizer.decode(answer, skip_special=True) for answer in answers], about


class _Stopped(Exception):
    """An evaluation ended before its time."""


def _until(batches: Iterator[Labelled], stop: StopRequest, alone: bool) -> Iterator[Labelled]:
    for labelled in batches:
        if alone and stop.signum:
            raise _Stopped
        yield labelled


def in_short(answer: str) -> str:
    """The beginning of an answer, on one line."""
    line = " ".join(answer.split())
    return line if len(line) <= _SHOWN_CHARS else f"{line[:_SHOWN_CHARS]}..."
