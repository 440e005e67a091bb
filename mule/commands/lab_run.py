"""`mule lab run`: every run of a campaign, what is measured of each, and how far it has come."""

from __future__ import annotations

import itertools
import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import CheckFailed, Interrupted, UserError

if TYPE_CHECKING:
    from mule.config.campaign import Campaign
    from mule.config.schema import Recipe
    from mule.lab.campaign import Folder, Job, Plan
    from mule.lab.prepare import Shared
    from mule.train.signals import StopRequest

CAMPAIGNS = Path("campaigns")


def run(
    file: Path,
    overrides: list[str],
    *,
    root: Path = CAMPAIGNS,
    only: str | None = None,
    dry_run: bool = False,
    slurm: bool = False,
    task: int | None = None,
    modules: Sequence[str] = (),
) -> dict[str, Any]:
    """Make the runs of the campaign that are not made yet, in `root`/its name; the summary.

    `only` is a variant; `task` the number of a run, as a task of a SLURM array has it; `modules` the
    files that may be run, of variants that are modules of the user's.
    """
    from mule.config.campaign import load_campaign
    from mule.lab.campaign import Folder
    from mule.lab.own_module import check_named

    campaign = load_campaign(file, overrides)
    folder = Folder(root / campaign.name)
    again = ["mule", "lab", "run", str(file), *overrides]
    again += ["--root", str(root)] if root != CAMPAIGNS else []
    again += [word for module in modules for word in ("--module", module)]
    check_named(campaign, modules, [*again, "--dry-run"] if dry_run else again)
    if dry_run:
        from mule.commands.lab_dry_run import dry_run as look_ahead

        return look_ahead(campaign, folder, only) | {"next": shlex.join(again)}
    maker = _Maker(campaign, folder, again)
    if slurm:
        return maker.slurm()
    if task is not None:
        return maker.one(task)
    return maker.all(only)


class _Maker:
    """One start of a campaign."""

    def __init__(self, campaign: Campaign, folder: Folder, again: list[str]) -> None:
        self.campaign, self.folder, self.again = campaign, folder, again

    # ------------------------------------------------------------ the ways to run it

    def all(self, only: str | None) -> dict[str, Any]:
        """The search, the runs, and what is measured once they have ended."""
        from mule import locks
        from mule.lab.search import tries_in_turn
        from mule.train.signals import stop_on_signal

        started_at = time.monotonic()
        with locks.locked(self.folder.path / "campaign.lock", self._on_wait):
            self._begin(here=True)
            with stop_on_signal() as stop:
                runs = self.plan.jobs(only)
                steps = sum(self._steps(job) for job in (*self.plan.tries(only), *runs))
                jobs = itertools.chain(tries_in_turn(self.plan, only), runs)
                failed = self._make(jobs, stop, steps)
            if not failed:
                self._measure_shapes(only)
        done = [job for job in self.plan.jobs() if self.folder.result(job).is_file()]
        self._tell_of_speeds(done)
        summary: dict[str, Any] = {
            "campaign": str(self.folder.path),
            "runs": f"{len(done)} of {len(self.plan.jobs())}",
            **self._tries(),
            "seconds": time.monotonic() - started_at,
            "variants": self._table(),
        }
        if failed:
            return summary | {"ok": False, "failed": failed, "next": shlex.join(self.again)}
        return summary | {"next": f"mule lab report {shlex.quote(str(self.folder.path))}"}

    def one(self, task: int) -> dict[str, Any]:
        """The run of that number alone, in a campaign that --slurm has prepared."""
        from mule.train.signals import stop_on_signal

        if not self.folder.facts_file.is_file():
            raise UserError(
                f"{self.folder.path} is not prepared: a task of an array only trains",
                f"prepare it once, and write the script: {shlex.join([*self.again, '--slurm'])}",
            )
        self._begin(here=False)
        jobs = self.plan.jobs()
        if not 0 <= task < len(jobs):
            raise UserError(
                f"--task {task}: the campaign has the runs 0 to {len(jobs) - 1}",
                f"write the script anew: {shlex.join([*self.again, '--slurm'])}",
            )
        with stop_on_signal() as stop:
            failed = self._make([jobs[task]], stop, self._steps(jobs[task]))
        if failed:
            return {"run": jobs[task].name, "ok": False, "failed": failed}
        return {"run": jobs[task].name, "result": str(self.folder.result(jobs[task]))}

    def slurm(self) -> dict[str, Any]:
        """Prepare what the runs share, and write the script of the array."""
        from mule.lab.search import tries_left
        from mule.lab.slurm import write_array

        self._begin(here=False)
        if left := tries_left(self.plan):
            raise UserError(
                "--slurm: the tasks of an array cannot wait for the search, of which "
                f"{len(left)} of {len(self.plan.tries())} tries have no result yet",
                f"search first: {shlex.join(self.again)}; stop it (Ctrl-C) when the runs begin, and "
                "ask for the script again",
            )
        script = write_array(self.campaign, self.folder, len(self.plan.jobs()), self.again)
        return {
            "campaign": str(self.folder.path),
            "runs": len(self.plan.jobs()),
            "script": script,
            "gather": f"when all tasks have ended: {shlex.join(self.again)}",
            "next": f"sbatch {script}",
        }

    # ------------------------------------------------------------ what the runs share

    def _begin(self, *, here: bool) -> None:
        """Prepare, decide and write down what all runs share; check the runs made before."""
        from mule import fsio
        from mule.lab.campaign import Plan
        from mule.lab.facts import begin
        from mule.lab.prepare import prepare_shared
        from mule.lab.search import require_sampler
        from mule.plan.shape import embedding_rows

        known = self.folder.facts()
        if not known:
            require_sampler(self.campaign.plan.search)
        self.shared: Shared = prepare_shared(self.campaign, self.folder)
        rows = embedding_rows(self.shared.tokenizer.vocab_size)
        self.plan: Plan = Plan(self.campaign, self.folder, self.shared.recipe, vocab_rows=rows)
        self.facts = begin(
            self.campaign, self.plan, self.shared, known, machine=here and self._processes() == 1
        )
        if known != self.facts:
            fsio.write_text(self.folder.path / "campaign.yaml", self.campaign.text)
            fsio.write_json(self.folder.facts_file, self.facts)
        self.shape_rows = [self._shape_row(job) for job in self.plan.shapes()]
        fsio.write_json(self.folder.path / "shapes.json", self.shape_rows)
        self._warn()

    def _shape_row(self, job: Job) -> dict[str, Any]:
        from mule.commands.lab_shapes import shape_row

        plan, length = self.campaign.plan, self.campaign.shared.data.max_seq_length
        if (own := self.plan.own.get(job.variant)) is not None:
            row = own.row(job.shape, plan.budget, length)
            return row | {"across_documents": bool(self._keeps_apart())}
        variant, solved = plan.variants[job.variant], self.plan.solved(job)
        return shape_row(job.shape, variant, solved, context=length)

    def _warn(self) -> None:
        """Of runs that learn little, and of modules that see more of a row than others."""
        from mule.commands.lab_dry_run import few_updates

        if told := few_updates(self.plan, self.facts["pinned"]):
            progress.note(told, "warning")
        setting = self._keeps_apart()
        for own in self.plan.own.values() if setting else ():
            progress.note(own.across_documents(setting), "warning")

    def _keeps_apart(self) -> str:
        """The setting by which rows hold several documents that must not see each other, or ""."""
        data = self.campaign.shared.data
        settings = {"data.document_mask": data.document_mask, "data.packing": data.packing}
        return next((n for n, on in settings.items() if on and self.shared.train.isolated), "")

    def _on_wait(self) -> None:
        progress.note(f"another process runs {self.folder.path}: waiting for it to end")

    # ------------------------------------------------------------ the runs

    def _make(self, jobs: Iterable[Job], stop: StopRequest, steps: int) -> list[dict[str, Any]]:
        """Make those runs that have no result; what failed, with its cause.

        `steps` are the updates of all of them.
        """
        from mule.lab.alike import check_recipes

        recipes: dict[str, Recipe] = {}
        failed: list[dict[str, Any]] = []
        searched = self.campaign.plan.search.searched
        with progress.task("Campaign", total=steps, unit="updates") as bar:
            for job in jobs:
                try:
                    pinned = self._pinned(job)
                except CheckFailed as error:  # its search is not complete
                    failed.append(_failure(job, error))
                    continue
                recipe = recipes[job.name] = self.plan.recipe(job, pinned)
                if job.tried is None:
                    alike = {n: r for n, r in recipes.items() if not n.startswith("search-")}
                    check_recipes(alike, searched=searched)
                if self.folder.result(job).is_file():
                    self._check_made(job, recipe)
                    bar.advance(self._steps(job))
                    continue
                try:
                    self._make_one(job, recipe, stop, bar)
                except CheckFailed as error:
                    failed.append(_failure(job, error))
                except Interrupted as error:
                    error.hint = f"go on with: {shlex.join(self.again)}"
                    raise
        return failed

    def _make_one(self, job: Job, recipe: Recipe, stop: StopRequest, bar: progress.Task) -> None:
        from mule import fsio
        from mule.config.dump import to_yaml
        from mule.lab.crew import make

        file, done = self.folder.recipe(job), 0

        def on_row(row: dict[str, Any]) -> None:
            nonlocal done
            names = ("loss", "val_loss", "tokens_per_second", "share_of_peak")
            figures = {name: row[name] for name in names if row.get(name) is not None}
            if row["step"] > done:
                bar.advance(row["step"] - done, **figures)
                done = row["step"]

        fsio.write_text(file, to_yaml(recipe))
        sets = {"valid": list(self.shared.recipe.data.valid or [])}
        if job.tried is None:
            sets["test"] = self.shared.test_files
        order: dict[str, Any] = {"recipe": str(file), "name": job.name}
        order["root"] = str(self.folder.runs)
        order |= {"sets": sets, "prepared": str(self.folder.runs / ".prepared")}
        if job.variant in self.plan.own:
            order["module"] = asdict(self.plan.own[job.variant])
        try:
            make(order, self.folder.log(job), stop, on_row, processes=self._processes())
        except CheckFailed as error:
            if not self._has_diverged(job, error):
                raise
        else:
            self._check_made(job, recipe)
            self._write_result(job, recipe)
        bar.advance(max(0, self._steps(job) - done))

    def _has_diverged(self, job: Job, error: CheckFailed) -> bool:
        """Whether the job is a try that diverged, which is then written as its result."""
        from mule import fsio
        from mule.lab.search import diverged, divergence
        from mule.run import Run

        if job.tried is None or not diverged(run := Run(self.folder.run(job))):
            return False
        fsio.write_json(self.folder.result(job), divergence(job, run, error.message))
        progress.note(f"{error.message}: a try of the search that diverged", "warning")
        return True

    def _check_made(self, job: Job, recipe: Recipe) -> None:
        from mule.lab.alike import check_run
        from mule.run import Run

        check_run(Run.open(self.folder.run(job)), recipe, self.facts)

    def _write_result(self, job: Job, recipe: Recipe) -> None:
        from mule import fsio
        from mule.lab.results import result_of
        from mule.lab.search import about_try
        from mule.run import Run

        run = Run.open(self.folder.run(job))
        shape = next(row for row in self.shape_rows if row["variant"] == job.shape)
        result = result_of(job, run, recipe, shape)
        result |= about_try(job) if job.tried is not None else {}
        fsio.write_json(self.folder.result(job), result)
        losses = ", ".join(
            f"{name} {result[name]['loss']:.4f}" for name in ("valid", "test") if result.get(name)
        )
        speed = result["train"]["tokens_per_second"]
        progress.note(f"{job.name}: {losses}; {speed:,.0f} tokens/s")

    def _pinned(self, job: Job) -> dict[str, Any]:
        """What was decided for all runs, with what the variant's search chose."""
        from mule.lab.search import chosen_settings

        pinned = dict(self.facts["pinned"])
        if job.tried is None and self.campaign.plan.search.searched:
            pinned |= chosen_settings(self.plan, job)
        return pinned

    def _steps(self, job: Job) -> int:
        pinned = self.facts["pinned"]
        is_run = job.tried is None
        return pinned["train.steps"] if is_run else self.plan.steps_of_a_try(pinned)

    def _processes(self) -> int:
        if self.campaign.plan.processes is not None:
            return self.campaign.plan.processes
        import torch

        device = self.campaign.shared.train.device
        return max(1, torch.cuda.device_count()) if device in ("auto", "cuda") else 1

    # ------------------------------------------------------------ when the runs have ended

    def _measure_shapes(self, only: str | None) -> None:
        from mule.commands.lab_measure import measure_compiling, measure_decoding

        plan = self.campaign.plan
        jobs = [job for job in self.plan.shapes() if only in (None, job.variant)]
        if plan.decode.enabled:
            measure_decoding(jobs, self.folder, plan.decode)
        else:
            progress.note("decoding is not measured: decode.enabled is false")
        if plan.compile_table:
            recipes = {job: self.plan.recipe(job, self._pinned(job)) for job in jobs}
            measure_compiling(recipes, self.folder)

    def _tell_of_speeds(self, done: list[Job]) -> None:
        from mule.lab.alike import speed_differences
        from mule.run import Run

        for told in speed_differences([Run.open(self.folder.run(job)) for job in done]):
            progress.note(f"losses can be compared, speeds cannot: {told}", "warning")

    def _tries(self) -> dict[str, str]:
        from mule.lab.search import tries_left

        count = len(self.plan.tries())
        return {"tries": f"{count - len(tries_left(self.plan))} of {count}"} if count else {}

    def _table(self) -> list[dict[str, Any]]:
        from mule.lab.results import table

        return table(self.folder, self.plan)


def _failure(job: Job, error: CheckFailed) -> dict[str, Any]:
    """A run that failed, as the summary has it; said at once too."""
    progress.note(f"{error.message}; going on with the other runs", "warning")
    return {"run": job.name, "cause": error.message, "hint": error.hint}
