"""A campaign as a SLURM array: one task a run."""

from __future__ import annotations

import shlex
from pathlib import Path

from mule.config.campaign import Campaign
from mule.lab.campaign import Folder

_SAVE_WITHIN_S = 300  # from the signal to the end of a job, for the last checkpoint

_SCRIPT = """\
#!/bin/bash
# Submit it with: sbatch {file}
# A task is a run; submitted again, after the time limit too, each goes on with its run.
#SBATCH --job-name=mule-{name}
#SBATCH --array=0-{last}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --signal=TERM@{patience}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%A-%a.log

srun {command} --task "$SLURM_ARRAY_TASK_ID"
"""


def write_array(campaign: Campaign, folder: Folder, num_runs: int, again: list[str]) -> Path:
    """Write the script of the array into the campaign's folder; its path."""
    from mule import fsio

    processes = campaign.plan.processes or 1
    on_gpu = campaign.shared.train.device != "cpu"
    file = folder.path / f"{campaign.name}.sbatch"
    text = _SCRIPT.format(
        file=file,
        name=campaign.name,
        last=num_runs - 1,
        gpus=f"#SBATCH --gpus-per-node={processes}\n" if on_gpu else "",
        patience=_SAVE_WITHIN_S,
        command=shlex.join(again),
    )
    fsio.write_text(file, text)
    return file
