"""The search of a campaign: short runs of each variant, proposed in turn, and what they choose.

A list of learning rates is tried as it stands; a sampled search asks Optuna's TPE for one try after
the other. The results in search/ are its only record: a start tells them, in their order, to a fresh
study of the same seed, which then proposes what an unbroken search would have. Variants share the
seed, and so their first, random tries. No try is pruned: tries are short and can be gone on with, and
one that ends early leaves no loss of the same length to choose by.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mule import fsio, progress
from mule.config.search import SearchSection
from mule.errors import CheckFailed, UserError
from mule.lab.campaign import Job, Plan, Try
from mule.run import Run
from mule.train.guard import MAX_REFUSED_IN_A_ROW

_RANDOM_TRIES = 4  # Optuna's own 10 would be most of a small search
_DIGITS = 3  # of a proposal: more are noise, and differ between machines
_EDGE_SHARE = 0.05  # of a range, on its scale
_OUTCOMES = ("update refused", "rolled back", "failed")

Settings = dict[str, float]


def require_sampler(search: SearchSection) -> None:
    """UserError where the search is sampled and Optuna is not installed."""
    if search.trials is not None:
        _optuna()


def tries_in_turn(plan: Plan, only: str | None) -> Iterator[Job]:
    """The tries of each variant with their settings; the caller makes each before it asks for more.

    Where a try was left without result, no more of its variant are proposed. CheckFailed where the
    results are not those of this sampler.
    """
    for shape in plan.shapes():
        if only in (None, shape.variant):
            tries = _tries_of(plan, shape)
            yield from _sampled(plan, tries) if plan.campaign.plan.search.trials else tries


def tries_left(plan: Plan, only: str | None = None) -> list[Job]:
    """The tries that have no result yet."""
    return [job for job in plan.tries(only) if not plan.folder.result(job).is_file()]


def chosen_settings(plan: Plan, job: Job) -> Settings:
    """The settings of the try with the lowest validation loss, by dotted key.

    All tries of the job's variant in its size are written to search/<variant>.json. Raises
    CheckFailed where some have no result, or none has a loss.
    """
    tries = _tries_of(plan, job)
    found = [fsio.read_json(file) for t in tries if (file := plan.folder.result(t)).is_file()]
    if len(found) < len(tries):
        raise CheckFailed(
            f"{job.shape}: {len(found)} of the {len(tries)} tries of its search have a result",
            f"see {plan.folder.path / 'logs'} for the causes, and run the campaign again: it makes "
            "the others",
        )
    best = min(found, key=loss_of)
    if loss_of(best) == math.inf:
        raise CheckFailed(
            f"{job.shape}: every try of its search diverged",
            "begin another campaign (name=ANOTHER) with lower learning rates in search",
        )
    search = plan.campaign.plan.search
    table = {
        "variant": job.variant,
        "size": job.size,
        "seed": plan.campaign.plan.seeds[0],
        "tokens": best["tokens"],
        "sampler": best["sampler"],
        "ranges": {_short(key): list(ends) for key, ends in search.ranges.items()},
        "rows": [_row(result) for result in found],
        "chosen": {_short(key): value for key, value in best["tried"].items()},
        "at_edge": at_edge(search, best["tried"]),
    }
    _keep(plan, job, table, loss_of(best))
    return best["tried"]


def at_edge(search: SearchSection, settings: Settings) -> list[str]:
    """Which settings lie at an end of what was searched, in words: the best may lie beyond."""
    found = []
    for key, (low, high) in search.ranges.items():
        value = settings[key]
        share = math.log(value / low) / math.log(high / low)
        near = _EDGE_SHARE if search.trials is not None else 0.0
        if share <= near or share >= 1 - near:
            end = "lower" if share <= near else "upper"
            name = _short(key).replace("_", " ")
            found.append(f"{name} {value:g}, at the {end} end of {low:g} to {high:g}")
    return found


def loss_of(result: dict[str, Any]) -> float:
    """The validation loss of a try, in nats a token; infinite where it diverged."""
    loss = (result.get("valid") or {}).get("loss")
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def about_try(job: Job) -> dict[str, Any]:
    """What the result of a try says beside a run's."""
    assert job.tried is not None
    return {
        "try": job.tried.name,
        "tried": dict(job.tried.settings),
        "sampler": job.tried.sampler or None,
    }


def diverged(run: Run) -> bool:
    """Whether the run ended because its updates stayed refused, for which its settings are to blame."""
    kinds = [event["kind"] for event in run.events() if event["kind"] in _OUTCOMES]
    stuck = ["update refused"] * MAX_REFUSED_IN_A_ROW
    return run.state() == "failed" and kinds[-len(stuck) - 1 :] == [*stuck, "failed"]


def divergence(job: Job, run: Run, cause: str) -> dict[str, Any]:
    """The result of a try that diverged: an outcome of the search, not a failure of the campaign."""
    about = {"variant": job.variant, "seed": job.seed, "size": job.size, "run": str(run.folder)}
    return about | about_try(job) | {"diverged": cause}


# ---------------------------------------------------------------- sampling


class Proposals:
    """What Optuna's TPE proposes for one variant in one size: `ask`, then `tell` the loss."""

    def __init__(self, ranges: dict[str, tuple[float, float]], seed: int) -> None:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study and try
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIES)
        self.sampler = f"optuna {optuna.__version__}"
        self._study = optuna.create_study(sampler=sampler)
        self._ranges = ranges
        self._distributions = {
            key: optuna.distributions.FloatDistribution(low, high, log=True)
            for key, (low, high) in ranges.items()
        }
        self._asked: Any = None

    def ask(self) -> Settings:
        """The settings of the next try, of few digits."""
        self._asked = self._study.ask(self._distributions)
        found = {}
        for key, (low, high) in self._ranges.items():
            rounded = float(f"{self._asked.params[key]:.{_DIGITS}g}")
            found[key] = min(max(rounded, low), high)
        return found

    def tell(self, loss: float) -> None:
        """The loss of what was asked last; infinite where it diverged, so that it is avoided."""
        self._study.tell(self._asked, loss)


def _sampled(plan: Plan, tries: list[Job]) -> Iterator[Job]:
    """The tries with their settings, each proposed when those before it have their results."""
    files = [plan.folder.result(job) for job in tries]
    if all(file.is_file() for file in files):  # nothing to propose: Optuna is not needed
        yield from (_as_made(job, fsio.read_json(file)) for job, file in zip(tries, files))
        return
    search = plan.campaign.plan.search
    proposals = Proposals(search.ranges, plan.campaign.plan.seeds[0])
    for job, file in zip(tries, files):
        settings = proposals.ask()
        assert job.tried is not None
        if file.is_file():
            _check_same(plan, job, settings, proposals.sampler)
        tried = Try(job.tried.name, tuple(settings.items()), proposals.sampler)
        yield replace(job, tried=tried)
        if not file.is_file():
            return
        proposals.tell(loss_of(fsio.read_json(file)))


def _as_made(job: Job, result: dict[str, Any]) -> Job:
    assert job.tried is not None
    settings = tuple(result["tried"].items())
    return replace(job, tried=Try(job.tried.name, settings, result["sampler"]))


def _check_same(plan: Plan, job: Job, settings: Settings, sampler: str) -> None:
    file = plan.folder.result(job)
    result = fsio.read_json(file)
    if result["tried"] == settings:
        return
    raise CheckFailed(
        f"{file} is a try of {_told(result['tried'])} by {result['sampler']}, and {sampler} proposes "
        f"{_told(settings)} in its place: the tries after it would not follow from it",
        f"go on with the sampler that began: pip install '{result['sampler'].replace(' ', '==')}'; "
        f"or search {job.shape} anew: remove {file.parent}/search-{job.shape}-try* and "
        f"{plan.folder.runs}/search-{job.shape}-try*",
    )


def _optuna() -> Any:
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise UserError(
            "search.trials needs optuna, which is not installed",
            "install the extra: pip install 'mule[search]'; or list what to try: "
            "search.learning_rates=[3e-4, 1e-3, 3e-3]",
        ) from None


# ---------------------------------------------------------------- records


def _tries_of(plan: Plan, job: Job) -> list[Job]:
    """Those of the job's variant in its size."""
    return [other for other in plan.tries(job.variant) if other.shape == job.shape]


def _keep(plan: Plan, job: Job, table: dict[str, Any], loss: float) -> None:
    """Write the table of a search and say what was chosen, once."""
    file = plan.folder.per_shape("search", job.shape)
    if file.is_file() and fsio.read_json(file) == table:
        return
    fsio.write_json(file, table)
    told = f"of {len(table['rows'])} tries, validation loss {loss:.4f}"
    progress.note(f"{job.shape}: {_told(table['chosen'])} ({told})")
    for edge in table["at_edge"]:
        progress.note(f"{job.shape}: the best {edge}: a better one may lie beyond", "warning")


def _row(result: dict[str, Any]) -> dict[str, Any]:
    loss = loss_of(result)
    row = {_short(key): value for key, value in result["tried"].items()}
    row |= {"valid_loss": loss if math.isfinite(loss) else None, "run": result["run"]}
    return row | ({"diverged": result["diverged"]} if "diverged" in result else {})


def _short(key: str) -> str:
    """learning_rate of optim.learning_rate."""
    return key.rpartition(".")[2]


def _told(settings: Settings) -> str:
    return ", ".join(f"{_short(key).replace('_', ' ')} {v:g}" for key, v in settings.items())
