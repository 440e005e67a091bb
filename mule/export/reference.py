"""Our decoder as the reference that an exported file is compared with."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from mule.adapters.source import Source, load_source
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


class SourceReference:
    """A named model as `verify.Reference`, read when it first computes: damaged files need none."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.source.tokenizer_dir)

    @cached_property
    def _loaded(self) -> TorchReference:
        return TorchReference(*load_source(self.source))

    def logits(self, ids: list[int]) -> npt.NDArray[np.float32]:
        """Logits (n, vocab) after each of `ids`."""
        return self._loaded.logits(ids)

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        """The most probable continuation, without the stop token."""
        return self._loaded.greedy(ids, max_tokens)
