"""Parameters in closed form against transformers' own classes, for every family that can be new."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mule.models import cost
from mule.models.families import family
from mule.models.stored import null_params
from tests.unit.test_cost import WORDS, shape


@pytest.mark.parametrize("name", WORDS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    """Of its class for the config that our files say, less the layer of zeros."""
    config = shape(name)
    raw = family(config.family).to_hf(config)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    count = sum(p.numel() for p in theirs.parameters())
    assert count == cost.total_params(config) + null_params(config)
