"""torch.compile: the folder that keeps what it made, and what it had to make.

The kept files are code that is executed, so the folder must be the user's alone; torch's own
default, a folder of a known name in the common temporary directory, is not used.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mule import fsio, machine, models, progress

if TYPE_CHECKING:
    from torch._dynamo.output_graph import GraphCompileReason
    from torch._dynamo.utils import CompilationMetrics

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own
_KEPT_DAYS = 90  # without use


def set_up_compiler() -> None:
    """To be called before anything is compiled: what it makes is kept, and made once."""
    from torch.fx.experimental import _config

    keep_compiled()
    # Two sizes that are equal in the first call would be taken to be equal always, and the function
    # compiled again when they are not, as in packed attention, whose windows differ.
    _config.use_duck_shape = False


# ---------------------------------------------------------------- what is kept


def keep_compiled() -> Path:
    """Let torch keep what it compiles for the next start; the folder.

    That is compile/ in Mule's folder of the user's cache, made with mode 0700. Where that one cannot
    be trusted or made, a fresh one is used that goes with the process, and a note says so. A folder
    that the user has set in TORCHINDUCTOR_CACHE_DIR is left as it is.
    """
    given = os.environ.get(VARIABLE)
    if given and not _is_torchs(given):
        return Path(given)
    folder = cache_folder()
    problem = _claim(folder)
    if problem:
        progress.note(
            f"compiled code is not kept for the next start: {folder} {problem}. "
            "It holds code that is run: remove it, and it is made anew",
            "warning",
        )
        folder = Path(tempfile.mkdtemp(prefix="mule-compile-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    else:
        _drop_unused(folder)
        folder = folder / _key()
    os.environ[VARIABLE] = str(folder)
    return folder


def cache_folder() -> Path:
    """Where compiled code is kept for this user: beside the measured peaks."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mule" / "compile"


def _is_torchs(folder: str) -> bool:
    """Whether this is torch's own default, which it sets itself when its compiler is imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return folder == default_cache_dir()


def _claim(folder: Path) -> str | None:
    """Make the folder and its parent the user's alone; why that cannot be, or None."""
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        above, found = folder.parent.stat(), folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            return "is a link, not a folder"
        for owner in (above.st_uid, found.st_uid):
            if owner != os.geteuid():
                return f"belongs to another user ({owner})"
        if found.st_mode & 0o022:
            return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
        folder.parent.chmod(stat.S_IMODE(above.st_mode) & ~0o022)  # or others could replace it
        folder.chmod(0o700)
    except OSError as error:
        return f"cannot be used ({error.strerror})"
    return None


def _drop_unused(folder: Path) -> None:
    """Remove the files that nothing has used for long; torch makes again what it misses."""
    oldest = time.time() - _KEPT_DAYS * 86_400
    for file in folder.rglob("*"):
        try:
            found = file.lstat()
            if stat.S_ISREG(found.st_mode) and max(found.st_atime, found.st_mtime) < oldest:
                file.unlink()
        except OSError:  # another process was first
            continue


def _key() -> str:
    """A name for what torch's own keys leave out: the kind of processor, and Mule's operations.

    torch compiles for the processor at hand (-march=native) but does not look it up by its kind,
    so that a home folder shared by two machines would give one the other's instructions. Nor does
    it see how an operation of ours was declared when it kept the graph that calls it.
    """
    sources = sorted(Path(models.__file__).parent.glob("*.py"))
    words = [
        machine.cpu_model(),
        *sorted(machine.cpu_flags()),
        torch.backends.cpu.get_cpu_capability(),
        *(fsio.sha256_file(source) for source in sources),
    ]
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what was made


@dataclass(frozen=True)
class Graph:
    """A graph that was compiled; `why` only when the same function had been compiled before."""

    function: str
    why: str | None

    @property
    def is_again(self) -> bool:
        return self.why is not None


@dataclass(frozen=True)
class Made:
    """Graphs made since the last look, and the places at which a function was cut in two."""

    graphs: list[Graph]
    breaks: list[str]

    @property
    def recompiles(self) -> list[Graph]:
        return [graph for graph in self.graphs if graph.is_again]


class Watch:
    """Tells what torch.compile made in this process, from one look to the next."""

    def __init__(self) -> None:
        from torch._dynamo import utils

        utils.set_compilation_metrics_limit(10_000)
        self._utils = utils
        self._seen = (len(utils.get_compilation_metrics()), len(utils.graph_break_reasons))

    def look(self) -> Made:
        """What was made since the last look."""
        metrics, breaks = self._utils.get_compilation_metrics(), self._utils.graph_break_reasons
        seen, self._seen = self._seen, (len(metrics), len(breaks))
        tried = [
            m for m in metrics[seen[0] :] if m.is_forward
        ]  # a backward pass belongs to its graph
        failed = [f"{_place(m)}: {m.fail_reason}" for m in tried if m.fail_reason]
        return Made(
            [Graph(_place(m), m.recompile_reason) for m in tried if not m.fail_reason],
            [*(_break(b) for b in breaks[seen[1] :]), *(_one_line(text) for text in failed)],
        )


def _place(metrics: CompilationMetrics) -> str:
    return f"{metrics.co_name} ({Path(metrics.co_filename or '').name}:{metrics.co_firstlineno})"


def _break(found: GraphCompileReason) -> str:
    frame = found.user_stack[-1] if found.user_stack else None
    where = f"{frame.name} ({Path(frame.filename).name}:{frame.lineno}): " if frame else ""
    return where + _one_line(found.reason)


def _one_line(text: str) -> str:
    """What torch found, without the hints and addresses that follow."""
    return " ".join(text.partition("\n  Hint:")[0].partition("\n\n")[0].split())
