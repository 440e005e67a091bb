"""From logits to the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mule.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 is greedy, and then the rest has no effect."""

    temperature: float = 0.0
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0  # nucleus; Holtzman et al. 2020
    min_p: float = 0.0  # share of the best token's probability; Nguyen et al. 2024
    repeat_penalty: float = 1.0  # Keskar et al. 2019, section 4.1
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0.0 <= self.temperature <= 10.0, "between 0 and 10"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p < 1.0, "from 0 to below 1"),
            ("repeat_penalty", 0.1 <= self.repeat_penalty <= 10.0, "between 0.1 and 10"),
        )
        for name, valid, words in limits:
            if not valid:
                value = getattr(self, name)
                raise UserError(f"{name} is {value}; it must be {words}", f"set {name} {words}")


class Sampler:
    """Draws tokens for B rows; keeps the random state and the tokens seen."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling = sampling
        self._vocab_size = vocab_size  # rows beyond the tokenizer's are never drawn
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self, logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Next tokens (B, 1) for logits (B, V); `seen` (B, T) holds the tokens so far."""
        s = self.sampling
        scores = logits[:, : self._vocab_size].float()
        if s.repeat_penalty != 1.0:
            scores = _penalise(scores, seen, s.repeat_penalty)
        if s.temperature == 0.0:
            return scores.argmax(-1, keepdim=True)
        probabilities = _truncate((scores / s.temperature).softmax(-1), s)
        return torch.multinomial(probabilities.cpu(), 1, generator=self._generator).to(
            logits.device
        )


def _penalise(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    chosen = scores.gather(-1, seen)
    return scores.scatter(-1, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def _truncate(probabilities: torch.Tensor, s: Sampling) -> torch.Tensor:
    """Zero what top-k, top-p and min-p exclude; the best token always stays."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # probability of all better tokens
    keep = before < s.top_p
    keep &= ordered >= s.min_p * ordered[:, :1]
    if s.top_k:
        keep &= torch.arange(ordered.shape[-1], device=ordered.device) < s.top_k
    keep[:, 0] = True
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * keep)
