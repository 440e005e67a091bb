"""The doctor's rules about overfitting, memory of rows, leaks and answers: D401 to D405."""

from __future__ import annotations

from typing import Any

import pytest

from mule.doctor.finding import ALL_KINDS
from mule.doctor.rules import d401_overfitting as overfitting
from mule.doctor.rules import d402_memorising as memorising
from mule.doctor.rules import d403_validation_leaking as leaking
from mule.doctor.rules import d404_verbatim as verbatim
from mule.doctor.rules import d405_poor_answers as poor
from tests.doctor_case import curve, history

_OVERFITTING = {"kind": "overfitting", "step": 160, "cause": "..."}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_healthy_run_has_none_of_them(kind: Any) -> None:
    samples = [_sample(step, "It is Paris, as far as I know.") for step in (0, 100, 200)]
    case = history(kind, valid=curve(2.7, 1.7, 12), samples=samples, facts=_facts())
    for rule in (overfitting, memorising, leaking, verbatim, poor):
        assert rule.RULE.check(case) is None, rule.RULE.code


# ---------------------------------------------------------------- D401


def test_overfitting_is_a_rise_of_validation() -> None:
    case = history("fine-tune", valid=lambda s: 2.0 + abs(s - 120) / 200, events=[_OVERFITTING])
    found = overfitting.RULE.check(case)
    assert found is not None and found.severity == "warning" and found.step == 160
    assert "rose from 2.0000 (update 120) to 2.4000, by 20.0%" in found.what
    assert found.remedy.startswith("evaluate.patience=2 train.steps=120")


def test_a_little_rise_at_the_end_is_a_note() -> None:
    def valid(step: int) -> float:
        return 2.6 - step / 200 if step <= 160 else 1.8 + (step - 160) / 4000

    found = overfitting.RULE.check(history("fine-tune", valid=valid, events=[_OVERFITTING]))
    assert found is not None and found.severity == "note"

    def wandering(step: int) -> float:
        return 2.0 if step == 160 else 2.05 if step == 200 else 2.3 - (step % 40) / 400

    case = history("fine-tune", valid=wandering, events=[_OVERFITTING])
    found = overfitting.RULE.check(case)
    assert found is not None and found.severity == "note"


def test_validation_that_is_best_again_is_no_overfitting() -> None:
    case = history("fine-tune", valid=curve(2.7, 1.7, 12), events=[_OVERFITTING])
    assert overfitting.RULE.check(case) is None


def test_an_adapter_is_offered_its_own_dropout() -> None:
    settings = ["evaluate.patience=3"]
    case = history(
        "adapter",
        valid=lambda s: 2.0 + abs(s - 60) / 100,
        events=[_OVERFITTING],
        settings=settings,
    )
    found = overfitting.RULE.check(case)
    assert found is not None and "adapter.lora.dropout=0.1" in found.remedy
    assert "patience" not in found.remedy


# ---------------------------------------------------------------- D402


def _by_heart(step: int) -> float:
    return 3.0 * 0.97**step + 0.02


def test_rows_learned_by_heart() -> None:
    case = history("fine-tune", _by_heart, extra=_many_epochs)
    found = memorising.RULE.check(case)
    assert found is not None and found.severity == "warning"
    assert "20.0 passes over the same rows" in found.what
    assert found.remedy.startswith("train.steps=10 data.valid_share=0.1")


def _many_epochs(step: int) -> dict[str, float]:
    return {"epoch": step / 10}


def test_validation_beside_it_must_be_worse() -> None:
    both_low = history(
        "fine-tune", _by_heart, valid=lambda s: _by_heart(s) * 1.2, extra=_many_epochs
    )
    assert memorising.RULE.check(both_low) is None
    apart = history("fine-tune", _by_heart, valid=lambda s: 1.9, extra=_many_epochs)
    found = memorising.RULE.check(apart)
    assert found is not None and "(validation: 1.900)" in found.what


def test_a_low_loss_in_the_first_epoch_is_not_memory() -> None:
    case = history("fine-tune", _by_heart, extra=lambda s: {"epoch": s / 200})
    assert memorising.RULE.check(case) is None


# ---------------------------------------------------------------- D403


def _facts(**data: Any) -> dict[str, Any]:
    found = {
        "kind": "chat",
        "num_items": 1000,
        "num_valid_items": 200,
        "valid_repeated": 0,
        "valid_nearly_repeated": 1,
        "num_judged_valid_items": 150,
        "nearly_repeated_share": 0.01,
        "scanned_share": 1.0,
    }
    return {"data": found | data, "labels": {"answer_tokens_p90": 20.0}}


@pytest.mark.parametrize(
    ("data", "severity"),
    [
        ({"valid_repeated": 130}, "warning"),
        ({"valid_nearly_repeated": 40}, "warning"),
        ({"valid_repeated": 1}, "note"),
        ({"valid_nearly_repeated": 5}, None),
        ({"valid_nearly_repeated": 81, "nearly_repeated_share": 0.53}, None),  # phrases
        ({"valid_nearly_repeated": 81, "nearly_repeated_share": 0.1}, "warning"),
    ],
)
def test_leaks_are_weighed_by_their_share(data: dict[str, int], severity: str | None) -> None:
    found = leaking.RULE.check(history("fine-tune", facts=_facts(**data)))
    assert (found.severity if found else None) == severity


def test_a_leak_names_the_files_to_keep_apart() -> None:
    settings = ["data.valid=[held.jsonl]"]
    case = history(facts=_facts(valid_repeated=130, scanned_share=0.25), settings=settings)
    found = leaking.RULE.check(case)
    assert found is not None and "130 of 200 validation items are training items" in found.what
    assert "looked for in 25% of them" in found.what
    assert "mule data mix data.jsonl --out clean --decontaminate held.jsonl" in found.remedy
    own = leaking.RULE.check(history(facts=_facts(valid_repeated=130)))
    assert own is not None and "decontaminate" not in own.remedy


def test_without_validation_or_facts_nothing_can_leak() -> None:
    assert leaking.RULE.check(history()) is None
    assert leaking.RULE.check(history(facts={"data": {"num_items": 3}})) is None


# ---------------------------------------------------------------- D404


def _sample(step: int, *answers: str, copied: tuple[int, int] = (0, 0), **more: Any) -> Any:
    prompts = [f"prompt {number}" for number in range(len(answers))]
    return {
        "step": step,
        "answers": dict(zip(prompts, answers)),
        "tokens": {prompt: 24 for prompt in prompts},
        "stopped": dict.fromkeys(prompts, True),
        "copied": {prompt: list(copied) for prompt in prompts},
        **more,
    }


def test_recited_rows_are_found_where_they_began() -> None:
    samples = [
        _sample(0, "a", "b"),
        _sample(80, "a", "b", copied=(24, 1)),
        _sample(160, "a", "b", copied=(40, 2)),
    ]
    found = verbatim.RULE.check(history("fine-tune", samples=samples))
    assert found is not None and (found.severity, found.step) == ("warning", 80)
    assert "2 of 2 answers repeat training rows word for word, up to 40 tokens" in found.what
    assert "train.steps=40" in found.remedy


@pytest.mark.parametrize("copied", [(23, 1), (18, 1), (48, 200)])
def test_short_stretches_and_phrases_are_nobodys_row(copied: tuple[int, int]) -> None:
    samples = [_sample(0, "a", "b"), _sample(160, "a", "b", copied=copied)]
    assert verbatim.RULE.check(history("fine-tune", samples=samples)) is None


def test_short_answers_learned_whole_are_a_note() -> None:
    samples = [_sample(0, "a", "b"), _sample(160, "a", "b", copied=(24, 1))]
    found = verbatim.RULE.check(history("adapter", samples=samples))
    assert found is not None and found.severity == "note"


def test_one_prompt_is_a_note_and_a_base_that_recited_before_none() -> None:
    one = [_sample(0, "a"), _sample(160, "a", copied=(40, 1))]
    found = verbatim.RULE.check(history("fine-tune", samples=one))
    assert found is not None and found.severity == "note"
    before = [_sample(0, "a", copied=(40, 1)), _sample(160, "a", copied=(40, 1))]
    assert verbatim.RULE.check(history("fine-tune", samples=before)) is None


# ---------------------------------------------------------------- D405

_LOOP = "the cat sat on the mat and " * 6


@pytest.mark.parametrize(
    ("answer", "stopped", "said"),
    [
        ("", True, "are empty"),
        ("I am well.<|im_end|><|im_start|>user", True, "have chat markup in them"),
        ("Paris.\nUser: and London?", True, "have chat markup in them"),
        (_LOOP, True, "go round in circles"),
        ("and so on and on, to the very last token there is", False, "never end"),
    ],
)
def test_poor_answers_of_a_tuned_model(answer: str, stopped: bool, said: str) -> None:
    bad = {"stopped": {"prompt 0": stopped}, "tokens": {"prompt 0": 64}}
    samples = [_sample(0, "Fine."), _sample(150, answer, **bad), _sample(200, answer, **bad)]
    case = history("fine-tune", curve(4.0, 1.6, 12), samples=samples, facts=_facts())
    found = poor.RULE.check(case)
    assert found is not None and found.severity == "warning" and found.step == 150
    assert f"100% of the answers {said}" in found.what and "'prompt 0' -> " in found.what


def test_what_the_base_did_already_is_a_note() -> None:
    samples = [_sample(step, _LOOP) for step in (0, 150, 200)]
    case = history("adapter", curve(4.0, 1.6, 12), samples=samples, facts=_facts())
    found = poor.RULE.check(case)
    assert found is not None and found.severity == "note" and "as before training" in found.what


def test_loops_of_a_new_model_are_a_note() -> None:
    samples = [_sample(0, "xq"), _sample(150, _LOOP), _sample(200, _LOOP)]
    found = poor.RULE.check(history("pretrain", samples=samples, facts=_facts(kind="text")))
    assert found is not None and found.severity == "note"


def test_answers_of_the_first_half_and_of_a_high_loss_are_not_judged() -> None:
    early = [_sample(0, "Fine."), _sample(40, ""), _sample(80, "")]
    case = history("fine-tune", curve(4.0, 1.6, 12), samples=early, facts=_facts())
    assert poor.RULE.check(case) is None
    late = [_sample(0, "Fine."), _sample(150, ""), _sample(200, "")]
    assert poor.RULE.check(history("fine-tune", lambda s: 4.0, samples=late)) is None


def test_long_answers_may_reach_the_limit() -> None:
    cut = {"stopped": {"prompt 0": False}, "tokens": {"prompt 0": 64}}
    samples = [_sample(0, "Fine."), *(_sample(s, "and then it", **cut) for s in (150, 200))]
    facts = _facts() | {"labels": {"answer_tokens_p90": 300.0}}
    case = history("fine-tune", curve(4.0, 1.6, 12), samples=samples, facts=facts)
    assert poor.RULE.check(case) is None
