"""The search of a campaign: what is proposed, gone on with and chosen. No run is trained here."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mule import fsio, progress
from mule.config.campaign import load_campaign
from mule.errors import CheckFailed, UserError
from mule.lab.campaign import Folder, Job, Plan
from mule.lab.search import (
    Proposals,
    about_try,
    at_edge,
    chosen_settings,
    diverged,
    divergence,
    require_sampler,
    tries_in_turn,
    tries_left,
)
from mule.run import Run
from mule.train.guard import MAX_REFUSED_IN_A_ROW
from tests.notes import Notes

CAMPAIGN = """\
budget: {active_params: 300k, hidden_size: 64, head_dim: 32, tolerance: 0.2}
variants:
  mha:
  gqa: {attention: gqa, num_kv_heads: 1}
seeds: [3, 4]
tokenizer: {vocab_size: 300}
data: {train: [t.txt], format: text, max_seq_length: 48, valid_share: 0.1, test_share: 0.1}
train: {steps: 20, step_rows: 4}
"""
SAMPLED = "{trials: 9, learning_rate: [1e-4, 1e-1], weight_decay: [0.01, 1]}"
LISTED = "{learning_rates: [1e-3, 1e-2, 1e-1], tokens: 768}"
PINNED = {"train.steps": 20, "train.step_rows": 4, "optim.warmup_steps": 5}

needs_optuna = pytest.mark.skipif(
    importlib.util.find_spec("optuna") is None, reason="the extra search is not installed"
)


def _plan(folder: Path, search: str) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "small.yaml"
    file.write_text(CAMPAIGN + f"search: {search}\n")
    campaign = load_campaign(file)
    return Plan(campaign, Folder(folder / "campaign"), campaign.shared, vocab_rows=512)


def _loss(job: Job) -> float:
    """Of a try, as if it had been made: each variant has its own best learning rate."""
    assert job.tried is not None
    settings = dict(job.tried.settings)
    best = {"mha": 3e-3, "gqa": 2e-2}[job.variant]
    decay = settings.get("optim.weight_decay", 0.1)
    return 3 + math.log(settings["optim.learning_rate"] / best) ** 2 + 0.1 * abs(math.log(decay))


def _write(plan: Plan, job: Job) -> None:
    result = {"variant": job.variant, "tokens": 768, "run": f"runs/{job.name}"}
    result |= {"valid": {"loss": _loss(job)}, **about_try(job)}
    fsio.write_json(plan.folder.result(job), result)


def _search(plan: Plan, make: Callable[[Plan, Job], None] = _write, stop_at: int = 99) -> list[Job]:
    """Make the tries that have no result, as a campaign does; it is stopped before one of them."""
    found = []
    for job in tries_in_turn(plan, None):
        found.append(job)
        if not plan.folder.result(job).is_file():
            if stop_at == 0:
                break
            make(plan, job)
            stop_at -= 1
    return found


# ---------------------------------------------------------------- what is tried


@needs_optuna
def test_a_search_that_was_stopped_goes_on_with_the_same_tries(tmp_path: Path) -> None:
    whole = _search(_plan(tmp_path / "whole", SAMPLED))
    assert [job.name for job in whole][::9] == ["search-mha-try01", "search-gqa-try01"]
    stopped = tmp_path / "stopped"
    for length in (2, 5, 1, 6, 99):  # within the random tries, after them, in the second variant
        again = _search(_plan(stopped, SAMPLED), stop_at=length)
        assert again == whole[: len(again)]
    assert len(again) == 18 and tries_left(_plan(stopped, SAMPLED)) == []


@needs_optuna
def test_variants_begin_alike_and_then_follow_their_own_losses(tmp_path: Path) -> None:
    tried = [job.tried for job in _search(_plan(tmp_path, SAMPLED))]
    mha, gqa = tried[:9], tried[9:]
    assert mha[:4] == gqa[:4] and mha[4:] != gqa[4:]
    for one in tried:
        assert one is not None and one.sampler.startswith("optuna ")
        settings = dict(one.settings)
        assert list(settings) == ["optim.learning_rate", "optim.weight_decay"]
        assert 1e-4 <= settings["optim.learning_rate"] <= 1e-1
        assert 0.01 <= settings["optim.weight_decay"] <= 1
        assert all(value == float(f"{value:.3g}") for value in settings.values())


@needs_optuna
def test_proposals_are_of_the_seed_and_the_losses() -> None:
    ranges = {"optim.learning_rate": (1e-4, 1e-1)}

    def first(seed: int, loss: float) -> list[dict[str, float]]:
        proposals, found = Proposals(ranges, seed), []
        for place in range(7):
            found.append(proposals.ask())
            proposals.tell(loss if place == 2 else 4.0 + place)
        return found

    assert first(1, 3.0) == first(1, 3.0) != first(2, 3.0)
    assert first(1, 3.0)[:4] == first(1, math.inf)[:4]
    assert first(1, 3.0)[4:] != first(1, math.inf)[4:]


@needs_optuna
def test_a_bound_of_many_digits_is_kept() -> None:
    proposals = Proposals({"optim.learning_rate": (1.2344e-3, 1.2346e-3)}, 0)
    for _ in range(6):
        assert 1.2344e-3 <= proposals.ask()["optim.learning_rate"] <= 1.2346e-3
        proposals.tell(1.0)


def test_a_list_is_tried_as_it_stands(tmp_path: Path) -> None:
    plan = _plan(tmp_path, LISTED)
    names = [job.name for job in _search(plan)]
    assert names[:3] == [f"search-mha-lr{rate}" for rate in ("0.001", "0.01", "0.1")]
    assert len(names) == 6 and names[3] == "search-gqa-lr0.001"


@needs_optuna
def test_a_try_is_a_short_run_with_its_own_settings(tmp_path: Path) -> None:
    plan = _plan(tmp_path, SAMPLED)
    job = next(tries_in_turn(plan, "gqa"))
    recipe = plan.recipe(job, PINNED)
    assert job.tried is not None
    settings = dict(job.tried.settings)
    assert recipe.optim.learning_rate == settings["optim.learning_rate"]
    assert recipe.optim.weight_decay == settings["optim.weight_decay"]
    assert recipe.train.steps == 4 and recipe.optim.warmup_steps == 1 and recipe.train.seed == 3


# ---------------------------------------------------------------- what stops it


def test_without_optuna_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    plan = _plan(tmp_path, SAMPLED)
    for ask in (lambda: _search(plan), lambda: require_sampler(plan.campaign.plan.search)):
        with pytest.raises(UserError, match=r"search\.trials needs optuna, which is not") as caught:
            ask()
        assert "pip install 'mule[search]'" in caught.value.hint
    listed = _plan(tmp_path / "listed", LISTED)
    require_sampler(listed.campaign.plan.search)
    assert len(_search(listed)) == 6


@needs_optuna
def test_a_complete_search_needs_no_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _search(_plan(tmp_path, SAMPLED))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert _search(_plan(tmp_path, SAMPLED)) == whole


@needs_optuna
def test_a_try_that_failed_ends_the_search_of_its_variant(tmp_path: Path) -> None:
    plan = _plan(tmp_path, SAMPLED)

    def make(plan: Plan, job: Job) -> None:
        if job.name != "search-mha-try06":
            _write(plan, job)

    assert [job.variant for job in _search(plan, make)] == ["mha"] * 6 + ["gqa"] * 9
    with pytest.raises(CheckFailed, match="mha: 5 of the 9 tries of its search have a result") as e:
        chosen_settings(plan, Job("mha", "", 3))
    assert "run the campaign again: it makes the others" in e.value.hint
    assert chosen_settings(plan, Job("gqa", "", 3))


@needs_optuna
def test_another_sampler_does_not_go_on(tmp_path: Path) -> None:
    plan = _plan(tmp_path, SAMPLED)
    _search(plan, stop_at=5)
    file = tmp_path / "campaign" / "search" / "search-mha-try02.json"
    result = fsio.read_json(file)
    result |= {"sampler": "optuna 4.9.0", "tried": {"optim.learning_rate": 0.5}}
    fsio.write_json(file, result)
    with pytest.raises(
        CheckFailed, match=r"is a try of learning rate 0\.5 by optuna 4\.9"
    ) as caught:
        _search(plan)
    assert "pip install 'optuna==4.9.0'" in caught.value.hint
    assert f"search mha anew: remove {file.parent}/search-mha-try*" in caught.value.hint


# ---------------------------------------------------------------- what is chosen


@needs_optuna
def test_the_lowest_loss_chooses_and_all_tries_are_written(tmp_path: Path) -> None:
    plan, notes = _plan(tmp_path, SAMPLED), Notes()
    jobs = [job for job in _search(plan) if job.variant == "mha"]
    best = min(jobs, key=_loss)
    with progress.using(notes):
        for _ in range(2):  # it is said once
            chosen = chosen_settings(plan, Job("mha", "", 4))
    assert best.tried is not None and chosen == dict(best.tried.settings)
    table = fsio.read_json(tmp_path / "campaign" / "search" / "mha.json")
    assert table["chosen"] == {key.removeprefix("optim."): v for key, v in chosen.items()}
    assert [row["valid_loss"] for row in table["rows"]] == [_loss(job) for job in jobs]
    assert table["ranges"] == {"learning_rate": [1e-4, 1e-1], "weight_decay": [0.01, 1]}
    assert table["seed"] == 3 and table["tokens"] == 768
    rate, decay = chosen.values()
    told = (
        f"info: mha: learning rate {rate:g}, weight decay {decay:g} (of 9 tries, validation loss "
    )
    assert notes.leveled[0].startswith(told) and len([t for t in notes.leveled if told in t]) == 1


def test_the_best_at_an_edge_is_warned_of(tmp_path: Path) -> None:
    plan, notes = _plan(tmp_path, "{learning_rates: [3e-2, 1e-1]}"), Notes()
    _search(plan)
    with progress.using(notes):
        assert chosen_settings(plan, Job("mha", "", 3)) == {"optim.learning_rate": 3e-2}
    assert notes.leveled[1] == (
        "warning: mha: the best learning rate 0.03, at the lower end of 0.03 to 0.1: a better one may "
        "lie beyond"
    )


@pytest.mark.parametrize(
    ("rate", "said"),
    [
        (1.3e-4, ["learning rate 0.00013, at the lower end of 0.0001 to 0.1"]),
        (1.6e-4, []),
        (6e-2, []),
        (8e-2, ["learning rate 0.08, at the upper end of 0.0001 to 0.1"]),
    ],
)
def test_of_a_range_an_edge_is_a_twentieth(tmp_path: Path, rate: float, said: list[str]) -> None:
    search = _plan(tmp_path, "{trials: 2, learning_rate: [1e-4, 1e-1]}").campaign.plan.search
    assert at_edge(search, {"optim.learning_rate": rate}) == said


def _stuck_run(folder: Path, *last: str) -> Run:
    run = Run.create(folder, "search-mha-lr0.1", "{}")
    run.start_attempt(from_step=0)
    for step in range(MAX_REFUSED_IN_A_ROW):
        run.log_event("update refused", step=step + 1, cause="loss is not finite")
    for kind in last:
        run.log_event(kind, cause="why")
    return run


@pytest.mark.parametrize(
    ("last", "is_diverged"),
    [(["failed"], True), ([], False), (["rolled back", "failed"], False), (["finished"], False)],
)
def test_a_run_has_diverged_when_its_refused_updates_ended_it(
    tmp_path: Path, last: list[str], is_diverged: bool
) -> None:
    assert diverged(_stuck_run(tmp_path, *last)) is is_diverged


def _diverging_above(limit: float) -> Callable[[Plan, Job], None]:
    def make(plan: Plan, job: Job) -> None:
        assert job.tried is not None
        if dict(job.tried.settings)["optim.learning_rate"] <= limit:
            return _write(plan, job)
        run = Run(plan.folder.run(job))
        fsio.write_json(plan.folder.result(job), divergence(job, run, "5 updates were refused"))

    return make


@pytest.mark.parametrize("search", [LISTED, pytest.param(SAMPLED, marks=needs_optuna)])
def test_a_try_that_diverged_is_an_outcome(tmp_path: Path, search: str) -> None:
    plan = _plan(tmp_path, search)
    _search(plan, _diverging_above(1.5e-2))
    assert chosen_settings(plan, Job("gqa", "", 3))["optim.learning_rate"] <= 1.5e-2
    rows: list[dict[str, Any]] = fsio.read_json(tmp_path / "campaign/search/gqa.json")["rows"]
    lost = [row for row in rows if row["valid_loss"] is None]
    assert lost and all(row["diverged"] == "5 updates were refused" for row in lost)
    none = _plan(tmp_path / "none", search)
    _search(none, _diverging_above(0.0))
    with pytest.raises(CheckFailed, match="mha: every try of its search diverged") as caught:
        chosen_settings(none, Job("mha", "", 3))
    assert "lower learning rates in search" in caught.value.hint
