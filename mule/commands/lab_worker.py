"""One run of a campaign in a process of its own: train, then measure on the held-out sets.

`python -m mule.commands.lab_worker JOB` with a job as JSON; several such processes are one run where
torchrun starts them. It ends when its standard input does, so that no run outlives its campaign.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import MuleError
from mule.run import Run

if TYPE_CHECKING:
    from mule.lab.own_module import OwnModule

MEASURED = "held_out.json"  # in the run's folder


def work(job: dict[str, Any]) -> None:
    """Train the job's recipe to its end, going on where it stopped; measure once it has ended.

    The job: recipe (a file), name, root (the folder of the runs), sets (name -> files) and prepared;
    for a variant that is a module of the user's, module.
    """
    if "module" not in job:
        _work(job, None)
        return
    from mule.lab.own_model import explained
    from mule.lab.own_module import OwnModule

    own = OwnModule(**job["module"])
    with explained(own):
        _work(job, own)


def _work(job: dict[str, Any], own: OwnModule | None) -> None:
    from mule.commands import train

    maker = None
    if own is not None:
        from mule.lab.own_model import maker_of

        maker = maker_of(own)
    run = Run(Path(job["root"]) / job["name"])
    if not (run.folder / "recipe.yaml").is_file() or run.state() != "finished":
        recipe, name, root = Path(job["recipe"]), job["name"], Path(job["root"])
        train.run(recipe, [], resume=True, name=name, root=root, maker=maker)
    is_first = os.environ.get("RANK", "0") == "0"  # as torchrun numbers them
    if is_first and not (run.folder / MEASURED).is_file():
        _measure(run, job, own)


def _measure(run: Run, job: dict[str, Any], own: OwnModule | None) -> None:
    """Write the losses of the last weights on each set, whole."""
    from mule import fsio
    from mule.config.load import load_recipe
    from mule.errors import CheckFailed
    from mule.lab.held_out import measure
    from mule.models.folder import load_model
    from mule.tokenizer import Tokenizer
    from mule.train.precision import DTYPES, set_up_torch

    recipe = load_recipe(run.folder / "resolved.yaml", []).recipe
    newest = run.latest_checkpoint()
    if newest is None or newest[0] != recipe.train.steps:
        raise CheckFailed(
            f"{run.folder} has ended, but has no checkpoint of update {recipe.train.steps}",
            f"remove {run.folder}, and run the campaign again: it trains this run anew",
        )
    train = recipe.train
    set_up_torch(int(train.threads))
    dtype = DTYPES["fp32" if train.device == "cpu" else train.precision]
    if own is None:
        model = load_model(newest[1], dtype=dtype, device=train.device).eval()
    else:
        from mule.lab.own_model import trained

        model = trained(own, newest[1], dtype=dtype, device=train.device)
    tokenizer = Tokenizer.load(newest[1])
    found = {
        name: measure(
            model,
            files,
            recipe.data,
            tokenizer,
            Path(job["prepared"]),
            rows_at_once=int(train.micro_batch_rows),
        )
        for name, files in job["sets"].items()
    }
    fsio.write_json(run.folder / MEASURED, {"step": newest[0], **found})


class _Lines:
    """Notes and ends of tasks as lines of the log; the campaign shows the bar itself."""

    def start(self, key: int, description: str, total: float | None, unit: str) -> None: ...
    def advance(self, key: int, amount: float, fields: dict[str, Any]) -> None: ...
    def finish(self, key: int) -> None: ...

    def note(self, text: str, level: str) -> None:
        print(f"{level}: {text}", flush=True)


def _end_with_campaign() -> None:
    """End this process when the one that started it is gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=_end_with_campaign, daemon=True).start()
    try:
        with progress.using(_Lines()):
            work(json.loads(sys.argv[1]))
    except MuleError as error:
        said = {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
        print(json.dumps(said), flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
