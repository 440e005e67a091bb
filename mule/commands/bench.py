"""`mule bench`: how fast Mule is on this machine, measured the way a run would use it."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio, machine, progress
from mule.config.hints import near
from mule.errors import CheckFailed, UserError

if TYPE_CHECKING:
    import torch

    from mule.batch import Batch
    from mule.config.schema import Recipe
    from mule.models.config import ModelConfig
    from mule.plan.resolve import Resolved

RESULTS = Path("bench/results")

_TRAIN = {  # the benchmark's recipe; key=value words replace these
    "model.size": "25m",
    "model.vocab_size": "32768",
    "data.max_seq_length": "1024",
    "train.steps": "1000",
    "train.compile": "true",
}
_WARM_UP, _MAX_WARM_UP = 5, 20  # updates
_STEADY_SHARE = 0.05  # the last three updates differ by no more
_TIMED = 10  # updates, at least
_TIMED_S = 20.0  # and at least so long
_MANY_ROWS = 1_000_000  # the data is made up, so there is always more of it


def run(what: str, words: list[str], *, results: Path = RESULTS) -> dict[str, Any]:
    """Run one benchmark, or all of them; each leaves `results`/<name>.json."""
    if what == "report":
        return report(results)
    if what == "all":
        for name in BENCHES:
            if name not in _OF_WHAT_IS_NAMED:
                _one(name, words, results)
        return report(results) | {"next": "make docs"}
    if what not in BENCHES:
        known = ", ".join([*BENCHES, "all", "report"])
        match = near(what, BENCHES)
        hint = f"did you mean `{match}`?" if match else f"one of {known}"
        raise UserError(f"there is no benchmark called `{what}`", hint)
    return _one(what, words, results) | {"next": "mule bench report"}


def with_options(what: str, words: list[str], options: dict[str, str | None]) -> list[str]:
    """The words, and what was given as options of `mule bench kv`."""
    given = {name: value for name, value in options.items() if value is not None}
    if given and what != "kv":
        raise UserError(
            f"--{next(iter(given))} is an option of `mule bench kv`",
            f"leave it out: {what} has none",
        )
    return [*words, *(f"{name}={value}" for name, value in given.items())]


def report(results: Path = RESULTS) -> dict[str, Any]:
    """What was measured before: a row for each file of results."""
    from mule.commands.bench_compile import row as compile_row
    from mule.commands.bench_kv import row as kv_row
    from mule.commands.bench_merge import row as merge_row

    found = {
        name: [fsio.read_json(file) for file in sorted(results.glob(f"{name}*.json"))]
        for name in BENCHES
    }
    rows = [_row(result) for result in found["train"]]
    shown: dict[str, Any] = {"benches": rows}
    if found["compile"]:
        shown["compiling"] = [compile_row(result) for result in found["compile"]]
    if found["merge"]:
        shown["merging"] = [merge_row(result) for result in found["merge"]]
    if found["kv"]:
        shown["caches"] = [kv_row(result) for result in found["kv"]]
    return shown | {"next": "mule bench train" if not rows else "make docs"}


def train(words: list[str]) -> dict[str, Any]:
    """Whole training updates of a model on made-up text: forward, backward, clipping, AdamW.

    Loss and update are those of a run (`train_step`), in the precision and the micro-batch that a
    run would choose. Times are of whole updates, the making of the batch included.
    """
    from mule.plan.shape import new_model_config
    from mule.train.assemble import loss_scaler, model_and_optimizer
    from mule.train.meter import peak_memory_bytes
    from mule.train.step import train_step

    recipe = _recipe(words)
    config = new_model_config(recipe, 1)
    resolved = _resolved(recipe)
    settings = resolved.recipe.train
    peak = (settings.precision, settings.device, int(settings.threads))
    peak_before = machine.matmul_peak(*peak, fresh=True)
    model, optimizer = model_and_optimizer(resolved.recipe, config, None)
    scaler = loss_scaler(resolved)

    def update() -> float:
        started_at = time.perf_counter()
        batches = _batches(resolved, config.vocab_size)
        train_step(model, optimizer, batches, lr=1e-4, max_grad_norm=1.0, scaler=scaler)
        return time.perf_counter() - started_at

    warm_up, timed = _warm_up(update), _timed(update)
    peak_after = machine.matmul_peak(*peak, fresh=True)
    rates = _rates(sum(timed) / len(timed), resolved, config)
    return {
        "share_of_peak": rates["flops_per_second"] / max(peak_before, peak_after),
        "peak_flops_before": peak_before,
        "peak_flops_after": peak_after,
        "peak_memory_bytes": peak_memory_bytes(),
        "update_median_s": statistics.median(timed),
        "update_min_s": min(timed),
        "update_max_s": max(timed),
        "first_update_s": warm_up[0],
        "warm_up_updates": len(warm_up),
        "timed_updates": len(timed),
        **rates,
        "settings": _settings_used(resolved),
    }


def _settings_used(resolved: Resolved) -> dict[str, Any]:
    """What of the recipe decides the speed, beside the model."""
    names = {"step_rows", "micro_batch_rows", "precision", "compile", "device", "threads"}
    return resolved.recipe.train.model_dump(include=names)


def _rates(update_s: float, resolved: Resolved, config: ModelConfig) -> dict[str, Any]:
    """Tokens and useful FLOPs a second, and what they are computed from."""
    from mule.models import cost

    recipe, row_length = resolved.recipe, resolved.recipe.data.max_seq_length
    tokens = resolved.step_rows * row_length
    flops_per_token = cost.train_flops_per_token(config, row_length)
    return {
        "tokens_per_second": tokens / update_s,
        "flops_per_second": tokens * flops_per_token / update_s,
        "tokens_per_update": tokens,
        "flops_per_token": flops_per_token,
        "model": _model_figures(recipe, config),
    }


def _model_figures(recipe: Recipe, config: ModelConfig) -> dict[str, Any]:
    """The model that was measured."""
    from mule.models import cost

    return {
        "name": recipe.model.size or "own shape",
        "params": cost.total_params(config),
        "matmul_params": cost.matmul_params(config),
        "vocab_size": config.vocab_size,
        "row_length": recipe.data.max_seq_length,
    }


def compiling(words: list[str]) -> dict[str, Any]:
    """What torch.compile costs and gains; in mule/commands/bench_compile.py."""
    from mule.commands.bench_compile import compare

    return compare(words)


def merging(words: list[str]) -> dict[str, Any]:
    """An adapter on its base against the same model merged; in mule/commands/bench_merge.py."""
    from mule.commands.bench_merge import compare

    return compare(words)


def keeping_keys(words: list[str]) -> dict[str, Any]:
    """What a cache of keys and values gains and takes; in mule/commands/bench_kv.py."""
    from mule.commands.bench_kv import compare

    return compare(words)


BENCHES: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "train": train,
    "compile": compiling,
    "merge": merging,
    "kv": keeping_keys,
}
_OF_WHAT_IS_NAMED = {"merge", "kv"}  # an adapter, a model or a shape; so not part of `all`


# ---------------------------------------------------------------- one benchmark


def _one(name: str, words: list[str], results: Path) -> dict[str, Any]:
    """Measure, describe the machine, and write the file."""
    import shlex
    from datetime import UTC, datetime

    import torch

    import mule

    figures = BENCHES[name](words)
    slug = "-".join(re.sub(r"[^A-Za-z0-9]+", "-", word).strip("-") for word in words)
    file = results / (f"{name}-{slug[:80]}.json" if words else f"{name}.json")
    result = {
        "bench": name,
        "command": shlex.join(["mule", "bench", name, *words]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "mule": mule.__version__,
        "torch": torch.__version__,
        **figures,
        "machine": machine.describe() | {"gpu": _gpu_name()},
    }
    fsio.write_json(file, result)
    if faults := figures.get("faults"):
        raise CheckFailed(
            f"what is compiled has faults ({len(faults)}, all in {file}):\n" + "\n".join(faults),
            f"torch tells more: TORCH_LOGS=graph_breaks,recompiles {result['command']}",
        )
    return {"file": str(file), **result}


def _row(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a result that fit one line of a table."""
    settings = result["settings"]
    return {
        "bench": result["bench"],
        "model": result["model"]["name"],
        "cpu": result["machine"]["gpu"] or result["machine"]["cpu"],
        "precision": settings["precision"],
        "tokens_per_second": result["tokens_per_second"],
        "gflops": result["flops_per_second"] / 1e9,
        "peak_gflops": max(result["peak_flops_before"], result["peak_flops_after"]) / 1e9,
        "share_of_peak": result["share_of_peak"],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "date": result["date"],
        "command": result["command"],
    }


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# ---------------------------------------------------------------- training


def _recipe(words: list[str]) -> Recipe:
    from mule.config.load import load_recipe

    given = {word.partition("=")[0] for word in words}
    defaults = [f"{key}={value}" for key, value in _TRAIN.items() if key not in given]
    return load_recipe(None, [*defaults, *words], complete=False).recipe


def _resolved(recipe: Recipe) -> Resolved:
    """The recipe as a run on this machine would have it."""
    import torch

    from mule.plan.resolve import Facts, resolve
    from mule.plan.shape import new_model_config

    fast_bf16, row_length = machine.has_fast_bf16(), recipe.data.max_seq_length
    facts = Facts(
        num_rows=_MANY_ROWS,
        row_length=row_length,
        targets_per_row=row_length,
        examples_per_row=1,
        cpu_cores=machine.physical_cores(),
        fast_bf16=fast_bf16,
        cpp_compiler=machine.has_cpp_compiler(),
        available_bytes=machine.available_bytes(),
        matmul_peak_flops=1e12,  # used to decide on compiling only, which is decided
        cuda=torch.cuda.is_available(),
        mps=torch.backends.mps.is_available(),
    )
    if recipe.train.device in ("auto", "cpu") and not facts.cuda and not facts.mps:
        if recipe.train.compile is True and (problem := machine.cpp_compiler_problem()):
            raise UserError(
                f"a compiled model cannot be measured: {problem}",
                "install a C++ compiler, or measure without: train.compile=false",
            )
    return resolve(recipe, new_model_config(recipe, 1), facts)


def _batches(resolved: Resolved, vocab_size: int, kind: str = "rows") -> list[Batch]:
    """One update of random tokens, cut as a run would.

    `rows` are windows of a text: every token is trained, attention is causal. `chats` are packed
    with examples kept apart, of which a share is trained that differs from update to update.
    """
    import torch

    from mule.batch import Batch

    recipe = resolved.recipe
    rows, length = resolved.step_rows, recipe.data.max_seq_length
    device = torch.device(recipe.train.device)
    ids = torch.randint(0, vocab_size, (rows, length + 1))
    targets = ids[:, 1:]
    positions = torch.arange(length).expand(rows, length)
    segments = torch.ones_like(positions)
    if kind == "chats":
        targets, positions, segments = _packed(targets, positions)
    size = int(recipe.train.micro_batch_rows)
    tensors = (ids[:, :-1], targets, positions, segments)
    parts = zip(*(tensor.split(size) for tensor in tensors))
    return [Batch(*part, isolated=kind == "chats").to(device) for part in parts]


def _packed(
    targets: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Targets, positions and segments (B, T) of rows that are cut into examples at random."""
    import torch

    from mule.batch import IGNORE

    starts = torch.rand(places.shape) < 4 / places.shape[1]  # about five examples a row
    starts[:, 0] = True
    first = torch.where(starts, places, 0).cummax(dim=1).values
    trained = torch.rand(places.shape) < torch.rand(())
    trained[:, 0] = True  # a row has an answer at least
    return torch.where(trained, targets, IGNORE), places - first, starts.cumsum(dim=1)


def _warm_up(update: Callable[[], float]) -> list[float]:
    """Seconds of updates until they are steady: the first ones compile and touch fresh memory."""
    times: list[float] = []
    with progress.task("Warming up", unit="update") as bar:
        while len(times) < _WARM_UP or (len(times) < _MAX_WARM_UP and not _steady(times[-3:])):
            times.append(update())
            bar.advance(1)
    if not _steady(times[-3:]):
        progress.note(
            f"updates still differ by more than {_STEADY_SHARE:.0%}: something else is running",
            "warning",
        )
    return times


def _steady(times: list[float]) -> bool:
    return max(times) - min(times) <= _STEADY_SHARE * min(times)


def _timed(update: Callable[[], float]) -> list[float]:
    times: list[float] = []
    with progress.task("Measuring", unit="update") as bar:
        while len(times) < _TIMED or sum(times) < _TIMED_S:
            times.append(update())
            bar.advance(1)
    return times
