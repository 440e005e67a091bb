"""A layer with a window keeps no more than that, and computes the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mule.models import cost
from mule.models.cache import KVCache
from mule.models.cached_layer import RollingLayer
from mule.models.config import ModelConfig
from tests.tiny import TINY, tiny_model

WINDOWED = dataclasses.replace(TINY, sliding_window=11, sliding_layers=(0, 2))
PARTS = [(0, 5), (5, 6), (6, 19), (19, 20), (20, 21), (21, 60), (60, 61), (61, 90), (90, 91)]


def steps(config: ModelConfig, parts: list[tuple[int, int]]) -> tuple[torch.Tensor, KVCache]:
    """Logits behind each part of a text."""
    model = tiny_model(config).eval()
    ids = torch.randint(0, 89, (2, parts[-1][1]), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(2, 100)
    return torch.stack([model.step(ids[:, a:b], cache) for a, b in parts]), cache


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 11, 40])
def test_logits_equal_those_of_a_full_cache(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(WINDOWED, sliding_window=window)
    one_by_one = [(0, 30), *((i, i + 1) for i in range(30, 99))]
    for parts in (PARTS, one_by_one):
        rolling, cache = steps(config, parts)
        assert [isinstance(kept, RollingLayer) for kept in cache.layers] == [True, False, True]
        with monkeypatch.context() as patch:
            patch.setattr(KVCache, "_rolls", lambda cache, window: False)
            full, cache = steps(config, parts)
        assert not any(isinstance(kept, RollingLayer) for kept in cache.layers)
        torch.testing.assert_close(rolling, full, atol=1e-5, rtol=0)


def test_memory_is_what_the_formula_says() -> None:
    model = tiny_model(WINDOWED)
    cache = model.new_cache(3, 128)
    each = 2 * TINY.num_kv_heads * TINY.head_dim * 4
    assert cache.num_bytes == 3 * each * (11 + 128 + 11)
    assert cache.num_bytes == 3 * cost.cache_bytes(WINDOWED, 128, 4)
    assert tiny_model().new_cache(3, 128).num_bytes == 3 * 128 * cost.kv_bytes_per_token(TINY, 4)


def test_a_window_wider_than_the_cache_does_not_roll() -> None:
    wide = dataclasses.replace(WINDOWED, sliding_window=64)
    cache = tiny_model(wide).new_cache(1, 60)
    assert not any(isinstance(kept, RollingLayer) for kept in cache.layers)
