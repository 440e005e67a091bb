"""A module of the user's in the place of a decoder, as training and its evaluations call one.

Of its architecture nothing is known but that ids (B, T) give logits (B, T, V). Its code is loaded in
mule/lab/own_module.py, and only when it was named on the command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from mule import fsio
from mule.batch import IGNORE, Batch
from mule.errors import ModelError, UserError
from mule.models.config import ModelConfig, Routing
from mule.models.decoder import Decoder
from mule.models.folder import save_weights
from mule.models.loadable import MODULE
from mule.models.loss import (
    compiled_softmax_nll_,
    nll_of_logits,
    nll_sum_of_logits,
    softmax_nll_by_rows_,
)
from mule.models.recompute import Recompute
from mule.models.vector_math import settle_vector_math

Call = Callable[[nn.Module, torch.Tensor], torch.Tensor]  # the module and ids (B, T) to logits


@dataclass(frozen=True)
class ModuleSource:
    """Where a module's code is: what a checkpoint's module.json says of it."""

    file: str  # as it was named
    name: str  # of the class
    settings: dict[str, Any]
    files: dict[str, str] = field(
        default_factory=dict
    )  # SHA-256 of the file, and of those beside it

    @property
    def told(self) -> str:
        return f"{self.file}:{self.name}"

    def differing(self, files: dict[str, str]) -> list[str]:
        """The files that have another content now, or are gone."""
        return sorted(
            name for name in {*self.files, *files} if files.get(name) != self.files.get(name)
        )


class OwnModel(Decoder):
    """The user's module under the names that it gives its weights itself.

    Its weights stay in fp32: with those in half precision, layers and buffers that others wrote for
    autocast fail. What is computed in `autocast_dtype` is for autocast to say.
    """

    autocast_dtype: torch.dtype | None = None  # bf16 or fp16; None computes in fp32

    def __init__(
        self, module: nn.Module, call: Call, config: ModelConfig, source: ModuleSource
    ) -> None:
        """`config` has the vocabulary and the context; its other sizes serve to plan memory."""
        nn.Module.__init__(self)
        settle_vector_math()
        self.config, self.module, self.source = config, module, source
        self._call = call
        self._softmax_nll: Callable[..., torch.Tensor] = softmax_nll_by_rows_
        for one in module.modules():
            if isinstance(one, nn.Embedding):
                one.weight.is_embedding = True  # type: ignore[attr-defined]  # for `decays`

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return next(self.module.parameters()).device

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By the module's own names; what is tied once."""
        return self.module.named_parameters(*args, **kwargs)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V)."""
        if self.autocast_dtype is None:
            return self._call(self.module, input_ids)
        with torch.autocast(input_ids.device.type, self.autocast_dtype):
            return self._call(self.module, input_ids)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Let products be computed in `dtype`."""
        self.autocast_dtype = None if dtype == torch.float32 else dtype

    def nll_sum(self, batch: Batch, grad_scale: float = 1.0) -> torch.Tensor:
        """As `Decoder.nll_sum`, over rows whose documents are not kept apart."""
        logits = self(batch.input_ids)
        return nll_sum_of_logits(logits, batch.targets, self._softmax_nll, grad_scale)

    def nll_by_label(
        self, batch: Batch, labels: torch.Tensor, chosen: Sequence[int]
    ) -> dict[int, torch.Tensor]:
        """As `Decoder.nll_by_label`."""
        logits, sums = self(batch.input_ids), {}
        for label in chosen:
            targets = batch.targets.where(labels == label, IGNORE)
            sums[label] = nll_sum_of_logits(logits, targets, softmax_nll_by_rows_)
        return sums

    def nll_of_targets(self, batch: Batch) -> torch.Tensor:
        """As `Decoder.nll_of_targets`."""
        return nll_of_logits(self(batch.input_ids), batch.targets)

    def logits_at(self, input_ids: torch.Tensor, place: int) -> torch.Tensor:
        """As `Decoder.logits_at`."""
        return self(input_ids)[:, place]

    def new_cache(self, batch_size: int, capacity: int) -> NoReturn:
        """ModelError: nobody knows what the module keeps of a text."""
        raise ModelError(
            f"{self.source.told}: a module of your own has no cache that Mule knows, so Mule does not "
            "generate with it",
            "remove evaluate.prompts, or generate in your own code",
        )

    def set_training(
        self,
        *,
        dropout: float = 0.0,
        recompute: Recompute = "none",
        routing: Routing | None = None,
    ) -> None:
        """Nothing: dropout, recomputation and the balance of experts are the module's own."""

    def compile_regions(self) -> None:
        """Compile the whole module and the loss kernel, in place."""
        self.module.compile(dynamic=False)
        self._softmax_nll = compiled_softmax_nll_()

    # ------------------------------------------------------------ files

    def kept_buffers(self) -> dict[str, torch.Tensor]:
        """The buffers that the module's state dict has, by their names in it.

        Several processes have those of the first, as DistributedDataParallel's broadcast_buffers.
        """
        own = self.module.state_dict(keep_vars=True)
        return {name: own[name] for name, _ in self.module.named_buffers() if name in own}

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Write weights and buffers as safetensors, and module.json, into an open folder.

        A weight that has several names is written under the first of them.
        """
        names = [name for name, _ in self.named_parameters()]
        state = {name: weights[name] for name in names}
        buffers = {name: one.detach().cpu().clone() for name, one in self.kept_buffers().items()}
        save_weights(state | buffers, folder)
        fsio.write_json(folder / MODULE, asdict(self.source))

    def check_same(self, folder: Path) -> None:
        """UserError where a checkpoint was written by other code than this module's."""
        written = ModuleSource(**fsio.read_json(folder / MODULE))
        if changed := written.differing(self.source.files):
            raise UserError(
                f"{folder}: {', '.join(changed)} changed since this checkpoint was written",
                "bring the old one back; or remove the run's folder, to train it anew with the file as "
                "it is",
            )


@contextlib.contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """A block after which the model's buffers are as they were, for passes that count for nothing."""
    before = [(one, one.clone()) for one in model.buffers()]
    try:
        yield
    finally:
        for one, value in before:
            one.copy_(value)


def planned_as(module: nn.Module, vocab_size: int, max_seq_length: int) -> ModelConfig:
    """A shape of about the module's size and width, with which memory and time are planned."""
    sizes = [one for one in module.modules() if isinstance(one, nn.Embedding)]
    width = max(
        (one.embedding_dim for one in sizes if one.num_embeddings >= vocab_size), default=64
    )
    total = sum(one.numel() for one in module.parameters())
    return ModelConfig(
        family="module of your own",
        vocab_size=vocab_size,
        hidden_size=width,
        num_layers=max(1, round((total - vocab_size * width) / (12 * width**2))),
        num_heads=1,
        num_kv_heads=1,
        head_dim=width + width % 2,
        intermediate_size=4 * width,
        max_position_embeddings=max_seq_length,
    )
