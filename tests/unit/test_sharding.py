"""Sharding without processes: what auto decides, what is refused, and parts that are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mule.config.schema import Recipe
from mule.errors import ConfigError, StorageError
from mule.models.config import ModelConfig
from mule.plan.memory import state_bytes
from mule.plan.sharding import check_sharding, choose_sharding
from mule.train.distributed import Group
from mule.train.sharded import check_whole

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=301,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=176,
    max_position_embeddings=128,
    tie_embeddings=True,
)


def recipe(sharding: str = "auto", precision: str = "bf16", kind: str = "adamw") -> Recipe:
    """A recipe with these choices."""
    return Recipe.model_validate(
        {
            "data": {"train": ["text.txt"]},
            "train": {"precision": precision, "sharding": sharding},
            "optim": {"kind": kind},
        }
    )


STATE = sum(state_bytes(CONFIG, recipe(), accumulates=True).values())


@pytest.mark.parametrize(
    ("processes", "of_each_machine", "free", "found"),
    [
        (1, 1, 0, "none"),
        (8, 8, 2 * STATE, "none"),
        (8, 8, 2 * STATE - 2, "full"),
        (16, 8, 2 * STATE / 8, "hybrid"),
        (16, 8, 2 * STATE / 8 - 2, "full"),
        (4, 1, STATE, "full"),
    ],
)
def test_whole_while_it_leaves_room_for_activations(
    processes: int, of_each_machine: int, free: float, found: str
) -> None:
    value, reason = choose_sharding(recipe(), CONFIG, processes, of_each_machine, int(free))
    assert value == found
    assert reason == "one process" if processes == 1 else "GiB of state, room for" in reason


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"kind": "adamw8bit"}, "optim.kind = adamw8bit needs whole tensors"),
        ({"precision": "fp16"}, "train.precision = fp16 needs whole tensors"),
        ({"precision": "fp8"}, "train.precision = fp8 needs whole tensors"),
    ],
)
def test_what_needs_whole_tensors_stays_whole(given: dict[str, Any], why: str) -> None:
    assert choose_sharding(recipe(**given), CONFIG, 8, 8, 0) == ("none", why)
    with pytest.raises(ConfigError, match=r"train\.sharding = full divides tensors, and") as error:
        check_sharding(recipe("full", **given), 8, 8)
    assert "set train.sharding=none, or use bf16 and adamw" in str(error.value)


@pytest.mark.parametrize(
    ("sharding", "processes", "of_each_machine", "says"),
    [
        ("full", 1, 1, "one process only: nothing can be divided\nhint: start several (mule train"),
        ("full", 1, 1, "--launch torchrun:1x2 prints the command), or set train.sharding=none"),
        (
            "hybrid",
            2,
            2,
            "copies to others, but this is one machine\nhint: set train.sharding=full",
        ),
        ("hybrid", 2, 1, "but this is one process a machine"),
    ],
)
def test_what_cannot_take_effect_is_refused(
    sharding: str, processes: int, of_each_machine: int, says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_sharding(recipe(sharding), processes, of_each_machine)
    assert says in str(error.value)


def test_what_can_take_effect_is_not_refused() -> None:
    check_sharding(recipe("hybrid"), 4, 2)
    check_sharding(recipe("full"), 2, 2)
    check_sharding(recipe("none"), 1, 1)


def _groups(world_size: int) -> Iterator[Group]:
    for rank in range(world_size):
        group = Group()
        group.rank, group.world_size = rank, world_size
        yield group


@pytest.mark.parametrize(
    ("count", "size", "world_size"), [(7, 3, 2), (7, 2, 3), (2, 4, 3), (8, 4, 1)]
)
@pytest.mark.parametrize("together", [False, True])
def test_cuts_cover_all_rows_once(count: int, size: int, world_size: int, together: bool) -> None:
    cuts = [group.cuts(count, size, together=together) for group in _groups(world_size)]
    assert [i for own in cuts for cut in own for i in cut] == list(range(count))
    assert all(len(cut) <= size for own in cuts for cut in own)
    numbers = {len(own) for own in cuts}
    assert len(numbers) == 1 if together else all(cut for own in cuts for cut in own)


def test_parts_that_other_machines_wrote_elsewhere_are_missed(tmp_path: Path) -> None:
    save_file(
        {"exp_avg.a": torch.ones(3, 2), "exp_avg.b": torch.ones(1)}, tmp_path / "1.safetensors"
    )
    check_whole({"exp_avg.a": torch.ones(3, 2)}, tmp_path)
    for named in ({"exp_avg.a": torch.ones(5, 2)}, {"exp_avg.c": torch.ones(1)}):
        with pytest.raises(StorageError) as error:
            check_whole(named, tmp_path)
        assert f"the parts of {next(iter(named))} that other processes wrote" in str(error.value)
        assert "must lie on a disk that all machines share" in str(error.value)
