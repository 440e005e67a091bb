"""Memory that runs out: what is recognised, what is said, and the figures of each device."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch

from mule.config.schema import Recipe
from mule.errors import UserError
from mule.plan.killed import killed_in_words
from mule.train.distributed import Group
from mule.train.meter import device_memory, memory_of_all
from mule.train.out_of_memory import explained, free_memory, is_out_of_memory

CPU = torch.device("cpu")


def recipe(**train: object) -> Recipe:
    return Recipe.model_validate(
        {"data": {"train": ["a.txt"], "max_seq_length": 512}, "train": {"steps": 5, **train}}
    )


def training(rows_at_once: int, **train: object) -> AbstractContextManager[None]:
    return explained(recipe(**train), lambda: rows_at_once)


def refuse_to_allocate() -> None:
    torch.empty(1 << 62, dtype=torch.uint8)


def test_what_torch_says_when_it_gets_no_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        refuse_to_allocate()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))
    free_memory()


@pytest.mark.parametrize(
    ("rows", "train", "hint"),
    [
        (
            1,
            {},
            "lower data.max_seq_length (now 512), set train.activation_checkpointing=full, or take "
            "a smaller model",
        ),
        (
            3,
            {"activation_checkpointing": "full"},
            "lower train.micro_batch_rows (now 3) or data.max_seq_length (now 512), or take a "
            "smaller model",
        ),
    ],
)
def test_the_error_says_what_to_lower(rows: int, train: dict[str, object], hint: str) -> None:
    with pytest.raises(UserError, match=r"^out of memory: .*can't allocate memory") as caught:
        with training(rows, **train):
            refuse_to_allocate()
    assert caught.value.hint == hint
    with pytest.raises(UserError, match=r"^out of memory: MemoryError"):
        with training(rows, **train):
            raise MemoryError


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        with training(1):
            raise RuntimeError("size mismatch")


# ---------------------------------------------------------------- memory of each device


def test_a_process_alone_tells_of_its_device() -> None:
    (row,) = memory_of_all(Group(), CPU, 3)
    assert row.keys() == {"device", "peak_resident_bytes", "micro_batch_rows"}
    assert row["device"] == "cpu" and row["micro_batch_rows"] == 3
    assert row["peak_resident_bytes"] > 50 * 2**20  # torch alone is more


def test_every_process_tells_of_its_device() -> None:
    class Second(Group):
        rank, world_size = 1, 3

        def sum_(self, tensor: torch.Tensor) -> None:
            assert not tensor[0].any() and not tensor[2].any()
            tensor[0], tensor[2] = (
                torch.tensor([5.0, 7.0]),
                torch.tensor([2.0**45 + 1, 8.0], dtype=torch.float64),
            )

    rows = memory_of_all(Second(), CPU, 3)
    assert [row["device"] for row in rows] == ["cpu 0", "cpu 1", "cpu 2"]
    assert [row["micro_batch_rows"] for row in rows] == [7, 3, 8]
    assert rows[0]["peak_resident_bytes"] == 5 and rows[2]["peak_resident_bytes"] == 2**45 + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_tells_of_active_allocated_and_reserved_memory() -> None:
    device = torch.device("cuda")
    held = torch.empty(3 << 20, dtype=torch.uint8, device=device)
    found = device_memory(device)
    assert found.keys() == {"peak_active_bytes", "peak_allocated_bytes", "peak_reserved_bytes"}
    assert found["peak_reserved_bytes"] >= found["peak_allocated_bytes"] >= held.numel()


# ---------------------------------------------------------------- a kill


def test_a_kill_is_told_with_the_last_figures() -> None:
    found = killed_in_words({"step": 12, "memory_bytes": 3 * 2**30})
    assert found.startswith(
        "the last attempt ended without a word after update 12: killed, as the "
    )
    assert "it had used 3.0 GiB, and this machine has " in found
    assert found.endswith("; if it was that, lower train.micro_batch_rows")
    assert "before its first update: killed" in killed_in_words({"step": 0})
