"""Runs of too few updates: the same tokens in smaller batches would teach more."""

from __future__ import annotations

FEWEST_UPDATES = 1_000
_LARGEST = 2**19


def starved(tokens: int, step_tokens: int, active_params: int) -> str | None:
    """What is wrong where `tokens` in updates of `step_tokens` are fewer than 1,000 updates, or None.

    Two rules say which size of an update suits: nanochat's for the tokens of the run,
    2^19 (D / 1.3e9)^0.383, and OLMo-core's for the model, 160 * 2048 (N / 108e6)^(2/3).
    """
    updates = tokens // step_tokens
    if updates >= FEWEST_UPDATES:
        return None
    by_tokens = _LARGEST * (tokens / 1.3e9) ** 0.383
    by_params = 160 * 2048 * (active_params / 108e6) ** (2 / 3)
    better = _power_of_two(min(by_tokens, by_params, step_tokens / 2))
    return (
        f"{tokens:,} tokens in updates of {step_tokens:,} are {updates:,} updates, few to learn in. "
        f"nanochat's rule for so many tokens is {by_tokens:,.0f} an update, OLMo-core's for this size "
        f"{by_params:,.0f}; try train.step_tokens={better} ({tokens // better:,} updates), with a "
        "learning rate of its own, or train on more tokens"
    )


def _power_of_two(size: float) -> int:
    """The power of two at or below `size`, at least 1."""
    return 1 << max(0, int(size).bit_length() - 1)
