"""Loss on held-out rows: of all, of each source and of each category."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mule import progress
from mule.batch import IGNORE
from mule.data.labels import Label
from mule.data.loader import Labelled
from mule.models.decoder import Decoder
from mule.models.eager import uncompiled


@dataclass(frozen=True)
class HeldOutLoss:
    """Of each label: the negative log-likelihood in nats, and the number of target tokens."""

    nll: Sequence[float]
    counts: Sequence[int]

    @property
    def num_targets(self) -> int:
        return sum(self.counts)

    @property
    def loss(self) -> float:
        """The mean over all target tokens."""
        return sum(self.nll) / max(self.num_targets, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # above, a float overflows

    @property
    def bits(self) -> float:
        """Of all targets together."""
        return sum(self.nll) / math.log(2)

    def by_source(self, labels: Sequence[Label]) -> dict[str, HeldOutLoss]:
        """That of each source; empty where there are not several."""
        return self._by([label.source for label in labels])

    def by_category(self, labels: Sequence[Label]) -> dict[str, HeldOutLoss]:
        """That of each category, as source/category; empty where there are not several."""
        return self._by([f"{s}/{category}" if category else "" for s, category in labels])

    def figures(self, labels: Sequence[Label]) -> dict[str, Any]:
        """As a row of metrics has them."""
        parts = {
            "val_loss_by": self.by_source(labels),
            "val_loss_by_category": self.by_category(labels),
        }
        losses = {
            key: {name: part.loss for name, part in found.items()} for key, found in parts.items()
        }
        several = {key: found for key, found in losses.items() if found}
        return {"val_loss": self.loss, "val_perplexity": self.perplexity, **several}

    def _by(self, names: Sequence[str]) -> dict[str, HeldOutLoss]:
        """That of each name which has targets, in the order of the names."""
        sums: dict[str, HeldOutLoss] = {}
        for name, nll, count in zip(names, self.nll, self.counts, strict=True):
            if name and count:
                before = sums.get(name, HeldOutLoss([], []))
                sums[name] = HeldOutLoss([*before.nll, nll], [*before.counts, count])
        return dict(sorted(sums.items())) if len(sums) > 1 else {}


def counted(batches: Iterable[Labelled], bar: progress.Task) -> Iterator[Labelled]:
    """The batches, each moving the bar by its rows once it is done with."""
    for labelled in batches:
        yield labelled
        bar.advance(len(labelled.labels))


@torch.no_grad()
def held_out_loss(model: Decoder, batches: Iterable[Labelled], num_labels: int) -> HeldOutLoss:
    """The sums over all batches; dropout is off."""
    device = model.device
    was_training = model.training
    model.eval()
    total = torch.zeros(num_labels, device=device)
    counts = torch.zeros(num_labels, dtype=torch.int64)
    with uncompiled():  # a second graph costs more than it saves here
        for batch, labels in batches:
            found = labels[batch.targets != IGNORE].bincount(minlength=num_labels)
            present = found.nonzero().flatten().tolist()
            sums = model.nll_by_label(batch.to(device), labels.to(device), present)
            for label, nll in sums.items():
                total[label] += nll
            counts += found
    model.train(was_training)
    return HeldOutLoss(total.tolist(), counts.tolist())
