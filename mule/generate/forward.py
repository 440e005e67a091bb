"""The forward pass of many conversations at once, each in a slot of one cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mule.models.cache import SlotCache, SlotRows
from mule.models.decoder import Decoder


@dataclass(frozen=True)
class Part:
    """Tokens to append to one slot, which holds `start` tokens.

    `text_tokens`: how long the whole text is, as far as it is known: it decides the angles of a
    model whose positions turn otherwise in a long text. `wanted`: the logits behind the last token.
    """

    slot: int
    start: int
    ids: Sequence[int]
    text_tokens: int
    wanted: bool


class Forward(Protocol):
    """A decoder with a cache of slots."""

    # Of a prompt, computed at once: while others wait for their next token, and while none does.
    chunk_tokens: int
    idle_chunk_tokens: int

    def extend(self, parts: Sequence[Part]) -> torch.Tensor:
        """Append every part to its slot; logits (n, V) fp32 of the wanted parts, on the host."""
        ...

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        """Give a slot the first tokens of another."""
        ...

    def clear(self, slot: int) -> None:
        """Forget a slot in which something went wrong."""
        ...


class ModuleForward:
    """The modules of a model that is not compiled, on any device: prompts one by one, next tokens of
    all conversations together."""

    chunk_tokens, idle_chunk_tokens = 128, 512

    def __init__(self, model: Decoder, num_slots: int, context_tokens: int) -> None:
        self._model = model
        self._cache = SlotCache(model.config, num_slots, context_tokens, model.lm_head.weight)

    def extend(self, parts: Sequence[Part]) -> torch.Tensor:
        logits: dict[int, torch.Tensor] = {}
        steps = [part for part in parts if len(part.ids) == 1 and part.wanted]
        with torch.no_grad():
            if steps:
                found = self._step(steps)
                logits |= {part.slot: found[part.slot] for part in steps}
            for part in parts:
                if part not in steps:
                    logits[part.slot] = self._append(part)
        wanted = [logits[part.slot] for part in parts if part.wanted]
        if not wanted:
            return torch.empty(0, self._model.config.vocab_size)
        return torch.stack(wanted).float().cpu()

    def _step(self, parts: Sequence[Part]) -> torch.Tensor:
        """Logits (slots, V) after one token each; slots between that have none compute in vain."""
        num_rows = max(part.slot for part in parts) + 1
        tokens = [0] * num_rows
        starts, texts = [self._cache.scratch] * num_rows, [1] * num_rows
        for part in parts:
            tokens[part.slot], starts[part.slot] = part.ids[0], part.start
            texts[part.slot] = part.text_tokens
        longest = max(part.start for part in parts) + 1
        rows = self._cache.rows(slice(0, num_rows), starts, 1, texts, longest)
        return self._extend([[token] for token in tokens], rows)

    def _append(self, part: Part) -> torch.Tensor:
        slots, num_new = slice(part.slot, part.slot + 1), len(part.ids)
        end = part.start + num_new
        rows = self._cache.rows(slots, [part.start], num_new, [part.text_tokens], end)
        return self._extend([list(part.ids)], rows)[0]

    def _extend(self, ids: list[list[int]], rows: SlotRows) -> torch.Tensor:
        return self._model.extend(torch.tensor(ids, device=self._model.device), rows)

    def copy(self, source: int, destination: int, num_tokens: int) -> None:
        self._cache.copy(source, destination, num_tokens)

    def clear(self, slot: int) -> None:
        self._cache.clear(slot)
