"""Near-duplicates among conversations: only where the answers are alike too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mule.data.clean.compare import TrainingItem, answer_text
from mule.data.clean.near import jaccard
from mule.data.clean.shingles import Shingler

_MOST_COMPARED = 50  # different answers a member is compared with: time stays linear


def with_like_answers(
    items: Sequence[TrainingItem], groups: Sequence[Sequence[int]], threshold: float
) -> list[list[int]]:
    """`groups` of near-duplicates, divided so that each answer is like that of the first member.

    Many questions on one long passage look alike as a whole and teach different things: they are
    no duplicates. Alike: the sets of words have a Jaccard index of at least `threshold`. Documents
    have no answers, and their groups stay. Parts of one member are left out.
    """
    words = Shingler(1, symbols=True)
    return [part for group in groups for part in _parts(items, group, threshold, words) if part[1:]]


def _parts(
    items: Sequence[TrainingItem], group: Sequence[int], threshold: float, words: Shingler
) -> list[list[int]]:
    answers = [answer_text(items[number]) for number in group]
    if None in answers:
        return [list(group)]
    parts: list[list[int]] = []
    firsts: list[np.ndarray] = []
    for number, answer in zip(group, words.sets([answer or "" for answer in answers])):
        like = (n for n, first in enumerate(firsts) if jaccard(first, answer) >= threshold)
        place = next(like, None)
        if place is not None:
            parts[place].append(number)
        else:
            parts.append([number])
            firsts += [answer] if len(firsts) < _MOST_COMPARED else []
    return parts
