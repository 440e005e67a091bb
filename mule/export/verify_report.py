"""What a verification found: every check with its result, every figure, and a verdict in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

# What to take instead of a type that is too far from a model.
_LARGER = {
    "q2_k": "q3_k_m",
    "q3_k_m": "q4_k_m",
    "iq4_xs": "q4_k_m",
    "mxfp4": "q4_k_m",
    "q4_k_s": "q4_k_m",
    "q4_k_m": "q5_k_m",
    "q5_k_s": "q6_k",
    "q5_k_m": "q6_k",
    "q6_k": "q8_0",
    "q8_0": "f16",
    "f16": "f32",
    "bf16": "f32",
}
_OF_ROUNDING = frozenset({"kl_mean", "kl_p99", "ppl", "top1"})
_SAME_PPL = 5e-4  # shares below it are told as no change
RUNTIME, OURS = "llama.cpp", "Mule"


@dataclass
class Check:
    """One step of a verification; `ok` is None for what could not be checked here."""

    name: str
    ok: bool | None
    detail: str = ""


@dataclass
class VerifyReport:
    """Every figure of a verification, and in `failures` what is beyond its limit.

    `runtime` is what computed the file's logits; `trained` is False where the model predicts no
    better than chance, so that only weights and structure say something.
    """

    file: str
    type: str
    size_bytes: int
    bits_per_weight: float
    runtime: str = RUNTIME
    checks: list[Check] = field(default_factory=list)
    weights: dict[str, Any] | None = None
    uniformity: float = math.nan  # of the model: its entropy in parts of that of guessing
    trained: bool | None = None
    num_tokens: int = 0  # compared positions
    num_texts: int = 0  # texts whose token ids were compared
    tokens_equal: bool | None = None  # None: not checked
    template_equal: bool | None = None  # None: there is no chat template, or it was not checked
    kl_mean: float = math.nan
    kl_p99: float = math.nan
    top1: float = math.nan
    max_abs_logit: float = math.nan
    ppl_reference: float = math.nan
    ppl: float = math.nan
    stops: bool | None = None
    num_prompts: int = 0
    num_greedy_equal: int = 0
    greedy_margins: list[float] = field(default_factory=list)  # one for each answer that parts
    tokens_per_second: float = math.nan  # of the file's answers, prompts included
    reference_tokens_per_second: float = math.nan
    seconds: float = math.nan
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def passed(self, name: str, failures: Iterable[str] = (), detail: str = "") -> bool:
        """Record a check: its failures, each to be told under its name, or what it looked at."""
        found = list(failures)
        self.failures += [f"{name}: {failure}" for failure in found]
        self.checks.append(Check(name, not found, found[0] if found else detail))
        return not found

    def not_checked(self, name: str, why: str) -> None:
        """Record what could not be checked here."""
        self.checks.append(Check(name, None, why))

    @property
    def ok(self) -> bool:
        return not self.failures

    @property
    def unchecked(self) -> list[str]:
        return [check.name for check in self.checks if check.ok is None]

    @property
    def greedy_equal(self) -> bool:
        return self.num_greedy_equal == self.num_prompts

    @property
    def ppl_change(self) -> float:
        """The perplexity's share above the model's."""
        return self.ppl / self.ppl_reference - 1 if self.ppl_reference else math.nan

    @property
    def verdict(self) -> str:
        """One sentence for people: how the file differs, whether that is fine, and what to do."""
        told = f"{self.type}: {self._figures()}"
        kinds = {failure.partition(":")[0] for failure in self.failures}
        if self.failures and not (kinds <= _OF_ROUNDING and self.weights is not None):
            return f"not the same model: {self.failures[0]}"
        if self.failures:
            larger = _LARGER.get(self.type, "a larger type")
            instead = f"use {larger}"
            if self.type not in ("q8_0", "f16", "bf16", "f32"):
                instead += " or --imatrix"
            return (
                f"{told}: too far from the model, though its weights are what {self.type} makes of "
                f"them; {instead}"
            )
        if "distributions" in self.unchecked:
            told += "; the model is untrained: judged by its weights alone"
        ending = "the same model" if self.type == "f32" else "fine"
        missing = "" if self.runtime == RUNTIME else f" (computed by {self.runtime}, {_without()})"
        return f"{told}: {ending}{missing}"

    def _figures(self) -> str:
        change, parts = self.ppl_change, []
        if math.isfinite(change):
            size = f"{abs(change):.1%} {'worse' if change > 0 else 'better'} perplexity"
            parts.append("same perplexity" if abs(change) < _SAME_PPL else size)
        if self.num_prompts:
            of = "prompt" if self.num_prompts == 1 else "prompts"
            parts.append(f"same answers on {self.num_greedy_equal} of {self.num_prompts} {of}")
        return ", ".join(parts) or "nothing could be computed"

    def as_dict(self) -> dict[str, Any]:
        """A JSON object; a figure that could not be measured is null."""
        values = {"ok": self.ok, "verdict": self.verdict} | asdict(self)
        values |= {
            "ppl_change": self.ppl_change,
            "greedy_equal": self.greedy_equal,
            "unchecked": self.unchecked,
        }
        return {key: _number(value) for key, value in values.items()}


def _without() -> str:
    return "not in llama.cpp: token ids, template and stops there are not checked"


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
