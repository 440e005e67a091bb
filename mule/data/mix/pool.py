"""The items of a mix, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mule.data.clean.answers import with_like_answers
from mule.data.clean.compare import TrainingItem, said_text, whole_text
from mule.data.clean.contamination import Evaluation
from mule.data.clean.exact import duplicates
from mule.data.clean.near import near_duplicates
from mule.data.mix.sources import Read, Source

REASONS = ("duplicate", "near-duplicate", "contaminated", "cap", "weight", "limit")
_MOST_EXAMPLES = 5  # shown of each reason


@dataclass
class Pool:
    """`fate` is the reason an item was left out, or ""; `examples` show where and why.

    `similar` are the groups of near-duplicates found, taken out or not.
    """

    sources: list[Source]
    items: list[TrainingItem]
    source_of: list[int]
    is_valid: list[bool]
    fate: list[str]
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    similar: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, sources: list[Source], read: Read) -> Pool:
        fate = [""] * len(read.items)
        return cls(sources, read.items, read.source_of, read.is_valid, fate)

    # ------------------------------------------------------------ taking out

    def remove_duplicates(self) -> None:
        """Of equal items the first stays, one for validation before all others."""
        self._remove_groups(duplicates(map(whole_text, self.items)), "duplicate")

    def remove_near_duplicates(self, threshold: float, seed: int) -> None:
        """Of similar items the first stays, and whatever was given for validation.

        Of conversations the answers must be similar too, unless one was given for validation.
        """
        self.similar = self.find_similar(threshold, seed)
        known = [group for group in self.similar if any(self.is_valid[n] for n in group)]
        others = [group for group in self.similar if not any(self.is_valid[n] for n in group)]
        others = with_like_answers(self.items, others, threshold)
        self._remove_groups(sorted(known + others), "near-duplicate")

    def find_similar(self, threshold: float, seed: int) -> list[list[int]]:
        """Groups of near-duplicates among the items that are left."""
        numbers = [number for number, fate in enumerate(self.fate) if not fate]
        texts = [said_text(self.items[number]) for number in numbers]
        groups = near_duplicates(texts, threshold=threshold, seed=seed)
        return [[numbers[place] for place in group] for group in groups]

    def decontaminate(self, evaluation: Evaluation) -> None:
        """Training items that share a passage with an evaluation set go."""
        numbers = self.kept_for_training()
        for leak in evaluation.leaks([self.items[number] for number in numbers]):
            number = numbers[leak.index]
            self._remove(number, "contaminated", place_of(leak.evaluation), leak.shared)

    def leave_out(self, number: int, reason: str) -> None:
        self.fate[number] = reason

    def _remove_groups(self, groups: Sequence[Sequence[int]], reason: str) -> None:
        for group in groups:
            kept = next((number for number in group if self.is_valid[number]), group[0])
            for number in group:
                stays = reason == "near-duplicate" and self.is_valid[number]
                if number != kept and not stays:
                    self._remove(number, reason, place_of(self.items[kept]), "")

    def _remove(self, number: int, reason: str, because: str, shared: str) -> None:
        self.fate[number] = reason
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _MOST_EXAMPLES:
            item = self.items[number]
            shown = shared or " ".join(said_text(item).split())
            examples.append({"removed": place_of(item), "because": because, "text": shown[:160]})

    # ------------------------------------------------------------ what is left

    def kept_for_training(self) -> list[int]:
        """The items that are neither left out nor given for validation."""
        return [n for n, fate in enumerate(self.fate) if not fate and not self.is_valid[n]]

    def kept_for_validation(self) -> list[int]:
        return [n for n, fate in enumerate(self.fate) if not fate and self.is_valid[n]]

    def counts(self, number: int) -> dict[str, Any]:
        """How many items of a source were read, and how many fell out for each reason."""
        fates = [fate for fate, source in zip(self.fate, self.source_of) if source == number]
        by_reason = Counter(fates)
        return {"read": len(fates), **{reason: by_reason[reason] for reason in REASONS}}


def place_of(item: TrainingItem) -> str:
    return f"{item.file}:{item.line}"
