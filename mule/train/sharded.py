"""Training with the state divided among processes: FSDP2, its optimizer and its parts on the disk.

Each process keeps a share of every parameter, in fp32, with the moments of that share. A block's
weights are gathered, in the working precision, when it computes, and given up afterwards; gradients
are summed in fp32, and each process gets the sum of its share. So all of them pass through the
model together, with equal numbers of batches. Sources: Zhao et al. 2023 (PyTorch FSDP), section 3;
Rajbhandari et al. 2020 (ZeRO), section 5. Hybrid: shares within a machine, copies between machines.

A checkpoint holds whole weights in `model.safetensors`, as any other, gathered tensor by tensor on
the CPU of the first process: it opens anywhere and at any number of processes. The moments, two
thirds of the state, which only a resumed run reads, are written by all processes at once, each its
share, through PyTorch's distributed checkpoint in its safetensors form (no pickle).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from mule import fsio
from mule.config.schema import OptimSection
from mule.errors import StorageError
from mule.models.decoder import Decoder
from mule.train.distributed import Group
from mule.train.flat import Flat
from mule.train.optim import Optimizer, decays
from mule.train.rules import AdamW, Muon, Rule, matrices

# Of the decoder, beside `forward`: what uses weights.
_FORWARD_METHODS = ("nll_sum", "nll_by_label", "step", "new_cache")


def shard(model: Decoder, dtype: torch.dtype, device: str, group: Group, *, hybrid: bool) -> None:
    """Divide the model's parameters among the processes, in place; each keeps its share on `device`.

    `dtype` is the working precision. The model comes on the CPU, compiled or not: no more than a
    block of it is on the device as a whole at any time.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the shares are the masters
    shape = (group.num_machines, group.local_size) if hybrid else (group.world_size,)
    names = ("copies", "shares") if hybrid else ("shares",)
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    # Inputs are not cast: the angles of RoPE stay fp32, as in one process.
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for module in (*model.model.layers, model):
        # The outermost too is divided again after a forward pass, so that weights which are changed
        # between two of them (a checkpoint, the moving average) are gathered anew.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # sums: the step divides by the number of targets
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    for name in _FORWARD_METHODS:
        register_fsdp_forward_method(model, name)


class _Share(Flat):
    """This process's share of one parameter, where FSDP keeps it: its own master."""

    def __init__(self, name: str, parameter: DTensor, *, averaged: bool) -> None:
        self.parameter = parameter
        local = parameter.to_local().detach()
        self.spans = {name: (0, local.shape)}
        self.master = self.weight = local.view(-1)
        self.average = self.master.clone() if averaged else None

    def whole(self, flat: torch.Tensor) -> DTensor:
        """A buffer of this share as a part of the tensor that all shares make up."""
        of = self.parameter
        (_, shape), *_ = self.spans.values()
        return DTensor.from_local(
            flat.view(shape),
            of.device_mesh,
            of.placements,
            run_check=False,
            shape=of.shape,
            stride=of.stride(),
        )


class _ShardedMuon(Rule):
    """Muon on a share: the momentum is kept in shares, and orthogonalised as a whole.

    Each process does that for every matrix, so that all get what one process would.
    """

    def __post_init__(self) -> None:
        self.buffers["momentum"] = torch.zeros_like(self.flat.master)

    @staticmethod
    def takes(name: str, matrix: torch.Tensor) -> bool:
        return Muon.takes(name, matrix)

    def update(
        self, gradient: torch.Tensor, lr: float, grad_scale: float, num_updates: int
    ) -> None:
        assert isinstance(self.flat, _Share)
        scaled, memory = gradient.mul_(grad_scale), self.optim.momentum
        momentum = self.buffers["momentum"].lerp_(scaled, 1 - memory)
        ahead = self.flat.whole(scaled.lerp(momentum, memory)).full_tensor()
        # A step of length 1 from zero is the orthogonalised momentum, scaled to AdamW's length.
        step, (name,) = torch.zeros_like(ahead), self.flat.spans
        parts = [nn.Parameter(matrix, requires_grad=False) for matrix in matrices(name, step)]
        for part, direction in zip(parts, matrices(name, ahead), strict=True):
            part.grad = direction
        muon = torch.optim.Muon(
            parts, 1.0, 0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
        )
        muon.step()
        own = share_like(step, self.flat.parameter).to_local()
        self.flat.master.mul_(1 - lr * self.weight_decay).add_(own.reshape(-1), alpha=lr)


class ShardedOptimizer(Optimizer):
    """The optimizer of a sharded model: every rule works on this process's share of a parameter.

    Weights, averages and moments are told as DTensors: the names and shapes are those of the whole.
    """

    def __init__(self, model: Decoder, optim: OptimSection, *, compiled: bool = False) -> None:
        self.num_updates = 0
        self._ema_decay = optim.ema_decay
        self._norm = torch.zeros(())
        self._rules: list[Rule] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert isinstance(parameter, DTensor)
            share = _Share(name, parameter, averaged=optim.ema_decay is not None)
            decay = optim.weight_decay if decays(name, parameter) else 0.0
            by_muon = optim.kind == "muon" and decays(name, parameter)
            kind = _ShardedMuon if by_muon and Muon.takes(name, parameter) else AdamW
            self._rules.append(kind(share, optim, decay, compiled=compiled))
        self._mesh: DeviceMesh = self._shares()[0].parameter.device_mesh

    def accumulate(self) -> None:
        """Nothing: the backward pass has added the micro-batch to the fp32 sums of all processes."""

    def sum_over(self, group: Group, figures: torch.Tensor) -> None:
        """Sum `figures` (n,) fp32 in place over all processes, and the norm of the gradients."""
        squares = sum(
            torch.linalg.vector_norm(self._gradient(share), dtype=torch.float32).square()
            for share in self._shares()
        )
        num_copies = self._mesh.size() // self._mesh["shares"].size()
        message = torch.cat((figures, torch.as_tensor(squares)[None] / num_copies))
        group.sum_(message)
        figures.copy_(message[:-1])
        self._norm = message[-1].sqrt()

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, fp32 scalar, after `sum_over`; the same everywhere."""
        return self._norm

    def zero_grad(self) -> None:
        for share in self._shares():
            share.parameter.grad = None

    def master_weights(self) -> dict[str, torch.Tensor]:
        return {name: share.parameter.detach() for share in self._shares() for name in share.spans}

    def ema_weights(self) -> dict[str, torch.Tensor]:
        return {
            name: share.whole(share.average)
            for share in self._shares()
            if share.average is not None
            for name in share.spans
        }

    def moments(self) -> dict[str, torch.Tensor]:
        moments: dict[str, torch.Tensor] = {
            f"{kind}.{name}": share.whole(buffer)
            for rule, share in zip(self._rules, self._shares(), strict=True)
            for name in share.spans
            for kind, buffer in rule.buffers.items()
        }
        return moments | {f"ema.{name}": tensor for name, tensor in self.ema_weights().items()}

    def refresh_working_weights(self) -> None:
        """Nothing: they are cast from the shares each time they are gathered."""

    def digest(self) -> int:
        """A number (under 2**62) of the whole state; copies of the same shares give the same one."""
        own = torch.tensor(super().digest() % 2**40, device=self._shares()[0].master.device)
        dist.all_reduce(own, group=self._mesh["shares"].get_group())
        return int(own)

    def state_bytes(self) -> int:
        """Memory of masters, moments and averages, of all shares together."""
        return sum(
            share.parameter.numel() * 4 * (1 + len(rule.buffers) + (share.average is not None))
            for rule, share in zip(self._rules, self._shares(), strict=True)
        )

    def _shares(self) -> list[_Share]:
        return [rule.flat for rule in self._rules if isinstance(rule.flat, _Share)]

    def _flats(self) -> Iterator[Flat]:
        return iter(self._shares())

    def _gradient(self, flat: Flat) -> torch.Tensor:
        assert isinstance(flat, _Share)
        gradient = flat.parameter.grad
        assert isinstance(gradient, DTensor)
        return gradient.to_local().view(-1)


def share_like(whole: torch.Tensor, like: torch.Tensor) -> DTensor:
    """The share that this process keeps of `whole`, which every process has; nothing is sent."""
    assert isinstance(like, DTensor)
    where = like.device_mesh, like.placements
    return distribute_tensor(whole.to(like.device), *where, src_data_rank=None)


def gather(named: dict[str, torch.Tensor], group: Group) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of the first process, made from the shares of all; {} elsewhere."""
    found = {}
    for name, tensor in named.items():
        assert isinstance(tensor, DTensor)
        whole = tensor.full_tensor()
        if group.is_first:
            found[name] = whole.cpu()
    return found


def save_shares(named: dict[str, torch.Tensor], folder: Path, group: Group) -> None:
    """Write the shares of all processes into `folder`, which all of them see.

    All call it, and it ends when all have written. StorageError when one of them could not.
    """
    with fsio.explain_storage(folder):
        try:
            writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
            dcp.save(named, storage_writer=writer)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None
        if group.is_first:
            check_whole(named, folder)


def load_shares(named: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill tensors, whole or sharded in any way, from what any number of processes wrote."""
    dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


def check_whole(named: dict[str, torch.Tensor], folder: Path) -> None:
    """StorageError unless every element is in one of the files that this process sees."""
    stored = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name, tensor in named.items():
        chunks = getattr(stored.get(name), "chunks", [])
        if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise StorageError(
                f"{folder}: the parts of {name} that other processes wrote are not all here",
                "the run folder must lie on a disk that all machines share",
            )
