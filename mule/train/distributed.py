"""The processes that train one model together, as torchrun starts them.

Each holds the whole model and computes its share of the rows of an update; one sum over all of
them makes their gradients equal, so that all take the same step. What is decided once is decided
by the first process and told to the others through the store, a table of keys that torchrun keeps.
A process on its own is `ALONE`, for which all of this is nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from mule import progress
from mule.errors import CheckFailed, Interrupted, MuleError, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

T = TypeVar("T")

_FIND_PATIENCE = timedelta(minutes=5)
_SUM_PATIENCE = timedelta(minutes=30)  # others wait in a sum while the first saves or answers
_LOOK_EVERY_S = 0.03  # while waiting for the first; a wait inside the store would be logged
_ANNOUNCED_WITHIN_S = 2.0  # a process that fails says why before its connections close
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")


class PeerFailed(MuleError):
    """Another process failed. `told` says that it shows its error itself."""

    def __init__(self, message: str, hint: str, exit_code: int, *, told: bool) -> None:
        super().__init__(message, hint)
        self.exit_code, self.told = exit_code, told


class Group:
    """The processes of a run as one of them sees them; this class itself is a group of one."""

    rank = 0
    world_size = 1
    local_size = 1  # how many of them share this machine

    @property
    def is_alone(self) -> bool:
        return self.world_size == 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes, shows and decides."""
        return self.rank == 0

    @property
    def num_machines(self) -> int:
        return self.world_size // self.local_size

    def connect(self, device: str) -> None:
        """Open what the sums go through, as the recipe's device needs it."""

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turn a connection that breaks inside the block into PeerFailed, with its cause."""
        yield

    def share(self, count: int) -> range:
        """The part of `count` things that is this process's own; sizes differ by one at most."""
        start, stop = (count * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return range(start, stop)

    def cuts(self, count: int, size: int, *, together: bool) -> list[range]:
        """The own share of `count` things in parts of at most `size`.

        `together` gives every process the same number of parts, if need be empty ones at the end.
        """
        share = self.share(count)
        cuts = [range(i, min(i + size, share.stop)) for i in range(share.start, share.stop, size)]
        largest = -(-count // self.world_size)
        missing = -(-largest // size) - len(cuts) if together else 0
        return cuts + [range(share.stop, share.stop)] * missing

    def sum_(self, tensor: torch.Tensor) -> None:
        """Sum over all processes in place; the same bits in each."""

    def copy_of_first_(self, tensor: torch.Tensor) -> None:
        """Give every process the first one's values, in place."""

    def from_first(self, work: Callable[[], T]) -> T:
        """Work done by the first process only; all get its result, which must fit into JSON."""
        return work()

    def after_first(self, work: Callable[[], T]) -> T:
        """Work that every process does, the first one alone beforehand: they find it done."""
        if self.is_first:
            done = work()
            self.from_first(lambda: None)
            return done
        self.from_first(lambda: None)
        return work()

    def agree(self, what: str, number: Callable[[], int], hint: str) -> None:
        """CheckFailed in all processes when the number (under 2**63) is not the same in each."""


ALONE = Group()


class _Ranks(Group):
    """One of several processes."""

    def __init__(self) -> None:
        numbers = _torchrun_numbers()
        self.rank, self.world_size = numbers["RANK"], numbers["WORLD_SIZE"]
        self.local_size, self._local_rank = numbers["LOCAL_WORLD_SIZE"], numbers["LOCAL_RANK"]
        self._store, self._num_said = _store(numbers), 0
        self._device: torch.device | None = None

    def connect(self, device: str) -> None:
        import torch.distributed as dist

        self._device = _own_device(device, self._local_rank)
        # Opening the connections cannot be broken off, so it begins when all are there.
        self._store.set(f"here/{self.rank}", "")
        for rank in range(self.world_size):
            self._wait_for(f"here/{rank}", _FIND_PATIENCE)
        try:
            dist.init_process_group(
                "nccl" if self._device.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=_SUM_PATIENCE,
                device_id=self._device if self._device.type == "cuda" else None,
            )
        except RuntimeError as error:
            raise self._cause(error) from None

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        import torch.distributed as dist

        try:
            yield
        except RuntimeError as error:  # gloo's has no type of its own, but names its source file
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise self._cause(error) from None
            raise

    def leave(self) -> None:
        """Close the connections, when all is done."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def sum_(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        dist.all_reduce(tensor)

    def copy_of_first_(self, tensor: torch.Tensor) -> None:
        import torch.distributed as dist

        dist.broadcast(tensor, 0)

    def from_first(self, work: Callable[[], T]) -> T:
        key = f"said/{self._num_said}"
        self._num_said += 1
        if self.is_first:
            value = work()
            self._store.set(key, json.dumps(value))
            return value
        self._wait_for(key)
        return json.loads(self._store.get(key))

    def agree(self, what: str, number: Callable[[], int], hint: str) -> None:
        import torch
        import torch.distributed as dist

        own = number()
        ends = torch.tensor([own, -own], dtype=torch.int64, device=self._device)
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        highest, lowest = ends.tolist()
        if highest != -lowest:
            raise CheckFailed(f"the {self.world_size} processes do not have {what} in common", hint)

    def tells(self, error: BaseException) -> bool:
        """Whether this process is the one that shows the error, and let the others know of it."""
        import torch.distributed as dist

        if isinstance(error, PeerFailed) and error.told:
            return False
        if isinstance(error, (Interrupted, CheckFailed)):  # all processes have the same one
            return self.is_first
        try:
            if self._store.add("failures", 1) > 1:
                return False
            said = {"message": str(error), "hint": "", "exit_code": exit_code(error)}
            if isinstance(error, MuleError):
                said |= {"message": error.message, "hint": error.hint}
            self._store.set("failure", json.dumps(said))
        except dist.DistError:
            pass  # torchrun is gone: better said twice than never
        return True

    def _wait_for(self, key: str, patience: timedelta = timedelta.max) -> None:
        """Return when another process has set the key; PeerFailed when one fails before."""
        import torch.distributed as dist

        started_at = time.monotonic()
        try:
            while not self._store.check([key]):
                if failure := self._announced():
                    raise failure
                if time.monotonic() - started_at > patience.total_seconds():
                    raise _lost(TimeoutError(f"waited {patience} for {key}"))
                time.sleep(_LOOK_EVERY_S)
        except dist.DistError as error:
            raise _lost(error) from None

    def _announced(self) -> PeerFailed | None:
        """What another process said before it failed."""
        if not self._store.check(["failure"]):
            return None
        return PeerFailed(**json.loads(self._store.get("failure")), told=True)

    def _cause(self, error: RuntimeError) -> PeerFailed:
        """Why a sum failed: what another process announced, else that it ended without a word."""
        import torch.distributed as dist

        give_up_at = time.monotonic() + _ANNOUNCED_WITHIN_S
        while time.monotonic() < give_up_at:
            try:
                if failure := self._announced():
                    return failure
            except dist.DistError:
                break
            time.sleep(_LOOK_EVERY_S)
        return _lost(error)


def _lost(error: Exception) -> PeerFailed:
    found = (str(error).splitlines() or [type(error).__name__])[0]
    return PeerFailed(
        f"another process of this run ended without a word ({found})",
        "torchrun says above or below which one, and how; out of memory is the usual cause; "
        "go on with --resume",
        1,
        told=False,
    )


def exit_code(error: BaseException) -> int:
    """What a process that ends with this error returns to the system."""
    if isinstance(error, MuleError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """The group torchrun started this process in; ALONE where it did not.

    Only the first process speaks, and of an error only one; the rest end with its exit code.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    group = _Ranks()
    try:
        with contextlib.nullcontext() if group.is_first else progress.using(progress.Silence()):
            yield group
            group.from_first(lambda: None)  # torchrun counts on all of them to the end
    except BaseException as error:
        if not group.tells(error):
            raise SystemExit(exit_code(error)) from None
        raise
    group.leave()


def _store(numbers: dict[str, int]) -> Store:
    """The table of keys that all processes share."""
    import torch.distributed as dist

    # torchrun keeps the table, so that it outlives the processes; else the first of them does.
    keeps = numbers["RANK"] == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), numbers["MASTER_PORT"]
    try:
        table = dist.TCPStore(address, port, numbers["WORLD_SIZE"], keeps, _FIND_PATIENCE)
    except dist.DistError as error:
        raise UserError(
            f"process {numbers['RANK']} does not reach the others at {address}:{port}: {error}",
            "start all of them with torchrun, and an address that every machine can reach; "
            "mule train RECIPE --launch torchrun prints the command",
        ) from None
    # Processes that torchrun starts again find the same table.
    return dist.PrefixStore(f"mule/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", table)


def _torchrun_numbers() -> dict[str, int]:
    try:
        return {name: int(os.environ[name]) for name in _NUMBERS}
    except (KeyError, ValueError) as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torchrun's other variables are missing "
            f"or wrong: {error}",
            "start it with torchrun (mule train RECIPE --launch torchrun prints the command), or "
            "unset WORLD_SIZE",
        ) from None


def _own_device(device: str, local_rank: int) -> torch.device:
    """The device of this process, made the current one."""
    import torch

    if device == "mps":
        raise UserError(
            "one process only can use an Apple GPU",
            "start mule train without torchrun, or set train.device=cpu",
        )
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU: there are "
            f"{torch.cuda.device_count()}",
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()}",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def stable_number(*texts: str) -> int:
    """A number under 2**62 from texts, for `agree`."""
    digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
