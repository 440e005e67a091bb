"""The proof that runs differ in their variants alone, and the figures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mule.config.dump import with_values
from mule.config.schema import Recipe
from mule.errors import CheckFailed
from mule.lab.alike import check_recipes, check_run, speed_differences
from mule.lab.training import spikes, trained_seconds, training_figures
from mule.run import Run

RECIPE = Recipe.model_validate(
    {
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2},
        "data": {"train": ["a.txt"], "valid": ["b.txt"], "max_seq_length": 32},
        "train": {"steps": 8, "step_rows": 4, "micro_batch_rows": 2, "precision": "fp32"},
        "optim": {"learning_rate": 0.001},
    }
)
FACTS: dict[str, Any] = {"tokenizer": "t", "data": {"train": {"folder": "train-1"}}}


def _other(**values: Any) -> Recipe:
    return with_values(RECIPE, {key.replace("__", "."): value for key, value in values.items()})


def test_the_model_and_the_seed_may_differ() -> None:
    other = _other(model__num_layers=3, train__seed=4)
    check_recipes({"a": RECIPE, "b": other}, searched=())


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"optim__weight_decay": 0.2}, "optim.weight_decay"),
        ({"optim__learning_rate": 0.2}, "optim.learning_rate"),
        ({"data__train": ["c.txt"]}, "data.train"),
        ({"data__max_seq_length": 16}, "data.max_seq_length"),
        ({"train__step_rows": 6}, "train.step_rows"),
        ({"train__micro_batch_rows": 1}, "train.micro_batch_rows"),
        ({"train__precision": "bf16"}, "train.precision"),
        ({"tokenizer__path": "x"}, "tokenizer.path"),
    ],
)
def test_anything_else_that_differs_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckFailed, match=f"a and b cannot be compared: {key} is ") as caught:
        check_recipes({"a": RECIPE, "b": _other(**values)}, searched=())
    assert "everything but the variant must be equal" in caught.value.hint


def test_after_a_search_each_variant_has_its_own_settings() -> None:
    found = ("optim.learning_rate",)
    check_recipes({"a": RECIPE, "b": _other(optim__learning_rate=0.2)}, searched=found)
    with pytest.raises(CheckFailed, match=r"optim\.weight_decay is 0\.1 in one and 0\.2"):
        check_recipes({"a": RECIPE, "b": _other(optim__weight_decay=0.2)}, searched=found)


def _run(folder: Path, **lineage: Any) -> Run:
    from mule.config.dump import to_yaml

    run = Run.create(folder.parent, folder.name, to_yaml(RECIPE))
    run.write_resolved(to_yaml(RECIPE))
    run.write_lineage({"data": "train-1", "tokenizer": "t", "torch": "2", "mule": "1"} | lineage)
    return run


def test_a_run_is_what_the_campaign_says(tmp_path: Path) -> None:
    check_run(_run(tmp_path / "a"), RECIPE, FACTS)


@pytest.mark.parametrize(
    ("planned", "lineage", "said"),
    [
        (
            {"optim__learning_rate": 0.2},
            {},
            "optim.learning_rate = 0.001, and the campaign says 0.2",
        ),
        ({"model__num_layers": 3}, {}, "model.num_layers = 2, and the campaign says 3"),
        ({}, {"data": "train-2"}, "its prepared data = 'train-2', and the campaign says 'train-1'"),
        ({}, {"tokenizer": "u"}, "its tokenizer = 'u', and the campaign says 't'"),
    ],
)
def test_a_run_that_is_not_is_refused(
    tmp_path: Path, planned: dict[str, Any], lineage: dict[str, Any], said: str
) -> None:
    run = _run(tmp_path / "a", **lineage)
    with pytest.raises(CheckFailed) as caught:
        check_run(run, _other(**planned), FACTS)
    assert said in caught.value.message
    assert f"remove {run.folder} to train it anew" in caught.value.hint


def test_speeds_on_other_machines_are_told_apart(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / "a", machine={"cpu": "x"}),
        _run(tmp_path / "b", machine={"cpu": "y"}, torch="3"),
    ]
    assert speed_differences(runs) == ["torch: 2 in a, 3 in b", "processor: x in a, y in b"]
    assert speed_differences(runs[:1]) == []


def test_a_spike_is_a_jump_above_the_updates_before_it() -> None:
    falling = [8 - 0.05 * step + 0.02 * (step % 3) for step in range(60)]
    assert spikes(falling) == []
    falling[40] += 2.0
    falling[41] += 1.5  # of the same spike
    assert spikes(falling) == [40]
    falling[5] += 9.0  # too early to be told from the beginning
    assert spikes(falling) == [40]
    assert spikes([2.0] * 30 + [2.05] + [2.0] * 5) == []  # too small to matter


def test_figures_are_of_all_attempts(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    with run.lock():
        for first, last in ((0, 3), (3, 6)):
            run.start_attempt(from_step=first)
            for step in range(first + 1, last + 1):
                row = {"step": step, "loss": 3.0 - step / 10, "grad_norm": float(step)}
                row |= {"tokens_per_second": 100.0 * step, "share_of_peak": 0.1, "num_targets": 7}
                run.log_metrics(row | {"memory_bytes": 10 * step})
        run.log_event("update refused", step=4, cause="x")
    figures = training_figures(run)
    assert figures["tokens_per_second"] == 400.0  # the median of 200..600
    assert figures["peak_memory_bytes"] == 60
    assert figures["max_grad_norm"] == 6.0 and figures["mean_grad_norm"] == 3.5
    assert figures["refused_updates"] == 1 and figures["num_spikes"] == 0
    assert figures["final_loss"] == pytest.approx(3.0 - 0.35)
    assert 0 <= trained_seconds(run) < 5
