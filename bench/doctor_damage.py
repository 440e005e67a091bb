"""Damage to a training in this process, for faults that Mule makes impossible or that come from outside.

Each function here changes a part of Mule where it is looked up, and returns nothing: the process that
called it trains one run and ends. `num_steps` are the updates of the run.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from mule.batch import IGNORE, Batch
from mule.data import loader
from mule.models import decoder, moe
from mule.train import assemble, loop

_LEAKED_NUMBERS = 1 << 20  # of 4 bytes, at every update
_LOUD = 6.0  # beside it, what a router says of a token is nothing
_SLOWS_FROM = 0.3  # of the run


def _before_updates(change: Callable[[int, list[Batch], dict[str, Any]], list[Batch]]) -> None:
    """Have `change` look at the number of each update (from 0), its batches and its options."""
    original, calls = loop.train_step, iter(range(1_000_000))

    def damaged(model: Any, optimizer: Any, batches: list[Batch], **options: Any) -> Any:
        return original(model, optimizer, change(next(calls), batches, options), **options)

    loop.train_step = damaged


def _with_targets(change: Callable[[Batch], torch.Tensor]) -> None:
    """In training and in validation, as a wrong script for the data has it."""
    original = loader.make_batch

    def make_batch(*arguments: Any, **options: Any) -> Batch:
        batch = original(*arguments, **options)
        return dataclasses.replace(batch, targets=change(batch))

    loader.make_batch = make_batch


def targets_in_disorder(num_steps: int) -> None:
    """The targets of a batch change places: what follows what cannot be learned."""
    generator = torch.Generator().manual_seed(1)

    def shuffled(batch: Batch) -> torch.Tensor:
        targets, trained = batch.targets.clone(), batch.targets != IGNORE
        known = targets[trained]
        targets[trained] = known[torch.randperm(len(known), generator=generator)]
        return targets

    _with_targets(shuffled)


def targets_not_shifted(num_steps: int) -> None:
    """The target of each token is the token itself: the model has only to copy."""
    _with_targets(lambda batch: batch.input_ids.where(batch.targets != IGNORE, batch.targets))


def noise_for_text(num_steps: int) -> None:
    """Every 20th update has random tokens for data, as a damaged file would bring them."""
    generator = torch.Generator().manual_seed(2)

    def changed(number: int, batches: list[Batch], options: dict[str, Any]) -> list[Batch]:
        if number % 20 != 19:
            return batches
        return [dataclasses.replace(batch, targets=noise(batch)) for batch in batches]

    def noise(batch: Batch) -> torch.Tensor:
        drawn = torch.randint(0, 256, batch.targets.shape, generator=generator)
        return drawn.where(batch.targets != IGNORE, batch.targets)

    _before_updates(changed)


def not_a_number(num_steps: int) -> None:
    """A few updates have a loss that is not a number."""
    bad, original = (
        {num_steps * 2 // 5, num_steps // 2, num_steps * 3 // 5},
        decoder.Decoder.nll_sum,
    )
    now = [0]

    def nll_sum(self: Any, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        found = original(self, batch, grad_scale)
        return found * float("nan") if now[0] in bad and torch.is_grad_enabled() else found

    def noted(number: int, batches: list[Batch], options: dict[str, Any]) -> list[Batch]:
        now[0] = number
        return batches

    decoder.Decoder.nll_sum = nll_sum
    _before_updates(noted)


def no_gradient(num_steps: int) -> None:
    """The loss is computed; of its gradient hardly anything arrives, as behind a detached tensor."""
    original = decoder.Decoder.nll_sum

    def nll_sum(self: Any, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        found = original(self, batch, grad_scale)
        return found.detach() + 1e-9 * (found - found.detach())

    decoder.Decoder.nll_sum = nll_sum


def rate_step(num_steps: int) -> None:
    """Half-way the learning rate jumps to sixty times of what it was."""
    original = loop.learning_rate

    def learning_rate(*arguments: Any) -> Callable[[int], float]:
        rate = original(*arguments)
        return lambda step: rate(step) * (60.0 if step >= num_steps // 2 else 1.0)

    loop.learning_rate = learning_rate


def rows_in_order(num_steps: int) -> None:
    """The rows come as they lie in the files, in every epoch."""
    loader.Loader._order = lambda self, epoch: torch.arange(self.num_rows).numpy()


def stop_untrained(num_steps: int) -> None:
    """The token that ends an answer is no target, in training and in validation."""
    original = assemble.prepared_rows

    def prepared_rows(data: Any, seed: int, tokenizer: Any, root: Any) -> tuple[Any, Any]:
        stops = list(tokenizer.stop_ids)
        train, valid = original(data, seed, tokenizer, root)
        return _without(train, stops), valid and _without(valid, stops)

    assemble.prepared_rows = prepared_rows


def _without(shards: Any, stops: list[int]) -> Any:
    """The same rows with the label taken from some tokens."""
    parts = []
    for part in shards.parts:
        trained = part.trained.copy()
        for stop in stops:
            trained[part.tokens == stop] = 0
        parts.append(dataclasses.replace(part, trained=trained))
    return dataclasses.replace(shards, parts=parts)


def router_collapse(num_steps: int) -> None:
    """Every router wants the same two experts for every token."""
    _bias_routers(lambda logits: _first(logits, 2) * _LOUD)


def dead_experts(num_steps: int) -> None:
    """No router ever wants the last of every three experts."""
    _bias_routers(lambda logits: -20.0 * (torch.arange(logits.shape[-1]) % 3 == 2))


def _first(logits: torch.Tensor, count: int) -> torch.Tensor:
    return (torch.arange(logits.shape[-1]) < count).float()


def _bias_routers(bias: Callable[[torch.Tensor], torch.Tensor]) -> None:
    original = moe.Router.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        logits = original(self, x)
        return logits + bias(logits)

    moe.Router.forward = forward


def slowing_down(num_steps: int) -> None:
    """From a third of the run on, every update takes longer than the one before, at last four times."""
    begun = _SLOWS_FROM * num_steps
    _slowed(lambda number: 3.0 * max(0.0, number - begun) / (num_steps - begun))


def slow_all_along(num_steps: int) -> None:
    """Something else holds the machine: every update takes four times as long as it could."""
    _slowed(lambda number: 3.0)


def _slowed(times: Callable[[int], float]) -> None:
    """Sleep after each update (from 0) so many times as long as it took."""
    original, calls = loop.train_step, iter(range(1_000_000))

    def slow(*arguments: Any, **options: Any) -> Any:
        started_at = time.perf_counter()
        result = original(*arguments, **options)
        time.sleep(times(next(calls)) * (time.perf_counter() - started_at))
        return result

    loop.train_step = slow


def leaking(num_steps: int) -> None:
    """Every update leaves 4 MiB behind."""
    kept: list[torch.Tensor] = []

    def keep(number: int, batches: list[Batch], options: dict[str, Any]) -> list[Batch]:
        kept.append(torch.ones(_LEAKED_NUMBERS))
        return batches

    _before_updates(keep)


def interrupted(num_steps: int) -> None:
    """Ctrl-C half-way, once; a healthy run goes on from there."""

    def stop(number: int, batches: list[Batch], options: dict[str, Any]) -> list[Batch]:
        if number == num_steps // 2:
            os.kill(os.getpid(), signal.SIGINT)
        return batches

    _before_updates(stop)
