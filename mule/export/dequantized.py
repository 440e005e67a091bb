"""A GGUF file's weights in our own decoder: what stands in where llama.cpp is not installed.

The entries of the file are not used, so this says nothing about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from mule.errors import ModelError
from mule.export.layout import as_rows, from_llama_cpp, scattered
from mule.export.origin import Original
from mule.export.reference import TorchReference
from mule.export.stored import StoredTensors
from mule.models.decoder import Decoder, empty_decoder
from mule.models.folder import read_config
from mule.models.stored import Names
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
    config = read_config(original.model_dir)
    model, names = empty_decoder(config, torch.float32), Names(config)
    parameters = dict(model.named_parameters())
    missing = {parameter: tensor.numel() for parameter, tensor in parameters.items()}
    for name, tensor in original.planned.items():
        headed = name == "output.weight" and config.tie_embeddings
        if name not in stored.infos or headed or not tensor.parts:
            continue
        values = stored.values(name)
        if values.shape != tensor.shape:
            raise ModelError(
                f"{name} has shape {values.shape}, the model's is {tensor.shape}",
                "export the model again",
            )
        if len(tensor.parts) == 1:
            source = tensor.source
            values = from_llama_cpp(original.family, original.shape, source, values)
        for part, rows in scattered(tensor.parts, values):
            place = names.place(part.source)
            if place.name in parameters:  # a layer that only the file needs has none
                found = place.of(parameters[place.name])
                found = as_rows(found)[part.first : part.first + part.count]
                found.copy_(torch.from_numpy(rows))
                missing[place.name] -= found.numel()
    for name in (name for name, count in missing.items() if count):
        raise ModelError(f"the file has no tensor for {name}", "export the model again")
    return model
