"""What the compiler makes of blocks with state-space layers: one graph of each kind of block."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mule.train.compiler import Watch, set_up_compiler
from tests.tiny import random_batch, tiny_model
from tests.tiny_mamba import ALL


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ALL)
def test_no_graph_is_cut_and_none_made_again(name: str) -> None:
    """Traced only: graph breaks and recompiles are the tracer's."""
    set_up_compiler()
    model, watch = tiny_model(ALL[name]).train(), Watch()
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=False)
    for seed in range(3):
        model.nll_sum(random_batch(2, 40, seed=seed)).backward()
    made = watch.look()
    assert made.breaks == [] and made.recompiles == []
    kinds = {type(layer) for layer in model.model.layers}
    assert len(made.graphs) == len(kinds)
