"""A GGUF file's weights in our own decoder: what stands in where llama.cpp is not installed.

The entries of the file are not used, so this says nothing about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mule.errors import ModelError
from mule.export.layout import from_llama_cpp
from mule.export.origin import Original
from mule.export.reference import TorchReference
from mule.export.stored import StoredTensors
from mule.models.decoder import Decoder, empty_decoder
from mule.models.folder import read_config
from mule.tokenizer import Tokenizer


class DequantizedModel:
    """The file as `verify` runs it: logits and greedy answers of its weights, in fp32.

    Raises ModelError when a tensor is missing or of another shape than the model's.
    """

    bos_id: int | None = None
    add_bos = False
    reason = ""
    stop_id: int | None = None

    def __init__(self, stored: StoredTensors, original: Original) -> None:
        tokenizer = Tokenizer.load(original.tokenizer_dir)
        self._model = TorchReference(_decoder(stored, original), tokenizer)
        self.num_tokens = self._model.model.config.vocab_size

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits (n, vocab) after each of `ids`."""
        return self._model.logits(list(ids))

    def generate(self, ids: Sequence[int], *, max_tokens: int) -> Iterator[int]:
        """The greedy answer, without its stop token; `reason` and `stop_id` tell how it ended."""
        answer = self._model.greedy(list(ids), max_tokens)
        self.reason = "length" if len(answer) == max_tokens else "stop"
        used = self._model.tokenizer.vocab_size
        self.stop_id = int(self.logits([*ids, *answer])[-1, :used].argmax())
        yield from answer


@torch.no_grad()
def _decoder(stored: StoredTensors, original: Original) -> Decoder:
    model = empty_decoder(read_config(original.model_dir), torch.float32)
    names: dict[str, str] = {}
    for name, source in original.named.items():
        if name in stored.infos:
            names.setdefault(source, name)
    for source, parameter in model.named_parameters():
        if source not in names:
            raise ModelError(f"the file has no tensor for {source}", "export the model again")
        values = stored.values(names[source])
        if values.shape != tuple(parameter.shape):
            raise ModelError(
                f"{names[source]} has shape {values.shape}, {source} {tuple(parameter.shape)}",
                "export the model again",
            )
        values = from_llama_cpp(original.family, original.shape, source, values)
        parameter.copy_(torch.from_numpy(values))
    return model
