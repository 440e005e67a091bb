"""Our decoder as the reference that an exported file is compared with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from mule.generate.engine import greedy_answers
from mule.models.decoder import Decoder
from mule.tokenizer import Tokenizer


class TorchReference:
    """A decoder in fp32 and its tokenizer; satisfies `verify.Reference`."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        self.model = model.float().eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (n, vocab) after each of `ids`."""
        return self.model(torch.tensor([ids]))[0].numpy()

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """The most probable continuation, without the stop token."""
        return greedy_answers(
            self.model,
            [ids],
            max_tokens=max_tokens,
            stop_ids=self.tokenizer.stop_ids,
            vocab_size=self.tokenizer.vocab_size,
        )[0]
