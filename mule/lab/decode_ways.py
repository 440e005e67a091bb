"""The ways to compute a model's next tokens that are measured, and the clock beside them.

`append` goes on from a cache, `whole` computes all of a text again. Logits are (B, V) of each row's
last token; nothing is taken from an accelerator meanwhile.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch

from mule.generate.forward import Part
from mule.generate.native.decoder import NativeForward, can_be_native
from mule.models.decoder import Decoder
from mule.models.rope import changes_at


class Way(Protocol):
    """A model with a cache for a number of rows."""

    engine: str
    rolls: bool  # whether layers with a window keep no more than that

    @property
    def cache_bytes(self) -> int:
        """Of all rows, as they lie in memory."""
        ...

    @property
    def cache_tokens(self) -> int:
        """What a row has room for."""
        ...

    def start(self) -> None:
        """Empty the cache."""
        ...

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        """Append tokens (B, T) to the cached texts."""
        ...

    def whole(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Compute the first `length` tokens of (B, T) without what is cached; ends the cached text.

        The other columns are room, so that a text that grows keeps its shape.
        """
        ...


def fastest_way(model: Decoder, num_rows: int, context_tokens: int) -> Way:
    """As `mule chat` computes it: in C++ where that can, else by the torch modules."""
    kind = NativeWay if can_be_native(model) else ModuleWay
    return kind(model, num_rows, context_tokens)


class NativeWay:
    """The C++ decoder. A text is computed in pieces that fit the processor's caches."""

    engine, rolls = "C++", False

    def __init__(self, model: Decoder, num_rows: int, context_tokens: int) -> None:
        self._forward = NativeForward(model, num_rows, context_tokens)
        self._piece = max(1, NativeForward.idle_chunk_tokens // num_rows)
        self._length = 0

    @property
    def cache_bytes(self) -> int:
        return self._forward.cache.num_bytes

    @property
    def cache_tokens(self) -> int:
        return self._forward.cache.keys.shape[3]

    def start(self) -> None:
        self._length = 0

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._computed(ids, self._length)
        self._length += ids.shape[1]
        return logits

    def whole(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        self._length = 0  # its keys and values are written over
        return self._computed(ids[:, :length], 0)

    def _computed(self, ids: torch.Tensor, begin: int) -> torch.Tensor:
        rows, count, logits = ids.tolist(), ids.shape[1], torch.empty(0)
        for start in range(0, count, self._piece):
            end = min(start + self._piece, count)
            parts = [
                Part(slot, begin + start, row[start:end], begin + count, wanted=end == count)
                for slot, row in enumerate(rows)
            ]
            logits = self._forward.extend(parts)
        return logits


class ModuleWay:
    """The torch modules, on any device; recurrent layers keep their state."""

    engine, rolls = "torch modules", True

    def __init__(self, model: Decoder, num_rows: int, context_tokens: int) -> None:
        self._model, self._num_rows, self._context_tokens = model, num_rows, context_tokens
        self._cache = model.new_cache(num_rows, context_tokens)
        # Where angles depend on the length of the text, room would count as text.
        self._keeps_shape = changes_at(model.config) is None

    @property
    def cache_bytes(self) -> int:
        return self._cache.num_bytes

    @property
    def cache_tokens(self) -> int:
        return self._cache.capacity

    def start(self) -> None:
        self._cache = self._model.new_cache(self._num_rows, self._context_tokens)

    def append(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model.step(ids, self._cache)

    def whole(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        return self._model.logits_at(ids if self._keeps_shape else ids[:, :length], length - 1)


class Clock:
    """Seconds between marks; on a card between events, so that no step waits to be timed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """A moment: when the device is done with what was asked of it so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
            return
        if self._device.type == "mps":
            torch.mps.synchronize()
        self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next; waits for the device."""
        if self._events:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:])
            return [before.elapsed_time(after) / 1e3 for before, after in pairs]
        return [after - before for before, after in zip(self._times, self._times[1:])]
