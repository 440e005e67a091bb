"""`mule bench compile`: what torch.compile costs, what it gains, and whether it compiles only once.

Every way is measured in a fresh process, since a process compiles only the first time.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mule import progress
from mule.errors import UserError

_WARM_UP = 3  # updates; whatever is compiled later is a fault
_TIMED = 8  # updates, at least; each with another number of trained tokens where it is of chats
_TIMED_S = 10.0  # and at least so long
_OTHER_UNITS = {"train.step_tokens", "train.step_examples"}  # of what train.step_rows says
_WAYS = {  # by name: compiled or not, rows of text or packed chats, and which cache
    "eager": (False, "rows", None),
    "compiled": (True, "rows", "rows"),
    "compiled, kept": (True, "rows", "rows"),
    "eager chats": (False, "chats", None),
    "compiled chats": (True, "chats", "chats"),
}


def compare(words: list[str]) -> dict[str, Any]:
    """Eager, compiled, and compiled again with the cache that this left; rows of text and chats.

    `faults` says where the compiler cut a function in two, and what it compiled again.
    """
    from mule.commands import bench
    from mule.plan.shape import new_model_config

    _refuse_compile(words)
    resolved = bench._resolved(bench._recipe(words))
    settings = bench._settings_used(resolved)
    del settings["compile"]
    words = _fixed(words, settings)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mule-bench-compile-") as folder:
        with progress.task("Measuring", total=len(_WAYS), unit="process") as bar:
            for name, (compiled, kind, cache) in _WAYS.items():
                job = {"words": [*words, f"train.compile={compiled}".lower()], "kind": kind}
                job |= {"timed": _TIMED, "timed_s": _TIMED_S}
                found[name] = _in_a_process(job, Path(folder) / (cache or "none"))
                bar.advance(1)
    return judge(found) | {
        "tokens_per_update": resolved.step_rows * resolved.recipe.data.max_seq_length,
        "model": bench._model_figures(resolved.recipe, new_model_config(resolved.recipe, 1)),
        "settings": settings,
    }


def measure_gain(words: list[str]) -> dict[str, Any]:
    """One model, eager and compiled, rows of text: what compiling costs once and gains on and on.

    `words` say all that decides an update. `gain` is how many times faster a compiled one is.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="mule-bench-compile-") as folder:
        for compiled in (False, True):
            job = {"words": [*words, f"train.compile={compiled}".lower()], "kind": "rows"}
            job |= {"timed": _TIMED, "timed_s": _TIMED_S}
            found["compiled" if compiled else "eager"] = _in_a_process(job, Path(folder))
    eager, compiled = found["eager"], found["compiled"]
    return {
        "graph_breaks": compiled["graph_breaks"],
        "recompiles": compiled["recompiles"],
        "compile_s": max(0.0, compiled["start_s"] - eager["start_s"]),
        "gain": eager["update_s"] / compiled["update_s"],
        "eager_update_s": eager["update_s"],
        "compiled_update_s": compiled["update_s"],
        "faults": compiled["faults"],
    }


def judge(found: dict[str, Any]) -> dict[str, Any]:
    """What the measured ways (by name, as `measure` gives them) come to.

    Compiling for a process costs what its first updates take beyond steady ones; it has paid off
    when the steady updates have saved as much.
    """
    eager, cold, kept = (found[name] for name in ("eager", "compiled", "compiled, kept"))
    saved_s = eager["update_s"] - cold["update_s"]
    pays = {
        "after_updates": _break_even(cold["start_s"] - eager["start_s"], saved_s),
        "kept_after_updates": _break_even(kept["start_s"] - eager["start_s"], saved_s),
    }
    return {
        "verdict": _verdict(pays, eager),
        "share_saved": saved_s / eager["update_s"],
        "share_saved_chats": 1
        - found["compiled chats"]["update_s"] / found["eager chats"]["update_s"],
        "pays": pays,
        "ways": {name: _shown(way) for name, way in found.items()},
        "faults": [f"{name}: {fault}" for name, way in found.items() for fault in way["faults"]],
    }


def row(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a kept result that fit one line of a table."""
    ways, pays = result["ways"], result["pays"]
    return {
        "model": result["model"]["name"],
        "cpu": result["machine"]["gpu"] or result["machine"]["cpu"],
        "precision": result["settings"]["precision"],
        "eager_update_s": ways["eager"]["update_s"],
        "compiled_update_s": ways["compiled"]["update_s"],
        "share_saved": result["share_saved"],
        "first_update_s": ways["compiled"]["first_update_s"],
        "kept_first_update_s": ways["compiled, kept"]["first_update_s"],
        "pays_after_updates": pays["after_updates"],
        "faults": len(result["faults"]),
        "date": result["date"],
        "command": result["command"],
    }


# ---------------------------------------------------------------- one process


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Times of whole updates in this process, and what was compiled before and while they ran."""
    import torch
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    from mule.commands import bench
    from mule.plan.shape import new_model_config
    from mule.train.assemble import loss_scaler, model_and_optimizer
    from mule.train.compiler import Watch
    from mule.train.step import train_step

    config.recompile_limit = 1_000  # beyond it torch computes eagerly and says nothing more
    torch.manual_seed(0)
    watch, resolved = Watch(), bench._resolved(bench._recipe(job["words"]))
    shape = new_model_config(resolved.recipe, 1)
    model, optimizer = model_and_optimizer(resolved.recipe, shape, None)
    scaler = loss_scaler(resolved)

    def update() -> float:
        started_at = time.perf_counter()
        batches = bench._batches(resolved, shape.vocab_size, job["kind"])
        train_step(model, optimizer, batches, lr=1e-4, max_grad_norm=1.0, scaler=scaler)
        return time.perf_counter() - started_at

    first = [update() for _ in range(_WARM_UP)]
    before = watch.look()
    timed: list[float] = []
    while len(timed) < job["timed"] or sum(timed) < job["timed_s"]:
        timed.append(update())
    after = watch.look()
    again = [f"{graph.function} compiled again: {graph.why}" for graph in before.recompiles]
    late = [
        f"{graph.function} compiled after {_WARM_UP} updates: {graph.why}" for graph in after.graphs
    ]
    return {
        "first_update_s": first[0],
        "update_s": statistics.median(timed),
        "start_s": max(0.0, sum(first) - _WARM_UP * statistics.median(timed)),
        "timed_updates": len(timed),
        "graphs": len(before.graphs) + len(after.graphs),
        "graph_breaks": len(before.breaks) + len(after.breaks),
        "recompiles": len(again) + len(late),
        "kept_hits": counters["inductor"]["fxgraph_cache_hit"],
        "faults": [*(f"cut at {place}" for place in before.breaks + after.breaks), *again, *late],
    }


def _in_a_process(job: dict[str, Any], cache: Path) -> dict[str, Any]:
    """What `measure` finds in a fresh process whose compiled code is kept in `cache`."""
    command = [sys.executable, "-m", "mule.commands.bench_compile", json.dumps(job)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.startswith("hint:")]
        raise UserError(
            ": ".join([f"a process that measured ended with {done.returncode}", *said[-1:]]),
            "measure a smaller model, if memory ran out: model.size=10m",
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _fixed(words: list[str], settings: dict[str, Any]) -> list[str]:
    """The words with what was resolved from them, so that every process measures the same."""
    decided = {f"train.{key}": value for key, value in settings.items()}
    open_ = (w for w in words if w.partition("=")[0] not in decided.keys() | _OTHER_UNITS)
    return [*open_, *(f"{key}={value}" for key, value in decided.items())]


def _refuse_compile(words: list[str]) -> None:
    if any(word.partition("=")[0] == "train.compile" for word in words):
        raise UserError(
            "train.compile cannot be given: `mule bench compile` measures with it and without",
            "remove it, or measure one way: mule bench train train.compile=false",
        )


# ---------------------------------------------------------------- figures


def _break_even(cost_s: float, saved_s: float) -> int | None:
    """Updates after which `cost_s` seconds are saved, at `saved_s` an update; None for never."""
    return None if saved_s <= 0 else max(1, math.ceil(cost_s / saved_s))


def _verdict(pays: dict[str, int | None], eager: dict[str, Any]) -> str:
    updates, kept = pays["after_updates"], pays["kept_after_updates"]
    if updates is None:
        return (
            "does not pay off: a compiled update takes no less time; train with train.compile=false"
        )
    again = f"; from the second start on after {kept:,}" if kept and kept < updates else ""
    minutes = (eager["start_s"] + updates * eager["update_s"]) / 60
    return (
        f"pays off after {updates:,} updates ({minutes:.1f} minutes){again}; "
        "a run shorter than this is faster with train.compile=false"
    )


def _shown(way: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in way.items() if name != "faults"}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
