"""Cosines are those of full accuracy from the first call of a process on, whatever its threads do."""

import subprocess
import sys

import pytest

_PROCESS = """
import torch
torch.set_num_threads(2)
rows = torch.rand(512, 512)
(rows @ rows).sum()  # the threads are there, and nothing but products was computed
from mule.models.vector_math import settle_vector_math
settle_vector_math()
x = torch.arange(40_000, dtype=torch.float32) / 7  # enough for torch to share it among threads
for function in (torch.cos, torch.sin, torch.exp, torch.sqrt):
    values = x if function in (torch.cos, torch.sin) else x.remainder(3.0) + 0.1
    first, exact = function(values), function(values.double()).float()
    assert (first - exact).abs().max() <= 1e-6 * exact.abs().max(), function.__name__
"""


@pytest.mark.slow
def test_the_first_call_of_many_processes_is_exact():
    """Without the settling some processes fail, on processors that MKL serves."""
    for _ in range(5):
        children = [subprocess.Popen([sys.executable, "-c", _PROCESS]) for _ in range(6)]
        assert [child.wait(timeout=120) for child in children] == [0] * 6
