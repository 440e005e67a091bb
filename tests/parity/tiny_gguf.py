"""Tiny transformers models in folders, for the GGUF tests; random weights, a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mule.tokenizer import Tokenizer

TEXTS = [
    "The sea was calm that morning, and the old captain said: we'll sail at 10:45, not before.",
    "L'été dernier, où étais-tu ? « À la plage », répondit-elle, déjà fatiguée de ses questions.",
    "def add(a: int, b: int) -> int:\n    return a + b  # 12 + 30 == 42\n",
    "It wasn't the first time. They'd been told, again and again, that nobody would come. " * 6,
]
PROMPTS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are a mule."},
        {"role": "user", "content": "Say: «ça va» 👍"},
        {"role": "assistant", "content": "ça va"},
        {"role": "user", "content": "And again, 3 times?\n"},
    ],
]
VOCAB_ROWS = 619  # more than the tokenizer has: the rest must become UNUSED


def save_tiny(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model of 3 layers, 4 heads on 2, saved with its tokenizer; logits spread like a real one's."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCAB_ROWS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 30_000.0},
    )
    sizes |= changes
    tokenizer = tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
    if family == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **ids))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases off their trivial values
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    tokenizer.save(folder)
    return model


_tokenizers: list[Tokenizer] = []


def tiny_tokenizer() -> Tokenizer:
    if not _tokenizers:
        _tokenizers.append(Tokenizer.train(TEXTS * 3, 600))
    return _tokenizers[0]


class TorchReference:
    """A transformers model as the reference that `verify` compares a file with."""

    def __init__(self, model: Any, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._answers: dict[tuple[int, ...], list[int]] = {}

    @torch.no_grad()
    def logits(self, ids: list[int]) -> np.ndarray:
        return self.model(torch.tensor([ids])).logits[0].float().numpy()

    def greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        key = (*ids, max_tokens)
        if key not in self._answers:
            self._answers[key] = self._greedy(ids, max_tokens)
        return self._answers[key]

    def _greedy(self, ids: list[int], max_tokens: int) -> list[int]:
        answer: list[int] = []
        while len(answer) < max_tokens:
            used = self.tokenizer.vocab_size  # the rows beyond are never drawn
            token = int(self.logits([*ids, *answer])[-1, :used].argmax())
            if token in self.tokenizer.stop_ids:
                break
            answer.append(token)
        return answer


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
