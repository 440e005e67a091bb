"""Which rows of an embedding were never trained, by measuring them.

A row that no text ever used stays what it began as, or goes where all such rows go: to zero by
decay, or in one common direction, since the output's softmax pushes all of them alike. Rows that
were added later are often copies of the mean. A trained row is like none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mule.models.folder import weight_files
from mule.models.tensor_file import open_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# All as a share of the usual distance of a row from the mean of all; trained rows are about 1 away
# from that mean, and further from one another.
_ZERO = 0.05
_SAME = 0.1
_LIKE_UNUSED = 0.25
_LEAST_UNUSED = 8  # so many show how far apart unused rows are
_SPREADS, _LEAST_SPREAD = 4.0, 0.1
_DISTINCT = 0.5  # so much further away, or nearer, must the usual ordinary row be
LEAST_COMMON = 64  # words to compare with
_MOST_UNUSED = 512


def untrained_rows(rows: torch.Tensor, ordinary: torch.Tensor, unused: torch.Tensor) -> list[bool]:
    """Whether each of `rows` (n, E) was never trained.

    `ordinary` (m, E) are rows of common tokens, nearly all of them trained; `unused` (k, E) are rows
    that no text has, k from 0. In a model that was never trained at all, no row stands out, and none
    is called untrained.
    """
    rows, ordinary, unused = rows.float(), ordinary.float(), unused.float()
    centre = ordinary.mean(0)
    usual = (ordinary - centre).norm(dim=1).median()
    if not len(rows) or usual == 0:
        return [False] * len(rows)
    apart = torch.cdist(rows, rows) + torch.eye(len(rows)) * 2 * usual
    found = rows.norm(dim=1) < _ZERO * ordinary.norm(dim=1).median()
    found |= (rows - centre).norm(dim=1) < _SAME * usual
    found |= (apart < _SAME * usual).any(1)
    if len(unused):
        found |= (torch.cdist(rows, unused) < _LIKE_UNUSED * usual).any(1)
    if len(unused) >= _LEAST_UNUSED:
        found |= _are_among(unused, ordinary, rows)
    return found.tolist()


def _are_among(unused: torch.Tensor, ordinary: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Whether each row is as far from the middle of the unused rows as these are themselves.

    Untrained rows are a common vector and the random ones they began as, which are all equally far
    from it: in many dimensions the lengths of random vectors hardly differ. Where most ordinary
    rows are about as far, that tells nothing, and none is.
    """
    count, middle = len(unused), unused.mean(0)
    away = (unused - middle).norm(dim=1)
    usual = away.mean() * ((count + 1) / (count - 1)) ** 0.5  # of a row that is not in the mean
    width = max(_SPREADS * away.std(), _LEAST_SPREAD * usual)
    further = (ordinary - middle).norm(dim=1).median() - usual
    if further.abs() < max(2 * width, _DISTINCT * usual):
        return torch.zeros(len(rows), dtype=torch.bool)
    return ((rows - middle).norm(dim=1) - usual).abs() < width


@dataclass(frozen=True)
class Tokens:
    """Rows by what uses them: common words, nothing so far (`spare`), and none behind the last."""

    common: Sequence[int]
    spare: Sequence[int]
    count: int


def measured(folder: Path, name: str, ids: Sequence[int], tokens: Tokens) -> list[bool]:
    """`untrained_rows` of a stored matrix (V, E), for the rows `ids`; only what is needed is read.

    Nothing is called untrained where the matrix is not stored, as that of a tied head, or where
    there are too few common words to compare with.
    """
    if len(tokens.common) < LEAST_COMMON:
        return [False] * len(ids)
    for file in weight_files(folder):
        with open_tensors(file) as tensors:
            if name not in tensors.keys():
                continue
            stored = tensors.get_slice(name)
            behind = range(tokens.count, min(stored.get_shape()[0], tokens.count + _MOST_UNUSED))
            unused = [*tokens.spare, *behind]
            return untrained_rows(*(_rows(stored, of) for of in (ids, tokens.common, unused)))
    return [False] * len(ids)


def _rows(stored: Any, ids: Sequence[int]) -> torch.Tensor:
    """Rows (n, E) of an open matrix of a safetensors file."""
    none = torch.empty(0, stored.get_shape()[1])
    return torch.cat([none, *(stored[i : i + 1] for i in ids)])
