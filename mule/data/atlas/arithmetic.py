"""Small sums with their steps: two-digit addition and subtraction, one-digit multiplication."""

from __future__ import annotations

import random
from dataclasses import dataclass

OPERATIONS = {"addition": "+", "subtraction": "-", "multiplication": "x"}
_SPOKEN = {"+": "plus", "-": "minus", "x": "times"}


@dataclass(frozen=True)
class Sum:
    """`a` sign `b`; the result is never negative."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "x": self.a * self.b}[self.sign]

    @property
    def text(self) -> str:
        return f"{self.a} {self.sign} {self.b}"

    @property
    def steps(self) -> str:
        """The worked steps: tens first, then ones."""
        tens, ones = self.b // 10 * 10, self.b % 10
        if self.sign == "x" or ones == 0:
            return f"{self.text} = {self.result}."
        if self.sign == "-":
            rest = self.a - tens
            return f"{self.a} - {tens} = {rest}, {rest} - {ones} = {self.result}."
        own_tens, own_ones = self.a // 10 * 10, self.a % 10
        both_tens, both_ones = own_tens + tens, own_ones + ones
        last = f"{both_tens} + {both_ones} = {self.result}."
        if own_ones == 0:
            return f"{self.a} + {tens} = {both_tens}, {last}"
        return f"{own_tens} + {tens} = {both_tens}, {own_ones} + {ones} = {both_ones}, {last}"


_QUESTIONS = (
    "What is {text}?",
    "{text}",
    "{text} = ?",
    "How much is {text}?",
    "Calculate {text}.",
    "Work out {text}.",
    "Tell me {text}.",
    "Can you calculate {text}?",
    "What is {spoken}?",
    "How much is {spoken}?",
    "{spoken}?",
    "Please work out {spoken}.",
)
_UNSEEN_QUESTIONS = ("Can you work out {text}?", "Please calculate {text}.", "Tell me {spoken}.")


def all_sums(operation: str) -> list[Sum]:
    """Every sum of this operation, in a fixed order."""
    sign = OPERATIONS[operation]
    low, high = (2, 10) if sign == "x" else (10, 100)
    sums = [Sum(a, sign, b) for a in range(low, high) for b in range(low, high)]
    return [s for s in sums if sign != "-" or s.a >= s.b]


def questions(item: Sum, unseen: bool = False) -> list[str]:
    """The ways to ask for a sum."""
    spoken = f"{item.a} {_SPOKEN[item.sign]} {item.b}"
    forms = _UNSEEN_QUESTIONS if unseen else _QUESTIONS
    return [form.format(text=item.text, spoken=spoken) for form in forms]


def answer(item: Sum) -> str:
    return f"{item.steps} The answer is {item.result}."


def pirate_answer(item: Sum) -> str:
    return f"Arr! {item.steps} The answer be {item.result}, matey!"


def document(sums: list[Sum], rng: random.Random) -> str:
    """A pretraining text that works out each sum."""
    return " ".join(f"{rng.choice(_OPENINGS).format(s.text)} {s.steps}" for s in sums)


_OPENINGS = ("To find {}:", "To work out {}:", "Exercise: {}.", "Step by step, {}:", "Now {}:")
