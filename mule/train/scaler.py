"""The loss scale of fp16: gradients too small for it are computed larger, and divided afterwards.

fp16 ends at 6e-8 and 65,504, and much of a gradient is smaller. Source: Micikevicius et al. 2018,
section 3.2. Differs: the scale starts at 2**16 and adapts itself, as in PyTorch's GradScaler.
"""

from __future__ import annotations

_START = 2.0**16
_LEAST = 1.0  # a gradient beyond fp16 without any scaling is broken, not scaled too much
_GROW_EVERY = 2000  # updates without an overflow


class LossScaler:
    """The loss scale and its history; every process of a run comes to the same one.

    All factors are powers of two, so that scaling and its undoing change no bit of a number that
    fp16 can hold.
    """

    def __init__(self, update_tokens: int) -> None:
        """`update_tokens`: the tokens of an update, its padding included."""
        self.scale = _START  # of the mean loss
        self.num_overflows = 0
        self._num_good = 0  # updates since the scale changed
        # What is computed is the gradient of the sum over the targets. How many there are is known
        # to all processes only afterwards; this bound is known to all of them before.
        self._targets = 2.0 ** (update_tokens - 1).bit_length()

    @property
    def factor(self) -> float:
        """By what the gradient of the summed loss is multiplied before it is rounded to fp16."""
        return self.scale / self._targets

    @property
    def is_lowest(self) -> bool:
        """Whether the scale cannot be what makes a gradient overflow."""
        return self.scale <= _LEAST

    def applied(self) -> None:
        """An update was applied: after many of them a larger scale is tried."""
        self._num_good += 1
        if self._num_good == _GROW_EVERY:
            self.scale, self._num_good = self.scale * 2, 0

    def overflowed(self) -> None:
        """An update was skipped for an overflow: the next one is computed with half the scale."""
        self.scale, self._num_good = self.scale / 2, 0
        self.num_overflows += 1

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "scale": self.scale,
            "num_good": self._num_good,
            "num_overflows": self.num_overflows,
        }

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's `state`."""
        self.scale = state["scale"]
        self._num_good, self.num_overflows = int(state["num_good"]), int(state["num_overflows"])
