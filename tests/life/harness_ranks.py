"""Harness A, with several processes: figure F6, and what the tests of distributed runs share."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from mule.run import Run
from tests.life.harness import Lab, Trial
from tests.life.tiny_life import Server

# 7 rows divide evenly among 1 process only.
SETTINGS = (
    *("train.steps=20", "train.step_rows=7", "train.precision=fp32", "optim.learning_rate=0.003"),
    *("checkpoint.keep=9", "evaluate.max_rows=5"),
)
TRAIN = ("train", "pretrain.yaml", *SETTINGS)
TOLERANCE = 1e-5


@dataclass
class Ended:
    """How the processes of one run ended, and what each wrote on the screen."""

    codes: list[int]
    texts: list[str]


class Ranks(Server):
    """The server of tests/life/ranks.py, from the side of a test."""

    def __init__(self) -> None:
        super().__init__("tests.life.ranks")

    def run(
        self,
        folder: Path,
        world_size: int,
        *words: str,
        fault: dict[str, Any] | None = None,
        meanwhile: Callable[[list[int]], None] | None = None,
        local_size: int | None = None,
    ) -> Ended:
        """Run `mule <words>` in `folder` as so many processes, `local_size` of them a machine."""
        job = {"folder": str(folder), "words": words, "world_size": world_size}
        job |= {"local_size": local_size}
        begun = (lambda said: meanwhile(said["pids"])) if meanwhile else None
        codes = self._ask(job | {"fault": fault or {}}, begun)["codes"]
        logs = (folder / f"output-{rank}.log" for rank in range(world_size))
        return Ended(codes, [" ".join(log.read_text().split()) for log in logs])


def facts(folder: Path, world_size: int, name: str = "pretrain") -> dict[str, Any]:
    """What is to be equal: the rows of each update in order, the log, and the last weights."""
    noted = [rows_noted(folder / f"rows-{rank}.jsonl") for rank in range(world_size)]
    run = Run.open(folder / "runs" / name)
    step, checkpoint = run.checkpoints()[-1]
    weights = next(file for file in checkpoint.glob("*model.safetensors"))
    return {
        "folder": folder,
        "rows": {step: [row for of in noted for row in of[step]] for step in noted[0]},
        "log": run.metrics(),
        "step": step,
        "weights": load_file(weights),
    }


def rows_noted(file: Path) -> dict[int, list[int]]:
    """The rows of one process, by update."""
    found: dict[int, list[int]] = {}
    for line in file.read_text().splitlines():
        noted = json.loads(line)
        found.setdefault(noted["step"], []).extend(noted["rows"])
    return found


def check_same(found: dict[str, Any], alone: dict[str, Any], from_step: int = 0) -> None:
    """The same rows in the same order, and figures and weights equal but for rounding."""
    steps = len(alone["log"])
    assert found["rows"] == {s: alone["rows"][s] for s in range(from_step, steps)}
    assert [row["step"] for row in found["log"]] == list(range(1, steps + 1))
    for ours, one in zip(found["log"], alone["log"], strict=True):
        assert ours["num_targets"] == one["num_targets"] and ours["epoch"] == one["epoch"]
        assert abs(ours["loss"] - one["loss"]) < TOLERANCE, ours["step"]
        assert math.isclose(ours["grad_norm"], one["grad_norm"], rel_tol=1e-3)
        assert abs(ours.get("val_loss", 0) - one.get("val_loss", 0)) < TOLERANCE
    assert found["step"] == alone["step"]
    assert found["weights"].keys() == alone["weights"].keys()
    for name, weight in found["weights"].items():
        assert (weight - alone["weights"][name]).abs().max() < 1e-3, name


def widest_difference(found: dict[str, Any], alone: dict[str, Any]) -> float:
    """The greatest difference of an update's loss between two runs."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(found["log"], alone["log"], strict=True))


# ---------------------------------------------------------------- F6: another number of processes


@dataclass(frozen=True)
class Layout:
    """So many processes, and how they hold the model; hybrid is on machines of two."""

    processes: int
    sharding: str = "none"

    def __str__(self) -> str:
        return f"{self.processes} {self.sharding}"

    @property
    def words(self) -> tuple[str, ...]:
        return (*TRAIN, f"train.sharding={self.sharding}")

    @property
    def local_size(self) -> int | None:
        return 2 if self.sharding == "hybrid" else None


ALONE = Layout(1)
_FULL = [Layout(processes, "full") for processes in (2, 3, 4)]
_LAYOUTS = [ALONE, Layout(2), Layout(3), Layout(4), *_FULL, Layout(4, "hybrid")]
_FEW = [(_FULL[0], ALONE)]


def moved(lab: Lab, full: bool) -> Iterator[Trial]:
    """Killed in one layout and resumed in another, for every pair of them."""
    pairs = [(a, b) for a in _LAYOUTS for b in _LAYOUTS if a != b]
    server = Ranks()
    try:
        with lab.folder() as folder:
            assert server.run(folder, 1, *TRAIN).codes == [0]
            alone = facts(folder, 1)
        for before, after in pairs if full else _FEW:
            label = f"{before} -> {after}"
            yield Trial(label, lambda b=before, a=after: _moved(lab, server, alone, b, a))
    finally:
        server.close()


def _moved(
    lab: Lab, server: Ranks, alone: dict[str, Any], before: Layout, after: Layout
) -> dict[str, Any]:
    with lab.folder() as folder:
        fault = {"rank": before.processes - 1, "step": 9, "kind": "kill"}
        ended = server.run(
            folder, before.processes, *before.words, fault=fault, local_size=before.local_size
        )
        assert ended.codes[-1] == -signal.SIGKILL, ended.texts
        ended = server.run(
            folder, after.processes, *after.words, "--resume", local_size=after.local_size
        )
        assert ended.codes == [0] * after.processes, ended.texts
        found = facts(folder, after.processes)
    check_same(found, alone, from_step=8)
    return {"widest_loss_difference": widest_difference(found, alone)}
