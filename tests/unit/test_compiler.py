"""What torch.compile made is kept in a folder nobody else can write, and told when looked at."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mule import progress
from mule.train import compiler
from mule.train.compiler import VARIABLE, Watch, keep_compiled


class Notes(progress.Silence):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.said.append(f"{level}: {text}")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled code will be kept, below an empty cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "restored afterwards")
    del os.environ[VARIABLE]
    return tmp_path / "mule" / "compile"


def _mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def _kept() -> tuple[Path, list[str]]:
    notes = Notes()
    with progress.using(notes):
        return keep_compiled(), notes.said


def test_the_folder_is_private_and_stays(cache: Path) -> None:
    before = os.umask(0o002)  # of systems where every user has a group
    try:
        folder, said = _kept()
    finally:
        os.umask(before)
    assert folder.parent == cache and os.environ[VARIABLE] == str(folder) and said == []
    assert _mode(cache) == 0o700
    del os.environ[VARIABLE]
    assert _kept() == (folder, [])


def test_a_folder_that_was_readable_is_closed(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o755)
    cache.parent.chmod(0o777)  # others could have put another folder in its place
    assert _kept()[1] == []
    assert (_mode(cache), _mode(cache.parent)) == (0o700, 0o755)


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_folder_that_others_can_write_is_refused(cache: Path, mode: int) -> None:
    cache.mkdir(parents=True)
    cache.chmod(mode)
    folder, (said,) = _kept()
    assert cache not in folder.parents and _mode(folder) == 0o700
    assert os.environ[VARIABLE] == str(folder)
    assert said.startswith("warning: compiled code is not kept for the next start: ")
    assert f"{cache} can be written by other users (mode {mode:o})" in said
    assert "remove it, and it is made anew" in said
    folder.rmdir()


def test_a_folder_of_another_user_or_a_link_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.mkdir()
    cache.symlink_to(cache.parent)
    folder, (said,) = _kept()
    assert "is a link, not a folder" in said
    folder.rmdir()
    cache.unlink()
    del os.environ[VARIABLE]
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    folder, (said,) = _kept()
    assert f"belongs to another user ({me})" in said
    folder.rmdir()


def test_a_home_that_cannot_be_written_is_no_obstacle(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    folder, (said,) = _kept()
    assert f"{cache} cannot be used (File exists)" in said
    folder.rmdir()


def test_the_users_own_choice_is_left_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "own"))
    assert _kept() == (tmp_path / "own", [])
    assert not cache.exists()


def test_the_default_that_torch_sets_itself_is_not_a_choice(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv(VARIABLE, default_cache_dir())  # as importing torch._dynamo does
    assert _kept()[0].parent == cache


def test_what_was_long_not_used_is_dropped(cache: Path) -> None:
    folder, _ = _kept()
    folder.mkdir()
    old, read, fresh = (folder / name for name in ("old", "read", "fresh"))
    for file in (old, read, fresh):
        file.write_text("code")
    long_ago = time.time() - 91 * 86_400
    os.utime(old, (long_ago, long_ago))
    os.utime(read, (time.time(), long_ago))
    del os.environ[VARIABLE]
    _kept()
    assert [file.name for file in sorted(folder.iterdir())] == ["fresh", "read"]


def test_another_kind_of_processor_has_a_folder_of_its_own(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = _kept()
    del os.environ[VARIABLE]
    monkeypatch.setattr(compiler.machine, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    monkeypatch.setattr(compiler.machine, "cpu_model", lambda: "another")
    assert _kept()[0] != folder and _kept()[0].parent == cache


# ---------------------------------------------------------------- what was made


@pytest.fixture
def watch() -> Iterator[Watch]:
    torch._dynamo.reset()
    yield Watch()
    torch._dynamo.reset()


def _traced(function: Any, **options: Any) -> Any:
    return torch.compile(function, backend="eager", **options)


def test_a_graph_is_told_once(watch: Watch) -> None:
    double = _traced(lambda x: x * 2, dynamic=True)
    for length in (3, 4, 5):
        double(torch.ones(length))
    made = watch.look()
    assert [graph.why for graph in made.graphs] == [None]
    assert (made.breaks, made.recompiles) == ([], [])
    double(torch.ones(6))
    assert watch.look().graphs == []


def test_sizes_that_happen_to_be_equal_are_not_taken_to_be(
    watch: Watch, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.fx.experimental import _config

    monkeypatch.setattr(_config, "use_duck_shape", True)
    for expected in (1, 0):
        add = _traced(lambda x, y: (x + 1, y + 1), dynamic=True)
        add(torch.ones(4), torch.ones(4))
        add(torch.ones(4), torch.ones(5))
        assert len(watch.look().recompiles) == expected
        compiler.set_up_compiler()
    assert os.environ[VARIABLE].startswith(str(cache))


def test_a_recompile_is_told_with_its_reason(watch: Watch) -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = _traced(double, dynamic=False)
    compiled(torch.ones(3))
    assert watch.look().recompiles == []
    compiled(torch.ones(4))
    (again,) = watch.look().recompiles
    assert again.function.startswith("double (test_compiler.py:")
    assert again.why is not None and "expected 3, actual 4" in again.why


def test_a_graph_break_is_told_with_its_place(watch: Watch) -> None:
    def cut(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    def cut_in_a_loop(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = x.sin()
            torch._dynamo.graph_break()
        return x

    _traced(cut)(torch.ones(3))
    (found,) = watch.look().breaks
    assert found.startswith("cut (test_compiler.py:")
    assert "Call to `torch._dynamo.graph_break()`" in found
    assert "Hint" not in found and "\n" not in found
    _traced(cut_in_a_loop)(torch.ones(3))  # torch gives the whole function up
    (found,) = watch.look().breaks
    assert found.startswith("cut_in_a_loop (test_compiler.py:")


# ---------------------------------------------------------------- a second start

SECOND_START = """
import json, os, sys, torch
from mule.train.compiler import keep_compiled
keep_compiled()
torch.compile(lambda x: (x * 2).sum())(torch.ones(8))
from torch._dynamo.utils import counters
print(json.dumps(dict(counters["inductor"])))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_the_second_start_finds_what_the_first_compiled(cache: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found = []
    for _ in range(2):
        words = [sys.executable, "-c", SECOND_START]
        ran = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    assert found[0].get("fxgraph_cache_hit", 0) == 0 and found[0]["fxgraph_cache_miss"] == 1
    assert found[1]["fxgraph_cache_hit"] == 1 and "fxgraph_cache_miss" not in found[1]
    assert _mode(cache) == 0o700
