"""The merged weights, written shard by shard: one tensor in memory at a time.

What the adapter does not touch is copied byte for byte, unless another type is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mule import fsio, progress
from mule.adapters.delta import Delta
from mule.errors import ModelError
from mule.export.merge_forms import Values
from mule.models.folder import weight_files
from mule.models.streamed import TORCH_DTYPES, read_tensor, tensor_bytes
from mule.models.tensor_file import StoredTensor, read_chunks, stored_tensors, write_tensor_file

DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_INDEX = "model.safetensors.index.json"
Placed = tuple[Path, StoredTensor]  # the base's file, and the tensor as it is written


@dataclass(frozen=True)
class MergePlan:
    """What is written: each file of the base with its tensors, in their types of the output.

    `dtype` is set where one was asked for. Files are cut as the base's are, or with `shard_bytes`
    into ones of at most that size (a larger tensor has its own).
    """

    base: Path
    files: Mapping[Path, list[StoredTensor]]
    deltas: Mapping[str, Delta]
    values: Values | None = None
    dtype: str | None = None
    shard_bytes: int | None = None

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensors in self.files.values() for tensor in tensors)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of every weight of the output."""
        return {t.name: TORCH_DTYPES[t.dtype] for tensors in self.files.values() for t in tensors}

    def outputs(self) -> dict[str, list[Placed]]:
        """The files of the output by name, each with its tensors and where they come from."""
        placed = [(file, t) for file, tensors in self.files.items() for t in tensors]
        if self.shard_bytes is None:
            names = (file.name for file in self.files)
            return {name: [(f, t) for f, t in placed if f.name == name] for name in names}
        shards: list[list[Placed]] = [[]]
        room = self.shard_bytes
        for file, tensor in placed:
            if tensor.num_bytes > room and shards[-1]:
                shards.append([])
                room = self.shard_bytes
            shards[-1].append((file, tensor))
            room -= tensor.num_bytes
        return dict(zip(shard_names(len(shards)), shards, strict=True))


def shard_names(count: int) -> list[str]:
    """What transformers calls the weight files of a model that is cut into so many."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def plan_merge(
    base: Path,
    deltas: Mapping[str, Delta],
    *,
    tied: bool,
    dtype: str | None = None,
    values: Values | None = None,
    shard_bytes: int | None = None,
) -> MergePlan:
    """Decide every tensor of the output from the headers of the base's files.

    `tied` leaves out a copy of the head. `dtype` is a key of DTYPES, None for the base's own types.
    Raises ModelError, naming the tensor, when the adapter does not fit the base.
    """
    files: dict[Path, list[StoredTensor]] = {}
    for file in weight_files(base):
        stored = [t for t in stored_tensors(file) if not (tied and t.name == "lm_head.weight")]
        files[file] = [_in_dtype(tensor, dtype, file) for tensor in stored]
    _check_fit(base, {t.name: t.shape for tensors in files.values() for t in tensors}, deltas)
    stored = None if dtype is None else DTYPES[dtype]
    return MergePlan(base, files, deltas, values, stored, shard_bytes)


def _in_dtype(tensor: StoredTensor, dtype: str | None, file: Path) -> StoredTensor:
    if tensor.dtype not in TORCH_DTYPES:
        raise ModelError(
            f"{file}: {tensor.name} is stored as {tensor.dtype}, which no adapter can be merged into",
            "give the base in bf16, fp16 or fp32, as it was before it was quantised",
        )
    return tensor if dtype is None else replace(tensor, dtype=DTYPES[dtype])


def _check_fit(
    base: Path, shapes: Mapping[str, tuple[int, ...]], deltas: Mapping[str, Delta]
) -> None:
    hint = "give the base model that this adapter was trained on: --base FOLDER"
    for name, delta in deltas.items():
        if name not in shapes:
            raise ModelError(f"the adapter changes {name}, which {base} does not have", hint)
        if delta.shape != shapes[name]:
            raise ModelError(
                f"the adapter changes {name} of shape {delta.shape}; in {base} it has shape "
                f"{shapes[name]}",
                hint,
            )


def write_merged(plan: MergePlan, out: Path) -> None:
    """Write the merged weights, and the index of several files, into an open folder.

    Raises ModelError naming the first tensor that holds NaN or infinite values.
    """
    outputs = plan.outputs()
    with progress.task("Writing the weights", total=plan.num_bytes, unit="B") as bar:
        for name, placed in outputs.items():
            _write_file(plan, placed, out / name, bar)
    _write_index(plan, outputs, out)


def _write_index(plan: MergePlan, outputs: Mapping[str, list[Placed]], out: Path) -> None:
    names = {tensor.name: file for file, placed in outputs.items() for _, tensor in placed}
    index = plan.base / _INDEX
    found: dict[str, Any] = {"weight_map": names}
    if plan.shard_bytes is None:
        if not index.is_file():
            return
        found = fsio.read_json(index)
        found["weight_map"] = {name: f for name, f in found["weight_map"].items() if name in names}
    elif len(outputs) == 1:
        return
    found["metadata"] = {**found.get("metadata", {}), "total_size": plan.num_bytes}
    (out / _INDEX).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _write_file(plan: MergePlan, placed: Sequence[Placed], out: Path, bar: progress.Task) -> None:
    files = {tensor.name: file for file, tensor in placed}
    stored = {t.name: t for file in dict.fromkeys(files.values()) for t in stored_tensors(file)}
    with contextlib.ExitStack() as opened:
        descriptors = {}
        for file in dict.fromkeys(files.values()):
            descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, descriptors[file])

        def chunks(tensor: StoredTensor) -> Iterator[bytes | memoryview]:
            descriptor = descriptors[files[tensor.name]]
            same_type = tensor.dtype == stored[tensor.name].dtype
            if same_type and tensor.name not in plan.deltas and plan.values is None:
                yield from read_chunks(descriptor, stored[tensor.name])
            else:
                weight = read_tensor(descriptor, stored[tensor.name])
                yield tensor_bytes(_merged(plan, tensor, weight).contiguous())
            bar.advance(tensor.num_bytes)

        write_tensor_file(out, [tensor for _, tensor in placed], chunks)


@torch.no_grad()
def _merged(plan: MergePlan, tensor: StoredTensor, weight: torch.Tensor) -> torch.Tensor:
    """The new values of `weight` in the type of the output, computed in fp32."""
    if plan.values is not None:
        weight = plan.values(tensor.name, weight)
    if tensor.name in plan.deltas:
        weight = plan.deltas[tensor.name].merged(weight)
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{tensor.name} holds NaN or infinite values when the adapter is in it",
                "use an earlier checkpoint of its run, or train it again at a lower rate",
            )
    narrow = weight.to(TORCH_DTYPES[tensor.dtype])
    if not torch.isfinite(narrow).all():
        raise ModelError(
            f"{tensor.name} holds values up to {float(weight.abs().max()):.3g}, beyond what "
            f"{tensor.dtype} can hold",
            "keep its range: --dtype bf16 or fp32",
        )
    return narrow
