"""What a run says at an evaluation."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from mule.tokenizer import Tokenizer
from mule.train.evaluator import Evaluator
from tests.tiny import TINY, tiny_model


def test_a_model_that_overflows_says_so_and_the_run_goes_on() -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 2, 270)
    model = tiny_model(dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size))
    parts: Any = SimpleNamespace(
        model=model,
        config=model.config,
        tokenizer=tokenizer,
        train=SimpleNamespace(shards=SimpleNamespace(kind="text", num_tokens=0, parts=[])),
        group=None,
        recipe=SimpleNamespace(
            train=SimpleNamespace(device="cpu"), evaluate=SimpleNamespace(patience=None)
        ),
    )
    evaluator = Evaluator(None, parts)
    answers, about = evaluator._answers(["the cat", "mat"])
    assert len(answers) == 2 and about["tokens"].keys() == {"the cat", "mat"}
    assert about["stopped"] == {prompt: count < 64 for prompt, count in about["tokens"].items()}
    assert about["copied"] == {"the cat": (0, 0), "mat": (0, 0)}
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    wrong = "(the model gave infinity instead of logits)"
    assert evaluator._answers(["the cat", "mat"]) == ([wrong, wrong], {})
    assert model.training
