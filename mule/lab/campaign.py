"""A campaign's folder, and the runs that it is made of.

campaigns/<name>/
  campaign.yaml   as typed              campaign.json   what all runs share, decided once
  shapes.json     a row per variant     tokenizer/      trained or copied once
  data/           where shares of the sources are held out: the three parts
  runs/<variant>-<size>-s<seed>/        ordinary runs; <size>- where there are several
  recipes/        the recipe of each    logs/           what each run said
  results/ search/ decode/ compile/     a file per run, per variant
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mule import fsio
from mule.config.campaign import Campaign
from mule.config.dump import with_values
from mule.config.schema import Recipe
from mule.config.search import SearchSection
from mule.errors import UserError
from mule.lab.own_module import OwnModule, own_modules
from mule.models.solve import Solved, solve_all
from mule.plan.shape import model_settings

_SEARCHED_SHARE = 5  # a try of the search is a fifth of a run, where its length is not given


@dataclass(frozen=True)
class Try:
    """A try of the search: its name, and its settings by dotted key.

    Those of a sampled one are empty until it is proposed (mule/lab/search.py), `sampler` says by what.
    """

    name: str
    settings: tuple[tuple[str, float], ...] = ()
    sampler: str = ""


@dataclass(frozen=True)
class Job:
    """One run of a campaign, or a try of its search."""

    variant: str
    size: str  # "" where the campaign has one size
    seed: int
    tried: Try | None = None

    @property
    def shape(self) -> str:
        """The name of the variant in its size."""
        return f"{self.variant}-{self.size}" if self.size else self.variant

    @property
    def name(self) -> str:
        if self.tried is not None:
            return f"search-{self.shape}-{self.tried.name}"
        return f"{self.shape}-s{self.seed}"


@dataclass(frozen=True)
class Folder:
    """Where the parts of a campaign are."""

    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    def run(self, job: Job) -> Path:
        return self.runs / job.name

    def recipe(self, job: Job) -> Path:
        return self.path / "recipes" / f"{job.name}.yaml"

    def log(self, job: Job) -> Path:
        return self.path / "logs" / f"{job.name}.log"

    def result(self, job: Job) -> Path:
        part = "search" if job.tried is not None else "results"
        return self.path / part / f"{job.name}.json"

    def per_shape(self, what: str, shape: str) -> Path:
        """The file of a variant in its size: of decode, compile or search."""
        return self.path / what / f"{shape}.json"

    @property
    def facts_file(self) -> Path:
        return self.path / "campaign.json"

    def facts(self) -> dict[str, Any]:
        """What was decided for all runs; empty before."""
        return fsio.read_json(self.facts_file) if self.facts_file.is_file() else {}


class Plan:
    """The runs of a campaign, and the recipe of each."""

    def __init__(
        self, campaign: Campaign, folder: Folder, shared: Recipe, *, vocab_rows: int
    ) -> None:
        """`shared` are the campaign's sections, with the files of held-out shares in place.

        Variants that are modules of the user's are examined here, once in a campaign: in `own`.
        """
        self.campaign, self.folder = campaign, folder
        self._shared, self._vocab_rows = shared, vocab_rows
        known = folder.facts().get("modules", {})
        self.own: dict[str, OwnModule] = own_modules(
            campaign, vocab_rows=vocab_rows, known=known, runs=folder.runs
        )

    @property
    def sizes(self) -> list[str]:
        """The names of the sizes; one without a name where there is one."""
        return [str(size) for size in self.campaign.plan.sizes] or [""]

    def jobs(self, only: str | None = None) -> list[Job]:
        """The runs: seed by seed, so that an early stop leaves whole comparisons."""
        self._check_known(only)
        return [
            Job(variant, size, seed)
            for seed in self.campaign.plan.seeds
            for size in self.sizes
            for variant in self.campaign.plan.variants
            if only in (None, variant)
        ]

    def tries(self, only: str | None = None) -> list[Job]:
        """The short runs of the search; often none. Sampled ones are not proposed yet."""
        self._check_known(only)
        plan = self.campaign.plan
        return [
            Job(variant, size, plan.seeds[0], tried)
            for size in self.sizes
            for variant in plan.variants
            if only in (None, variant)
            for tried in _tries(plan.search)
        ]

    def shapes(self) -> list[Job]:
        """A job for each variant in each size, of the first seed."""
        return [job for job in self.jobs() if job.seed == self.campaign.plan.seeds[0]]

    def solved(self, job: Job) -> Solved:
        """The shape of the model that the job trains, if it is one of Mule's."""
        return self._solved[(job.variant, job.size)]

    @cached_property
    def _solved(self) -> dict[tuple[str, str], Solved]:
        plan, length = self.campaign.plan, self.campaign.shared.data.max_seq_length
        variants = {n: variant for n, variant in plan.variants.items() if n not in self.own}
        found = {}
        for size in self.sizes:
            budget = plan.budget.of_size(_typed(size)) if size else plan.budget
            solved = solve_all(budget, variants, vocab_size=self._vocab_rows, max_seq_length=length)
            found |= {(name, size): shape for name, shape in solved.items()}
        return found

    def active_params(self, job: Job) -> int:
        """Parameters that a token passes in the model that the job trains."""
        own = self.own.get(job.variant)
        return self.solved(job).active_params if own is None else own.active_params

    def _of_the_variant(self, job: Job) -> dict[str, Any]:
        """What a recipe says of the job's model."""
        if job.variant in self.own:
            return self.own[job.variant].recipe_values()
        routing = self.campaign.plan.variants[job.variant].routing()
        return model_settings(self.solved(job).config, routing)

    def recipe(self, job: Job, pinned: dict[str, Any]) -> Recipe:
        """The recipe of a run: what is shared, what was decided for all, and what its variant says."""
        values: dict[str, Any] = {"name": job.name, "tokenizer.path": str(self.folder.tokenizer)}
        values |= {"tokenizer.vocab_size": None, "train.seed": job.seed} | pinned
        values |= self._of_the_variant(job)
        if job.tried is not None:
            values |= self._of_a_try(pinned) | dict(job.tried.settings)
        return with_values(self._shared, values)

    def steps_of_a_try(self, pinned: dict[str, Any]) -> int:
        """Updates of a short run of the search."""
        tokens = self.campaign.plan.search.tokens
        if tokens is None:
            return max(2, pinned["train.steps"] // _SEARCHED_SHARE)
        return max(2, round(tokens / step_tokens(self._shared, pinned)))

    def _of_a_try(self, pinned: dict[str, Any]) -> dict[str, Any]:
        """A try of the search is a run of its own length, whose warm-up is as long a part of it."""
        short = self.steps_of_a_try(pinned)
        warmup = round(pinned["optim.warmup_steps"] * short / pinned["train.steps"])
        return {
            "train.steps": short,
            "optim.warmup_steps": min(warmup, short - 1),
            "evaluate.every_steps": short,
            "checkpoint.every_steps": short,
        }

    def _check_known(self, only: str | None) -> None:
        if only is not None and only not in self.campaign.plan.variants:
            names = ", ".join(self.campaign.plan.variants)
            raise UserError(f"--only {only}: no such variant", f"the campaign has {names}")


def _tries(search: SearchSection) -> list[Try]:
    if search.trials is not None:
        return [Try(f"try{number:02d}") for number in range(1, search.trials + 1)]
    return [Try(f"lr{rate:g}", (("optim.learning_rate", rate),)) for rate in search.learning_rates]


def step_tokens(shared: Recipe, pinned: dict[str, Any]) -> int:
    """Positions of one update."""
    return shared.data.max_seq_length * pinned["train.step_rows"]


def _typed(size: str) -> int | str:
    return int(size) if size.isdigit() else size
