"""`mule lab run --dry-run`: which runs, how long, of what shapes; nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import MuleError

if TYPE_CHECKING:
    from mule.config.campaign import Campaign
    from mule.config.schema import Recipe
    from mule.lab.campaign import Folder, Job, Plan

_EAGER_SHARE = 0.25  # of the matmul peak, where no run of the variant has been measured
_START_S = 15.0  # a process, its libraries and its first update
_FORWARD_SHARE = 1 / 3  # of the work of training on a token


def dry_run(campaign: Campaign, folder: Folder, only: str | None) -> dict[str, Any]:
    """A row for each variant, the updates and tokens of a run, and about how long all takes.

    The speed of a variant is that of its runs so far; without any, its FLOPs at a quarter of this
    machine's matmul peak. What is measured when the runs have ended is not in the time.
    """
    from mule.lab.campaign import Plan
    from mule.plan.shape import embedding_rows

    shared = campaign.shared
    asked = shared.tokenizer.vocab_size or _size_of(folder, shared)
    plan = Plan(campaign, folder, shared, vocab_rows=embedding_rows(asked))
    pinned = folder.facts().get("pinned") or _lengths(shared)
    steps, step_rows = pinned["train.steps"], pinned["train.step_rows"]
    step_tokens = step_rows * shared.data.max_seq_length
    measured_on = [part["tokens"] for part in folder.facts().get("data", {}).values()][1:]
    work = steps * step_tokens + _FORWARD_SHARE * sum(measured_on)
    rows = [row for row in _rows(plan, work) if only in (None, row["variant"])]
    if told := few_updates(plan, pinned):
        progress.note(told, "warning")
    tries, try_steps = plan.tries(only), plan.steps_of_a_try(pinned)
    jobs = plan.jobs(only)
    todo, tries_todo = (
        [job for job in part if not folder.result(job).is_file()] for part in (jobs, tries)
    )
    seconds = {row["shape"]: row["run_s"] for row in rows}
    left = sum(seconds[job.shape] for job in todo)
    share = try_steps / steps
    left += sum(_START_S + share * (seconds[job.shape] - _START_S) for job in tries_todo)
    searched = {"tries": len(tries), "tries_to_do": len(tries_todo), "steps_of_a_try": try_steps}
    return {
        "campaign": str(folder.path),
        "runs": len(jobs),
        "runs_to_do": len(todo),
        **(searched if tries else {}),
        "steps": steps,
        "step_tokens": step_tokens,
        "tokens_of_a_run": steps * step_tokens,
        "tokens_in_all": (len(jobs) * steps + len(tries) * try_steps) * step_tokens,
        "seconds": left,
        "variants": rows,
    }


def few_updates(plan: Plan, pinned: dict[str, Any]) -> str | None:
    """What to say of runs that are too few updates to learn much; None of others."""
    from mule.lab.campaign import step_tokens
    from mule.plan.starvation import starved

    size = step_tokens(plan.campaign.shared, pinned)
    tokens = size * pinned["train.steps"]
    return starved(tokens, size, plan.active_params(plan.shapes()[0]))


def _rows(plan: Plan, tokens: float) -> list[dict[str, Any]]:
    """A row for each shape; `tokens` is the work of a run, as tokens trained on."""
    found = []
    for job in plan.shapes():
        figures = _figures(plan, job)
        speed = _measured_speed(plan, job.shape)
        flops = figures["flops_per_token"] or 6 * figures["active_params"]  # the least of a module
        row: dict[str, Any] = {"shape": job.shape, "variant": job.variant, "size": job.size}
        row |= figures | {
            "tokens_per_second": speed or _EAGER_SHARE * _peak(plan) / flops,
            "measured": speed is not None,
        }
        found.append(row | {"run_s": _START_S + tokens / row["tokens_per_second"]})
    return found


def _figures(plan: Plan, job: Job) -> dict[str, Any]:
    """What is known of a shape before anything is trained."""
    from mule.models import cost

    if (own := plan.own.get(job.variant)) is not None:
        return {
            "active_params": own.active_params,
            "total_params": own.sizes["total_params"],
            "flops_per_token": None,
            "residual": f"{own.residual(plan.campaign.plan.budget):+.2%}",
        }
    config, length = plan.solved(job).config, plan.campaign.shared.data.max_seq_length
    return {
        "active_params": cost.active_params(config),
        "total_params": cost.total_params(config),
        "flops_per_token": cost.train_flops_per_token(config, length),
        "residual": f"{plan.solved(job).residual:+.2%}",
    }


def _measured_speed(plan: Plan, shape: str) -> float | None:
    """Tokens per second over the runs of a shape, evaluations and starts included."""
    from mule import fsio

    files = [plan.folder.result(job) for job in plan.jobs() if job.shape == shape]
    results = [fsio.read_json(file) for file in files if file.is_file()]
    seconds = sum(result["seconds"] for result in results)
    return sum(result["tokens"] for result in results) / seconds if seconds else None


def _peak(plan: Plan) -> float:
    from mule import machine

    train = plan.campaign.shared.train
    device = "cpu" if train.device == "auto" else train.device
    dtype = train.precision
    if dtype == "auto":
        dtype = "bf16" if machine.has_fast_bf16() else "fp32"
    return machine.matmul_peak(dtype, device, machine.physical_cores())


def _size_of(folder: Folder, shared: Recipe) -> int:
    from mule.tokenizer import Tokenizer

    kept = folder.tokenizer
    named = kept if (kept / "tokenizer.json").is_file() else shared.tokenizer.path
    if named is None:
        from mule.errors import ConfigError

        raise ConfigError(
            [
                "a campaign needs a tokenizer: neither tokenizer.path nor tokenizer.vocab_size is set"
            ],
            "set tokenizer.vocab_size (for example 4096) to train one on data.train",
        )
    return Tokenizer.load(named).vocab_size


def _lengths(shared: Recipe) -> dict[str, Any]:
    """Updates and rows of an update, where the recipe says both without looking at the data."""
    train, length = shared.train, shared.data.max_seq_length
    rows = train.step_rows or max(1, (train.step_tokens or 8192) // length)
    steps = train.steps or (max(1, round(train.tokens / (rows * length))) if train.tokens else None)
    if steps is None or train.step_examples is not None:
        raise MuleError(
            "how many updates a run has follows from the data, which a dry run does not read",
            "give train.tokens or train.steps, and train.step_tokens or train.step_rows",
        )
    return {"train.steps": steps, "train.step_rows": rows}
