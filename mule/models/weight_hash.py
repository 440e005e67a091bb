"""SHA-256 of a model's weights, whatever the files they are cut into and the metadata beside them.

It is taken over the name, type, shape and bytes of every tensor, sorted by name.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from mule import fsio, machine, progress
from mule.models.folder import weight_files
from mule.models.tensor_file import StoredTensor, read_chunks, stored_tensors

FILE = "weights.json"  # of the cache
_MAX_THREADS = 4  # hashing is as fast as a disk then
_WORTH_KEEPING_BYTES = 64 * 2**20  # smaller files are hashed in an instant
_SETTLED_S = 2.0  # a younger file may change without a change of its times
_MAX_KEPT_FILES = 400

Sums = dict[str, str]  # tensor name -> "dtype shape sha256"


def weights_sha256(folder: Path | str, *, tied: bool = False, fresh: bool = False) -> str:
    """SHA-256 of the weights of a model folder; of a `tied` model without a copy of its head.

    Sums of large files are kept in the user's cache, as long as size, times and inode of the file
    are the same; `fresh` reads every byte again.
    """
    files = weight_files(folder)
    sums = {file: None if fresh else _kept(file) for file in files}
    missing = [file for file, found in sums.items() if found is None]
    total = sum(file.stat().st_size for file in missing)
    if missing:
        with progress.task("Hashing the weights", total=total, unit="B") as bar:
            for file in missing:
                sums[file] = _hash_and_keep(file, bar)
    every = {name: line for found in sums.values() if found for name, line in found.items()}
    if tied:
        every.pop("lm_head.weight", None)
    return fsio.sha256_json(sorted(every.items()))


def _hash_and_keep(file: Path, bar: progress.Task) -> Sums:
    stamp, started_at = _stamp(file), time.time()
    found = _hashed(file, stored_tensors(file), bar)
    settled = max(file.stat().st_mtime, file.stat().st_ctime) < started_at - _SETTLED_S
    if settled and stamp == _stamp(file) and file.stat().st_size >= _WORTH_KEEPING_BYTES:
        _keep(file, stamp, found)
    return found


def _hashed(file: Path, tensors: Sequence[StoredTensor], bar: progress.Task) -> Sums:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    threads = min(_MAX_THREADS, machine.physical_cores())
    try:
        with ThreadPoolExecutor(threads) as pool:
            jobs = {pool.submit(_tensor_sha256, descriptor, t): t for t in tensors}
            found = {}
            for job in as_completed(jobs):
                tensor = jobs[job]
                shape = ",".join(map(str, tensor.shape))
                found[tensor.name] = f"{tensor.dtype} [{shape}] {job.result()}"
                bar.advance(tensor.num_bytes)
    finally:
        os.close(descriptor)
    return found


def _tensor_sha256(descriptor: int, tensor: StoredTensor) -> str:
    content = hashlib.sha256()
    for chunk in read_chunks(descriptor, tensor):
        content.update(chunk)
    return content.hexdigest()


# ---------------------------------------------------------------- what was hashed before


def _stamp(file: Path) -> list[int]:
    """Changes whenever the file does: nobody but the system sets ctime."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _kept(file: Path) -> Sums | None:
    entry = machine.read_cached(FILE).get(str(file.resolve()))
    return entry["sums"] if entry is not None and entry["stamp"] == _stamp(file) else None


def _keep(file: Path, stamp: list[int], sums: Sums) -> None:
    kept = {
        name: entry for name, entry in machine.read_cached(FILE).items() if Path(name).is_file()
    }
    kept.pop(str(file.resolve()), None)
    newest = dict(list(kept.items())[1 - _MAX_KEPT_FILES :])
    newest[str(file.resolve())] = {"stamp": stamp, "sums": sums}
    machine.write_cached(FILE, newest, f"the hash of {file.name}")
