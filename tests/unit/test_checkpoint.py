"""A checkpoint that lacks something is not taken for whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mule.errors import StorageError
from mule.train.checkpoint import copy_into


def test_every_tensor_is_filled_from_some_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for number, file in enumerate(files):
        save_file({f"w{number}": torch.full((3,), float(number + 1))}, file)
    targets = {"w0": torch.zeros(3), "w1": torch.zeros(3)}
    copy_into(targets, *files)
    assert targets["w0"].tolist() == [1.0] * 3 and targets["w1"].tolist() == [2.0] * 3


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"w0": torch.ones(3)}, file)
    with pytest.raises(StorageError) as caught:
        copy_into({"w0": torch.zeros(3), "exp_avg.w0": torch.zeros(3)}, file)
    assert caught.value.message == f"{tmp_path}: no file holds exp_avg.w0"
    assert caught.value.hint == "take an older checkpoint: remove this folder, and resume"
