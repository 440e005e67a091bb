"""Updates that go wrong: NaN, infinities and spikes, where a job's fault says so.

`poison` is a table: what happens -> the updates, counted from 1, in which it does. A run that comes
to an update again, after a kill, meets the same.
"""

from __future__ import annotations

import math
import os
import signal
from typing import Any

import torch


def install(plan: dict[str, list[int]]) -> None:
    """Let it happen in this process; before the run begins."""
    from mule.models.decoder import Decoder
    from mule.train import loop
    from mule.train.step import Overflow, RefusedStep

    trainer: Any = loop._Trainer
    update, train_step, nll_sum = trainer.update, loop.train_step, Decoder.nll_sum
    now = {"update": 0}

    def happens(what: str) -> bool:
        return now["update"] in plan.get(what, ())

    def noted_update(self: Any, step: int, stop: Any) -> Any:
        now["update"] = step + 1
        return update(self, step, stop)

    def bad_step(model: Any, optimizer: Any, *given: Any, **named: Any) -> Any:
        if happens("left out"):  # what every refusal must be equal to
            raise RefusedStep("left out")
        if happens("overflow"):
            raise Overflow("gradient beyond fp16")
        if happens("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if happens("stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        if happens("bad weights"):
            _break(optimizer)
            optimizer.refresh_working_weights()
        result = train_step(model, optimizer, *given, **named)
        if happens("bad masters"):
            _break(optimizer)
        return result

    def bad_nll_sum(self: Any, *given: Any, **named: Any) -> torch.Tensor:
        if happens("no memory") and len(given[0].targets) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        nll = nll_sum(self, *given, **named)
        if not torch.is_grad_enabled():
            return nll
        for what, factor in (("nan loss", math.nan), ("infinite loss", math.inf), ("spike", 10.0)):
            if happens(what):
                nll = nll * factor
        if happens("nan gradient"):
            nll.register_hook(lambda gradient: gradient * math.nan)
        if happens("infinite gradient"):
            nll.register_hook(lambda gradient: gradient * math.inf)
        if happens("gradient spike"):
            nll.register_hook(lambda gradient: gradient * 10.0)
        return nll

    trainer.update, loop.train_step, Decoder.nll_sum = noted_update, bad_step, bad_nll_sum


def _break(optimizer: Any) -> None:
    """A master of the final norm, which every output goes through, becomes NaN."""
    masters = optimizer.master_weights()
    masters["model.norm.weight"].view(-1)[0] = math.nan
