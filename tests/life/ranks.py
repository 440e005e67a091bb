"""A server that forks the processes of one distributed run, as torchrun would start them.

One JSON object a line on stdin asks for a run; two lines on stdout answer: the process ids, then
how they ended. Like torchrun's agent, the server keeps the store in which the processes meet.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from mule.errors import UserError
from tests.life import poison

LOOPBACK = "127.0.0.1"


def serve() -> None:
    """Answer until stdin closes."""
    import torch

    torch.set_num_threads(1)
    import mule.commands.train
    import mule.train.loop
    import mule.train.sharded  # noqa: F401

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        store_pid, job["port"] = _keep_store(job["world_size"])
        pids = []
        for rank in range(job["world_size"]):
            pid = os.fork()
            if pid == 0:
                _child(job, rank)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.kill(store_pid, 9)
        os.waitpid(store_pid, 0)
        print(json.dumps({"codes": codes}), flush=True)


def _keep_store(world_size: int) -> tuple[int, int]:
    """A process that keeps the store, since the server itself must have no threads; its port."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        import torch.distributed as dist

        store = dist.TCPStore(LOOPBACK, 0, world_size + 1, True, wait_for_workers=False)
        os.write(writer, str(store.port).encode())
        time.sleep(600)
        os._exit(1)
    port = int(os.read(reader, 16))
    os.close(reader)
    os.close(writer)
    return pid, port


def _child(job: dict[str, Any], rank: int) -> None:
    """Be `mule <words>` as one of the processes; never returns."""
    os.chdir(job["folder"])
    log = os.open(f"output-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    size = str(job["world_size"])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": size}
    local = str(job.get("local_size") or size)
    os.environ |= {"LOCAL_WORLD_SIZE": local, "LOCAL_RANK": str(rank % int(local))}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(job["port"])}
    fault = job.get("fault", {})
    _watch(rank, fault)
    if "poison" in fault and rank in fault.get("only", [rank]):
        poison.install(fault["poison"])
    from mule.cli import main as cli

    sys.argv = ["mule", *job["words"]]
    if fault.get("kind") == "recipe" and fault["rank"] == rank:
        sys.argv[2] = "nowhere.yaml"  # as on a machine that lacks the shared disk
    code = 1
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _watch(rank: int, fault: dict[str, Any]) -> None:
    """Note the rows of each update in rows-<rank>.jsonl, and fail where the job says."""
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    from mule.data.loader import Loader
    from mule.train import loop

    of_update, batch, step_once = loop._Trainer._micro_batches, Loader.batch, loop.train_step
    write_once = HuggingFaceStorageWriter.write_data
    file = Path(f"rows-{rank}.jsonl")
    file.unlink(missing_ok=True)
    now = {"step": -1, "cuts": False}  # facts and rehearsals ask for rows too, before the updates

    def micro_batches(self: Any, step: int) -> Any:
        now.update(step=step, cuts=True)
        try:
            return of_update(self, step)
        finally:
            now["cuts"] = False

    def noted_batch(self: Loader, rows: Any) -> Any:
        if now["cuts"]:
            with file.open("a") as opened:
                print(json.dumps({"step": now["step"], "rows": rows.tolist()}), file=opened)
        return batch(self, rows)

    def train_step(model: Any, optimizer: Any, *given: Any, **named: Any) -> Any:
        if fault.get("rank") == rank and fault.get("step") == now["step"]:
            if fault["kind"] == "error":
                raise UserError("the disk of process 1 is on fire", "call the fire brigade")
            if fault["kind"] == "defect":
                raise ZeroDivisionError("no such luck")
            if fault["kind"] == "kill":
                os.kill(os.getpid(), 9)
            if fault["kind"] == "weights":
                next(optimizer.state())[0] += 1e-3
        return step_once(model, optimizer, *given, **named)

    def write_data(self: Any, *given: Any) -> Any:
        here = (fault.get("rank"), fault.get("step")) == (rank, now["step"])
        if here and fault["kind"] == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write_once(self, *given)
        if here and fault["kind"] == "save":
            os.kill(os.getpid(), 9)  # its own part is there, the others' perhaps not
        return written

    loop._Trainer._micro_batches, Loader.batch = micro_batches, noted_batch
    loop.train_step = train_step
    HuggingFaceStorageWriter.write_data = write_data


if __name__ == "__main__":
    serve()
