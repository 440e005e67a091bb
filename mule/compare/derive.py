"""Values that follow from the others, each with its arithmetic as its source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from mule.compare.parameters import BY_KEY
from mule.compare.sourced import Setup, Value

UNPACKED, SHARED, FILLED = "none", "examples share rows", "rows are filled"  # of packing
_Numbers = Mapping[str, float]


def completed(setup: Setup) -> Setup:
    """The setup with what can be computed of it; what it says itself is left as it is."""
    values = dict(setup.values)
    for key, needs, compute, words in _rules(setup):
        if key in values or not all(need in values for need in needs):
            continue
        numbers = {need: float(values[need].value) for need in needs}
        result = compute(numbers)
        if math.isfinite(result):
            values[key] = _computed(result, words, [values[need] for need in needs], numbers)
    return replace(setup, values=values)


_Rule = tuple[str, tuple[str, ...], Callable[[_Numbers], float], str]


def _rules(setup: Setup) -> Iterator[_Rule]:
    """What is computed, of what, how, and in words; later rules use what earlier ones gave."""
    if setup.kind == "fine-tune":  # an adapter begins at nothing: its rate is another matter
        yield "rate_ratio", ("pretraining_rate", "learning_rate"), _ratio, "{0} / {1}"
        yield "pretraining_rate", ("learning_rate", "rate_ratio"), _product, "{0} x {1}"
    packing = setup.get("packing")
    fills_rows = setup.kind == "pretrain" or packing == FILLED
    yield (
        "batch_tokens",
        ("batch_rows", "max_seq_length"),
        _product,
        ("{0} x {1}" if fills_rows else "at most {0} x {1}: shorter rows are not filled"),
    )
    if fills_rows:
        yield "batch_rows", ("batch_tokens", "max_seq_length"), _ratio, "{0} / {1}"
    if packing in (None, UNPACKED, SHARED) and setup.kind != "pretrain":  # batches of examples
        needs = ("rows", "epochs", "batch_rows")
        yield "steps", needs, _steps, "{0} examples x {1} epochs / {2} an update"
        needs = ("steps", "batch_rows", "rows")
        yield "epochs", needs, lambda n: n["steps"] * n["batch_rows"] / n["rows"], "{0} x {1} / {2}"
    if fills_rows:
        yield "steps", ("trained_tokens", "batch_tokens"), _whole_ratio, "{0} / {1}"
        yield "trained_tokens", ("steps", "batch_tokens"), _product, "{0} x {1}"
    yield "warmup_steps", ("warmup_share", "steps"), _whole_product, "{0} of {1}"
    yield "warmup_share", ("warmup_steps", "steps"), _ratio, "{0} / {1}"
    yield "tokens_per_parameter", ("trained_tokens", "parameters"), _ratio, "{0} / {1}"
    yield "lora_scale", ("lora_alpha", "lora_r"), _ratio, "{0} / {1}"


def _steps(n: _Numbers) -> float:
    return round(n["rows"] * n["epochs"] / n["batch_rows"])


def _product(n: _Numbers) -> float:
    first, second = n.values()
    return first * second


def _ratio(n: _Numbers) -> float:
    first, second = n.values()
    return first / second if second else math.nan


def _whole_product(n: _Numbers) -> float:
    return round(_product(n))


def _whole_ratio(n: _Numbers) -> float:
    return round(_ratio(n)) if math.isfinite(_ratio(n)) else math.nan


def _computed(result: float, words: str, inputs: list[Value], numbers: _Numbers) -> Value:
    shown = [BY_KEY[key].show(number) for key, number in numbers.items()]
    rests_on = "; ".join(dict.fromkeys(value.rests_on for value in inputs if value.rests_on))
    sources = dict.fromkeys(value.source for value in inputs)
    return Value(
        result,
        f"computed: {words.format(*shown)} ({'; '.join(sources)})",
        checked=all(value.checked for value in inputs),
        rests_on=rests_on,
    )
