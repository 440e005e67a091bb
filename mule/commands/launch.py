"""`mule train --launch`: the command or the script that starts several processes, as text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule.errors import UserError

_HOW = re.compile(r"(torchrun|slurm)(?::([1-9][0-9]*)x([1-9][0-9]*))?")
_PORT = 29500  # torchrun's own default
_MULE = ("-m", "mule.cli.main", "train")
_SAVE_WITHIN_S = 300  # from the signal to the end of a job, for the last checkpoint

_SBATCH = """\
#!/bin/bash
# Submit it with: sbatch {file}
# Submitted again, after the time limit too, it goes on with the same run.
#SBATCH --job-name=mule-{name}
#SBATCH --nodes={machines}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --signal=TERM@{patience}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.log

# SIGTERM makes the run save and leave; torchrun kills what takes longer than this.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={timeout}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {command}
"""


@dataclass(frozen=True)
class _Shape:
    """How many processes, and where."""

    machines: int
    processes: int  # on each machine

    @property
    def total(self) -> int:
        return self.machines * self.processes


def run(
    how: str, recipe_file: Path | None, overrides: list[str], *, resume: bool, name: str | None
) -> dict[str, Any]:
    """The torchrun command as `next`, or a script for Slurm, written beside; nothing is started.

    `how` is torchrun or slurm, and :MACHINESxPROCESSES; without it, the GPUs of this machine.
    """
    from mule.config.load import load_recipe
    from mule.plan.sharding import check_sharding

    recipe = load_recipe(recipe_file, overrides).recipe
    kind, shape = _parse(how)
    rows = recipe.train.step_rows
    if rows is not None and rows < shape.total:
        raise UserError(
            f"an update of {rows} rows cannot be shared by {shape.total} processes",
            f"start at most {rows}, or raise train.step_rows",
        )
    check_sharding(recipe, shape.total, shape.processes)
    words = [str(recipe_file)] if recipe_file else []
    words += [*overrides, *(["--name", name] if name else [])]
    facts = {"machines": shape.machines, "processes_of_each": shape.processes}
    if kind == "torchrun":
        if shape.machines > 1:
            facts |= {"run_it_on": "every machine; FIRST_HOST is the address of one of them"}
        return facts | {"next": _torchrun(shape, [*words, *(["--resume"] if resume else [])])}
    run_name = name or recipe.name or (recipe_file.stem if recipe_file else "run")
    file = Path(f"{run_name}.sbatch")
    _write(file, _sbatch(file, run_name, shape, words, gpus=recipe.train.device != "cpu"))
    return facts | {"script": file, "next": f"sbatch {file}"}


def _parse(how: str) -> tuple[str, _Shape]:
    found = _HOW.fullmatch(how)
    if found is None:
        raise UserError(
            f"--launch {how}: neither torchrun nor slurm, with machines x processes behind",
            "for 2 machines of 8 GPUs: --launch torchrun:2x8 or --launch slurm:2x8",
        )
    kind, machines, processes = found.groups()
    if machines is not None:
        return kind, _Shape(int(machines), int(processes))
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"--launch {how}: this machine has no GPU, so the number of processes is yours to say",
            f"for 1 machine and 2 processes: --launch {kind}:1x2",
        )
    return kind, _Shape(1, torch.cuda.device_count())


def _torchrun(shape: _Shape, words: list[str]) -> str:
    where = ["--standalone"]
    if shape.machines > 1:
        where = [*_meeting(shape), "--rdzv-id", "mule", "--rdzv-endpoint", f"FIRST_HOST:{_PORT}"]
    processes = ["--nproc-per-node", str(shape.processes)]
    return shlex.join(["torchrun", *where, *processes, *_MULE, *words])


def _sbatch(file: Path, name: str, shape: _Shape, words: list[str], *, gpus: bool) -> str:
    ids = f'--rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:{_PORT}"'
    processes = ["--nproc-per-node", str(shape.processes)]
    command = (
        f"torchrun {shlex.join(_meeting(shape))} {ids} {shlex.join(processes)} "
        f"{shlex.join([*_MULE, *words, '--resume'])}"
    )
    return _SBATCH.format(
        file=file,
        name=name,
        machines=shape.machines,
        gpus=f"#SBATCH --gpus-per-node={shape.processes}\n" if gpus else "",
        patience=_SAVE_WITHIN_S,
        timeout=_SAVE_WITHIN_S - 20,
        command=command,
    )


def _meeting(shape: _Shape) -> list[str]:
    return ["--nnodes", str(shape.machines), "--rdzv-backend", "c10d"]


def _write(file: Path, text: str) -> None:
    """Write the script; one that somebody changed is not replaced."""
    from mule import fsio

    if file.exists() and file.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{file} is there already, and another script",
            "move it away, or give this run another name: --name ANOTHER",
        )
    fsio.write_text(file, text)
