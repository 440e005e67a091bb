"""Training the cases of the fault bench: each a `mule train` in a process of its own, kept in a cache.

One process imports torch and forks a child for every case. A case that the cache holds with the same
recipe, data and damage is not trained again.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.doctor_cases import (
    CASE,
    RECIPE,
    Case,
    available,
    base_path,
    key_of,
    nested,
    write,
    write_rows,
)
from bench.doctor_data import Folder
from bench.doctor_faults import PERMUTED, RANDOM, REWORDED
from bench.doctor_settings import (
    BASE_CHATS,
    BASE_ROWS,
    BASE_TEXT,
    BASES,
    COMMON,
    Base,
    Part,
)
from mule import fsio

_LOG = "output.log"
_NOT_KEPT = ("checkpoint-*", "average", "start", "tokenizer", "probe.json")


def run(part: Part, word: str, workers: int, cache: Path, data: Folder) -> None:
    """Train what the cache lacks of the cases whose name begins with `word`, showing how far it is."""
    cases, lacking = available(part, word, data)
    if lacking:
        print(f"{len(lacking)} cases are left out: their data is not in {data.path}")
    _import_once()
    _make_bases(part, cases, workers, cache, data)
    due = []
    for case in cases:
        draft = case.draft(cache, data)
        key = key_of(draft, _source_of(draft.damage))
        file = case.folder(cache) / CASE
        if not file.is_file() or fsio.read_json(file)["key"] != key:
            due.append((case, key))
    print(f"{part}: {len(cases) - len(due)} of {len(cases)} are done already", flush=True)
    jobs = [(case.name, functools.partial(_train, case, key, cache, data)) for case, key in due]
    _in_children(jobs, workers)


def _import_once() -> None:
    """All that a child would import; OpenMP must have no threads when a process forks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    import torch._dynamo

    import mule.commands.train
    import mule.train.loop  # noqa: F401
    from mule import calibration

    calibration.calibration()  # with it a run knows what was planned for it


def _source_of(damage: str | None) -> str:
    from bench import doctor_damage

    return damage + inspect.getsource(doctor_damage) if damage else ""


def _in_children(jobs: list[tuple[str, Callable[[], None]]], workers: int) -> None:
    """Each job in a child, `workers` at a time; SystemExit when one of them failed."""
    begun_at, running, failed = time.perf_counter(), dict[int, tuple[str, float]](), []
    waiting = list(reversed(jobs))
    signal.signal(signal.SIGTERM, lambda *_: _end(running))
    while waiting or running:
        while waiting and len(running) < workers:
            name, work = waiting.pop()
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                _child(work)
            running[pid] = name, time.perf_counter()
        pid, status = os.wait()
        name, started_at = running.pop(pid)
        if status:
            failed.append(name)
        done = len(jobs) - len(waiting) - len(running)
        now = time.perf_counter()
        left = (now - begun_at) / done * (len(jobs) - done)
        said = "FAILED" if status else f"{now - started_at:.1f} s"
        print(f"{done}/{len(jobs)} {name}: {said}; about {left / 60:.0f} min left", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; see output.log in their folders")


def _end(running: Iterable[int]) -> None:
    """Take the children along."""
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit(143)


def _child(work: Callable[[], None]) -> None:
    """Do the work and end; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---------------------------------------------------------------- one case


def _train(case: Case, key: str, cache: Path, data: Folder) -> None:
    folder = case.folder(cache)
    shutil.rmtree(folder, ignore_errors=True)
    draft = case.draft(cache, data)
    write(draft, folder)
    os.chdir(folder)
    _send_output_to(folder / _LOG)
    started_at = time.perf_counter()
    ended = _mule_train(case.name, draft.damage, draft.recipe["train.steps"])
    fsio.write_json(
        folder / CASE,
        {
            "key": key,
            "part": case.part,
            "fault": case.fault,
            "setting": case.setting_name,
            "kind": case.setting.kind,
            "seed": case.seed,
            "name": case.healthy.name if case.healthy else case.fault,
            "ended": ended,
            "seconds": round(time.perf_counter() - started_at, 1),
        },
    )
    shutil.rmtree(folder / "runs" / ".prepared", ignore_errors=True)
    for pattern in _NOT_KEPT:
        for path in (folder / "runs" / case.name).glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _mule_train(name: str, damage: str | None, num_steps: int) -> str:
    """`mule train recipe.yaml` with the damage; how it ended, in words.

    A run that the damage interrupts goes on; one that Mule gives up is what is to be examined.
    """
    from bench import doctor_damage
    from mule.commands import train
    from mule.errors import CheckFailed, Interrupted

    if damage:
        getattr(doctor_damage, damage)(num_steps)
    with contextlib.suppress(Interrupted):
        try:
            train.run(Path(RECIPE), [], name=name)
        except CheckFailed as error:
            return f"given up: {error.message}"
        return "finished"
    train.run(Path(RECIPE), [], name=name, resume=True)
    return "finished, resumed once"


def _send_output_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


# ---------------------------------------------------------------- bases

_OTHER_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% else %}"
    "{{ '@@@ ' + message['role'] + ' >>> ' + message['content'] + ' @@@ reply >>> ' }}"
    "{% endif %}{% endfor %}"
)


def _make_bases(part: Part, cases: list[Case], workers: int, cache: Path, data: Folder) -> None:
    """Train the bases that the cases need and the cache lacks."""
    wanted = {case.setting.base for case in cases} - {None}
    jobs = []
    for name, base in BASES[part].items():
        path = base_path(cache, part, name)
        if name in wanted and not path.with_name(path.name + REWORDED).is_dir():
            jobs.append((f"base {name}", functools.partial(_make_base, base, path, data)))
    _in_children(jobs, workers)


def _make_base(base: Base, path: Path, data: Folder) -> None:
    """A text, then chats; and beside it a copy of other weights, and a vocabulary in disorder."""
    work = path.with_name(path.name + "-work")
    for folder in (path, work):
        shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    write_rows(work / "text.jsonl", data.rows(base.text, 1, BASE_ROWS))
    write_rows(work / "chats.jsonl", data.rows(base.chats, 1, BASE_ROWS))
    os.chdir(work)
    _send_output_to(work / _LOG)
    text = COMMON | BASE_TEXT | dict(base.recipe) | {"data.train": ["text.jsonl"]}
    _train_stage("text", text)
    chats = COMMON | BASE_CHATS | {"data.train": ["chats.jsonl"], "model.path": "runs/text"}
    _train_stage("chats", chats)
    shutil.copytree(work / "runs" / "chats", path)
    shutil.rmtree(work / "runs")
    _with_random_weights(path, path.with_name(path.name + RANDOM))
    _with_permuted_vocabulary(path, path.with_name(path.name + PERMUTED))
    _with_another_template(path, path.with_name(path.name + REWORDED))


def _train_stage(name: str, recipe: dict[str, Any]) -> None:
    from mule.commands import train

    file = Path(f"{name}.yaml")
    fsio.write_json(file, nested(recipe))
    train.run(file, [], name=name)


def _with_random_weights(run: Path, out: Path) -> None:
    """A model folder of the run's shape and tokenizer that was never trained."""
    import torch

    from mule.models.decoder import empty_decoder
    from mule.models.folder import model_state, read_config, save_model
    from mule.tokenizer import Tokenizer
    from mule.train.checkpoint import token_ids

    config, tokenizer = read_config(_checkpoint(run)), Tokenizer.load(_checkpoint(run))
    model = empty_decoder(config, torch.float32)
    model.init_weights(seed=5)
    shutil.rmtree(out, ignore_errors=True)
    with fsio.atomic_folder(out) as folder:
        tokenizer.save(folder)
        save_model(model_state(model), config, folder, extra=token_ids(tokenizer))


def _with_permuted_vocabulary(run: Path, out: Path) -> None:
    """The tokenizer of the run, its words with the ids of other words; special tokens keep theirs."""
    from mule.tokenizer import Tokenizer

    shutil.rmtree(out, ignore_errors=True)
    with fsio.atomic_folder(out) as folder:
        Tokenizer.load(_checkpoint(run)).save(folder)
        file = folder / "tokenizer.json"
        content = fsio.read_json(file)
        special = {token["content"] for token in content["added_tokens"]}
        words = {word: i for word, i in content["model"]["vocab"].items() if word not in special}
        ids = random.Random(7).sample(list(words.values()), len(words))
        content["model"]["vocab"] |= dict(zip(words, ids))
        fsio.write_json(file, content)


def _with_another_template(run: Path, out: Path) -> None:
    """The tokenizer of the run; its chats are written as other models have them."""
    from mule.tokenizer import Tokenizer

    shutil.rmtree(out, ignore_errors=True)
    with fsio.atomic_folder(out) as folder:
        Tokenizer.load(_checkpoint(run)).save(folder)
        fsio.write_text(folder / "chat_template.jinja", _OTHER_TEMPLATE)


def _checkpoint(run: Path) -> Path:
    from mule.run import Run

    found = Run(run).latest_checkpoint()
    assert found is not None
    return found[1]
