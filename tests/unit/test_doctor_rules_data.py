"""The doctor's rules about data and labels: D501 to D505."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d501_repeated as repeated
from mule.doctor.rules import d502_unshuffled as unshuffled
from mule.doctor.rules import d503_few_targets as few_targets
from mule.doctor.rules import d504_stop_untrained as stop_untrained
from mule.doctor.rules import d505_truncated as truncated
from tests.doctor_case import history

RULES = (repeated, unshuffled, few_targets, stop_untrained, truncated)


def _facts(labels: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    of_data = {
        "kind": "chat",
        "num_items": 1000,
        "num_examples": 990,
        "num_tokens": 100_000,
        "num_dropped": 10,
        "num_truncated": 0,
        "rows_per_update": 8,
        "repeated_share": 0.003,
        "nearly_repeated_share": 0.04,
        "num_judged_items": 400,
        "order_correlation": 0.07,
    }
    of_labels = {
        "num_sampled_tokens": 30_000,
        "trained_share": 0.4,
        "empty_rows_share": 0.0,
        "num_answers": 300,
        "stopped_answers_share": 1.0,
        "document_ends": 120,
    }
    return {"data": of_data | data, "labels": of_labels | (labels or {})}


def _targets(seed: int) -> Any:
    rng = random.Random(seed)
    return lambda step: {"num_targets": rng.randint(300, 900)}


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_healthy_data_has_none_of_them(kind: Any, seed: int) -> None:
    case = history(kind, facts=_facts(), extra=_targets(seed), seed=seed)
    assert [rule.RULE.code for rule in RULES if rule.RULE.check(case)] == []
    older = history(kind, extra=_targets(seed), seed=seed)  # which recorded no facts
    assert [rule.RULE.code for rule in RULES if rule.RULE.check(older)] == []


@pytest.mark.parametrize(
    ("data", "severity"),
    [
        ({"repeated_share": 0.95}, "warning"),
        ({"repeated_share": 0.08}, "note"),
        ({"nearly_repeated_share": 0.7}, "note"),
        ({"nearly_repeated_share": 1.0, "num_judged_items": 3}, None),
        ({"repeated_share": 0.6, "num_items": 5}, None),
    ],
)
def test_repetition_is_weighed_by_its_share(data: dict[str, Any], severity: str | None) -> None:
    found = repeated.RULE.check(history("fine-tune", facts=_facts(**data)))
    assert (found.severity if found else None) == severity
    assert found is None or "mule data mix data.jsonl --out clean" in found.remedy


def test_rows_in_order_show_in_the_facts() -> None:
    found = unshuffled.RULE.check(history(facts=_facts(order_correlation=0.99)))
    assert found is not None and found.severity == "warning"
    assert "not shuffled (row number and place in the epoch go together: 0.99" in found.what


def test_rows_in_order_show_in_the_trained_tokens() -> None:
    rng = random.Random(3)
    rising = history("fine-tune", extra=lambda s: {"num_targets": 4 * s + rng.randint(0, 40)})
    found = unshuffled.RULE.check(rising)
    assert found is not None and "trained tokens of an update and of the next" in found.what
    constant = history("pretrain", extra=lambda s: {"num_targets": 512})
    assert unshuffled.RULE.check(constant) is None


@pytest.mark.parametrize(
    ("labels", "severity"),
    [
        ({"trained_share": 0.03}, "warning"),
        ({"trained_share": 0.1}, "note"),
        ({"empty_rows_share": 0.3}, "warning"),
        ({"trained_share": 0.2}, None),
    ],
)
def test_few_trained_tokens(labels: dict[str, Any], severity: str | None) -> None:
    found = few_targets.RULE.check(history("fine-tune", facts=_facts(labels)))
    assert (found.severity if found else None) == severity
    assert found is None or "mule data preview RECIPE" in found.remedy


def test_answers_that_do_not_end() -> None:
    case = history("fine-tune", facts=_facts({"stopped_answers_share": 0.0}))
    found = stop_untrained.RULE.check(case)
    assert found is not None and found.severity == "alarm"
    assert "0% of 300 answers end with a stop token that is trained" in found.what
    cut = history(
        "fine-tune",
        facts=_facts({"stopped_answers_share": 0.7}),
        settings=["data.too_long=truncate", "data.max_seq_length=256"],
    )
    found = stop_untrained.RULE.check(cut)
    assert found is not None and found.severity == "warning"
    assert "data.max_seq_length=512" in found.remedy


def test_documents_that_do_not_end() -> None:
    case = history(facts=_facts({"document_ends": 0}, kind="text"))
    found = stop_untrained.RULE.check(case)
    assert found is not None and "no end of a document is trained, where 297" in found.what
    one_book = _facts({"document_ends": 0}, kind="text", num_examples=1)
    assert stop_untrained.RULE.check(history(facts=one_book)) is None


@pytest.mark.parametrize(
    ("data", "severity"),
    [
        ({"num_dropped": 1200}, "warning"),
        ({"num_dropped": 300}, "note"),
        ({"num_truncated": 300}, "warning"),
        ({"num_truncated": 80}, "note"),
    ],
)
def test_examples_that_were_too_long(data: dict[str, Any], severity: str) -> None:
    found = truncated.RULE.check(history("fine-tune", facts=_facts(**data)))
    assert found is not None and found.severity == severity
    assert found.remedy == "data.max_seq_length=2048"
