"""Text from our decoder: prefill, then one token at a time on a static cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mule.errors import UserError
from mule.generate.request import Request
from mule.generate.sampler import RowSampler, Sampling, check_best
from mule.models.cache import KVCache
from mule.models.decoder import Decoder
from mule.models.eager import uncompiled


@torch.no_grad()
def stream(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield token ids until a stop token (not yielded) or `max_tokens`."""
    cache, ids = _start(model, [list(prompt_ids)], max_tokens)
    request = Request(tuple(prompt_ids), max_tokens, sampling or Sampling())
    sampler = RowSampler(request, vocab_size or model.config.vocab_size)
    with uncompiled():  # a compiled graph for each length pays never
        logits = model.step(ids, cache)
        for _ in range(max_tokens):
            token = sampler.draw(logits[0].float().cpu().numpy()).token
            if token in stop_ids:
                return
            yield token
            if cache.length == model.config.max_position_embeddings:
                return  # the context is full
            logits = model.step(torch.tensor([[token]], device=ids.device), cache)


@torch.no_grad()
def greedy_answers(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
    batch_size: int = 64,
) -> list[list[int]]:
    """Greedy continuations of many prompts, each up to its stop token (left out).

    Prompts of equal length share a batch, so that no row is padded and none sees another.
    """
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    answers: list[list[int]] = [[] for _ in prompts]
    num_drawn = vocab_size or model.config.vocab_size
    for same in by_length.values():
        for start in range(0, len(same), batch_size):
            part = same[start : start + batch_size]
            rows = [list(prompts[i]) for i in part]
            for i, answer in zip(part, _greedy_batch(model, rows, max_tokens, stop_ids, num_drawn)):
                answers[i] = answer
    return answers


def _greedy_batch(
    model: Decoder,
    rows: list[list[int]],
    max_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
) -> list[list[int]]:
    cache, ids = _start(model, rows, max_tokens)
    stops = torch.tensor(list(stop_ids), device=ids.device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=ids.device)
    prompt_length = ids.shape[1]
    with uncompiled():
        logits = model.step(ids, cache)
        for _ in range(max_tokens):
            best, token = logits[:, :vocab_size].max(-1, keepdim=True)
            check_best(float(best.sum()))  # what is no number in any row shows in the sum
            ids = torch.cat((ids, token), dim=1)
            finished |= torch.isin(token.squeeze(-1), stops)
            if bool(finished.all()) or cache.length == model.config.max_position_embeddings:
                break
            logits = model.step(token, cache)
    return [_before_stop(row, stop_ids) for row in ids[:, prompt_length:].tolist()]


def _before_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    ends = [ids.index(stop) for stop in stop_ids if stop in ids]
    return ids[: min(ends)] if ends else ids


def _start(model: Decoder, rows: list[list[int]], max_tokens: int) -> tuple[KVCache, torch.Tensor]:
    if not rows[0]:
        raise UserError("the prompt is empty", "give at least one word")
    limit = model.config.max_position_embeddings
    needed = len(rows[0]) + max_tokens
    if len(rows[0]) >= limit:
        raise UserError(
            f"the prompt has {len(rows[0])} tokens; the model's context holds {limit}",
            "shorten the prompt or start a new conversation (/reset)",
        )
    cache = model.new_cache(len(rows), min(needed, limit))
    return cache, torch.tensor(rows, device=model.device)
