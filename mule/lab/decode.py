"""How fast a model decodes: prefill apart from decoding, with a cache and without, batch x context.

A row of `context` tokens begins as a prompt of random ids and ends with tokens drawn greedily, none of
which stops it. Without a cache the whole text is computed again for each token, at the same final
lengths, by the same code. What is timed was computed before, and gave the same logits both ways.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mule import machine, progress
from mule.adapters.source import find_source, load_source
from mule.errors import CheckFailed, UserError
from mule.lab.decode_figures import cache_figures, card, gains, step_figures, step_limits
from mule.lab.decode_ways import Clock, Way, fastest_way
from mule.models import cost
from mule.models.decoder import Decoder
from mule.models.eager import uncompiled

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the largest logit, what cached and uncached ones may differ by.
_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2}
NEW_TOKENS = 32
_MEMORY_SHARE = 0.8  # of what is free: the most that a cache and logits may take


@dataclass(frozen=True)
class Plan:
    """How much to measure; a result tells each row's own `repetitions` and `new_tokens`."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    precision: str
    cached: tuple[bool, ...] = (True, False)
    repetitions: int = 5
    new_tokens: int = NEW_TOKENS
    time_limit_s: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise UserError(
                f"{self.precision!r} is no precision that is measured",
                f"one of {', '.join(DTYPES)}",
            )
        for name, least in (("batches", 1), ("contexts", 4)):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < least:
                raise UserError(
                    f"{name} is {list(numbers)}; each must be {least} or more",
                    f"for example {name} = {[least * 4]}",
                )
        if self.new_tokens < 2 or self.repetitions < 1:
            raise UserError(
                f"{self.new_tokens} new tokens, {self.repetitions} repetitions: too few to time",
                "at least 2 new tokens and 1 repetition",
            )


def measure_decode(
    model: Decoder | str | Path,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    precision: str,
    repetitions: int = 5,
    cached: Sequence[bool] = (True, False),
    new_tokens: int = NEW_TOKENS,
    time_limit_s: float = 300.0,
    bandwidth: float | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Rows of batch x context, with a cache and without; see docs/kv-cache.md.

    `model`: a decoder, or what `mule chat` would be given. `bandwidth`: bytes a second that memory
    gives, where it is known already. What does not fit the memory, the model's context or the time is
    in `not_measured`; before that, repetitions and timed tokens become fewer.

    Raises CheckFailed when the cache gives other logits than the whole text.
    """
    plan = Plan(
        tuple(sorted(set(batches))),
        tuple(sorted(set(contexts))),
        precision,
        tuple(dict.fromkeys(cached)),
        repetitions,
        new_tokens,
        time_limit_s,
    )
    decoder = _decoder(model, DTYPES[precision], device)
    if bandwidth is None:
        bandwidth = machine.read_bandwidth(decoder.device.type)
    with torch.no_grad(), uncompiled():
        return _Measurement(decoder, plan, bandwidth).result()


def _decoder(model: Decoder | str | Path, dtype: torch.dtype, device: str | None) -> Decoder:
    if isinstance(model, Decoder):
        if any(weight.dtype != dtype for weight in model.parameters()):
            model = copy.deepcopy(model).to(dtype)
        return model.eval()
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_source(find_source(str(model)), dtype=dtype, device=place)[0].eval()


@dataclass
class _Text:
    """Rows of one length, with the tokens that greedy decoding gave and the logits of the last."""

    ids: torch.Tensor  # (B, context)
    logits: torch.Tensor  # (B, V)
    seconds: list[float]  # of the prefill, then of each further token


class _Measurement:
    """All rows of a plan for one model, the quick ones first."""

    def __init__(self, model: Decoder, plan: Plan, bandwidth: float) -> None:
        self._model, self._plan, self._bandwidth = model, plan, bandwidth
        self._deadline = time.perf_counter() + plan.time_limit_s
        self._rate = 0.0  # tokens a second of the last prefill
        self._rows: list[dict[str, Any]] = []
        self._left_out: list[dict[str, Any]] = []
        self._errors: list[float] = []
        self._engine = ""

    def result(self) -> dict[str, Any]:
        plan = self._plan
        cells = [(batch, context) for context in plan.contexts for batch in plan.batches]
        with progress.task("Measuring the decoding", total=len(cells), unit="rows") as bar:
            for number, (batch, context) in enumerate(cells):
                if why := self._unfit(batch, context):
                    self._leave_out(batch, context, plan.cached, why)
                else:
                    self._cell(batch, context, len(cells) - number)
                bar.advance()
        compared = [row["same_text"] for row in self._rows if "same_text" in row]
        return {
            "precision": plan.precision,
            "engine": self._engine,
            "device": self._model.device.type,
            "threads": torch.get_num_threads(),
            "bandwidth_bytes_per_second": self._bandwidth,
            "rows": self._rows,
            "gains": gains(self._rows),
            "not_measured": self._left_out,
            "max_error": max(self._errors, default=None),
            "same_text": all(compared) if compared else None,
            "card": card(self._model),
            "time_limit_s": plan.time_limit_s,
        }

    # ------------------------------------------------------------ what is measured

    def _cell(self, batch: int, context: int, num_cells: int) -> None:
        """Warm up, compare both ways, then time them."""
        plan = self._plan
        way = fastest_way(self._model, batch, context)
        self._engine = way.engine
        num_new = min(plan.new_tokens, context // 2)
        prompt = self._prompt(batch, context - num_new)
        text = self._decoded(way, prompt, num_new)
        self._rate = prompt.numel() / text.seconds[0]
        again_s = self._checked(way, text, context)
        num_ways = len(plan.cached)
        seconds = max(0.0, self._deadline - time.perf_counter()) / num_cells
        for place, cached in enumerate(plan.cached):
            share = seconds / num_ways if place + 1 < num_ways else seconds
            started_at = time.perf_counter()
            if cached:
                row = self._cached_row(way, prompt, num_new, share / sum(text.seconds))
            else:
                row = self._uncached_row(way, text, num_new, share / again_s)
            seconds -= time.perf_counter() - started_at
            if row is None:
                why = f"one token takes {again_s:.1f} s, and {share:.1f} s were left for the row"
                self._leave_out(batch, context, (cached,), why)
                continue
            row = {"batch": batch, "context": context, "cached": cached} | row
            row |= step_limits(self._model, self._bandwidth, row, cached=cached)
            if cached:
                row |= cache_figures(self._model, way, batch)
            self._rows.append(row)

    def _cached_row(
        self, way: Way, prompt: torch.Tensor, num_new: int, affordable: float
    ) -> dict[str, Any]:
        count = max(1, min(self._plan.repetitions, int(affordable)))
        texts = [self._decoded(way, prompt, num_new).seconds for _ in range(count)]
        first = [seconds[0] for seconds in texts]
        return step_figures([seconds[1:] for seconds in texts], len(prompt)) | {
            "new_tokens": num_new,
            "prefill_tokens_per_second": statistics.mean(prompt.numel() / s for s in first),
            "time_to_first_token_s": statistics.median(first),
        }

    def _uncached_row(
        self, way: Way, text: _Text, num_new: int, affordable: float
    ) -> dict[str, Any] | None:
        """The text's last tokens again, as many as the time allows; None if it allows none."""
        if affordable < 1:
            return None
        count = min(self._plan.repetitions, int(affordable))
        num_new = max(1, min(num_new, int(affordable / count)))
        repetitions, same = [], True
        for _ in range(count):
            ids, seconds = self._recomputed(way, text, num_new)
            same = same and torch.equal(ids, text.ids)
            repetitions.append(seconds)
        flat = [s for seconds in repetitions for s in seconds]
        lengths = len(flat) * (text.ids.shape[1] - (num_new + 1) / 2)
        return step_figures(repetitions, len(text.ids)) | {
            "new_tokens": num_new,
            "prefill_tokens_per_second": len(text.ids) * lengths / sum(flat),
            "time_to_first_token_s": statistics.median(flat),
            "same_text": same,
        }

    def _decoded(self, way: Way, prompt: torch.Tensor, num_new: int) -> _Text:
        """The prompt (B, P) and `num_new` tokens; nothing is asked of the device in between."""
        way.start()
        clock, tokens = Clock(prompt.device), []
        clock.mark()
        logits = way.append(prompt)
        tokens.append(logits.argmax(-1, keepdim=True))
        clock.mark()
        for _ in range(num_new - 1):
            logits = way.append(tokens[-1])
            tokens.append(logits.argmax(-1, keepdim=True))
            clock.mark()
        return _Text(torch.cat((prompt, *tokens), dim=1), logits, clock.seconds())

    def _recomputed(self, way: Way, text: _Text, num_new: int) -> tuple[torch.Tensor, list[float]]:
        """The text with its last `num_new` tokens drawn again, each from all before it."""
        ids = text.ids.clone()
        length = ids.shape[1]
        ids[:, length - num_new :] = 0
        clock = Clock(ids.device)
        clock.mark()
        for place in range(length - num_new, length):
            ids[:, place] = way.whole(ids, place).argmax(-1)
            clock.mark()
        return ids, clock.seconds()

    def _checked(self, way: Way, text: _Text, context: int) -> float:
        """Compare the logits behind the last token but one; seconds that the whole text takes."""
        clock = Clock(text.ids.device)
        clock.mark()
        whole = way.whole(text.ids, context - 1)
        clock.mark()
        error = float((whole.float() - text.logits.float()).abs().max())
        scale = float(whole.float().abs().max())
        self._errors.append(error)
        precision = self._plan.precision
        if not error <= _TOLERANCE[precision] * scale:
            raise CheckFailed(
                f"decoding with the cache gives other logits than the whole text: they differ by "
                f"{error:.3g} where the largest is {scale:.3g} (context {context}, {precision})",
                "measure in fp32: if it fails there too, the cache of this architecture is wrong",
            )
        return clock.seconds()[0]

    # ------------------------------------------------------------ what it is measured of

    def _prompt(self, batch: int, num_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._plan.seed)
        shape = (batch, num_tokens)
        ids = torch.randint(0, self._model.config.vocab_size, shape, generator=generator)
        return ids.to(self._model.device)

    def _unfit(self, batch: int, context: int) -> str | None:
        """Why a row cannot be measured; None when it can."""
        config = self._model.config
        if context > config.max_position_embeddings:
            return f"the model's context holds {config.max_position_embeddings:,} tokens"
        size = self._model.lm_head.weight.element_size()
        needed = batch * (
            cost.cache_bytes(config, context, size)
            + 4 * context * max(config.hidden_size * 4, config.intermediate_size * 3)
            + 8 * config.vocab_size
        )
        if needed > _MEMORY_SHARE * _free_bytes(self._model.device):
            return f"it takes about {needed / 2**30:.1f} GiB of memory"
        left_s = self._deadline - time.perf_counter()
        if self._rate and (predicted_s := 2 * batch * context / self._rate) > left_s:
            return f"it would take {predicted_s:.0f} s at least; {max(0.0, left_s):.0f} s are left"
        return None

    def _leave_out(self, batch: int, context: int, cached: Sequence[bool], why: str) -> None:
        row = {"batch": batch, "context": context}
        self._left_out += [row | {"cached": one, "why": why} for one in cached]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.available_bytes()
