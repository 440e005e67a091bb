"""How far the distributions of a file are from those of its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_ROWS_AT_ONCE = 32  # bounds the float64 copies: 32 rows of 150k tokens are 40 MB
_MIN_WINDOW_TOKENS = 2  # one to read, one to predict


def windows(
    texts: Sequence[list[int]], first: list[int], window_tokens: int, max_tokens: int
) -> list[list[int]]:
    """Stretches of each text, `first` before each, by turns, until `max_tokens` are reached."""
    step = window_tokens - len(first)
    chosen: list[list[int]] = []
    left = max_tokens
    for start in range(0, max(map(len, texts), default=0), step):
        for ids in texts:
            stretch = ids[start : start + min(step, left)]
            if len(first) + len(stretch) >= _MIN_WINDOW_TOKENS:
                chosen.append(first + stretch)
                left -= len(stretch)
            if left < _MIN_WINDOW_TOKENS:
                return chosen
    return chosen


@dataclass
class LogitFigures:
    """Sums over all positions of all windows; KL(reference || file) and losses in nats."""

    kl: list[npt.NDArray[np.float64]] = field(default_factory=list)
    kl_first: list[float] = field(default_factory=list)  # at position 0, where attention is idle
    num_top1: int = 0
    num_tokens: int = 0
    num_predicted: int = 0
    loss_reference: float = 0.0
    loss: float = 0.0
    max_abs_logit: float = 0.0
    largest_logit: float = 0.0
    entropy_share: float = 0.0  # sum over positions, in parts of a uniform distribution's

    def add(self, ids: list[int], reference: npt.NDArray, found: npt.NDArray) -> None:
        """Count one window: both logits are (n, vocab)."""
        targets = np.asarray(ids[1:])
        parts = []
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            parts.append(self._add_rows(reference[rows], found[rows], targets[rows]))
        kl = np.concatenate(parts)
        self.kl.append(kl)
        self.kl_first.append(float(kl[0]))
        self.num_tokens += len(ids)
        self.num_predicted += len(targets)

    def _add_rows(
        self, reference: npt.NDArray, found: npt.NDArray, targets: npt.NDArray
    ) -> npt.NDArray[np.float64]:
        self.num_top1 += int((reference.argmax(1) == found.argmax(1)).sum())
        # np.maximum, because max() would hide a NaN
        self.max_abs_logit = float(np.maximum(self.max_abs_logit, np.abs(reference - found).max()))
        self.largest_logit = float(np.maximum(self.largest_logit, np.abs(reference).max()))
        log_p, log_q = _log_softmax(reference), _log_softmax(found)
        at = (np.arange(len(targets)), targets)
        self.loss_reference -= float(log_p[at].sum())
        self.loss -= float(log_q[at].sum())
        p = np.exp(log_p)
        self.entropy_share -= float((p * log_p).sum()) / math.log(log_p.shape[1])
        return (p * (log_p - log_q)).sum(1)

    @property
    def kl_mean(self) -> float:
        return float(np.concatenate(self.kl).mean())

    @property
    def kl_p99(self) -> float:
        return float(np.quantile(np.concatenate(self.kl), 0.99))

    @property
    def kl_first_mean(self) -> float:
        return float(np.mean(self.kl_first))

    @property
    def uniformity(self) -> float:
        """The reference's mean entropy in parts of that of guessing: 1 knows nothing."""
        return self.entropy_share / self.num_tokens

    @property
    def top1(self) -> float:
        return self.num_top1 / self.num_tokens

    @property
    def ppl_reference(self) -> float:
        return _perplexity(self.loss_reference / self.num_predicted)

    @property
    def ppl(self) -> float:
        return _perplexity(self.loss / self.num_predicted)


def _log_softmax(logits: npt.NDArray) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def _perplexity(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)  # exp overflows beyond 709
