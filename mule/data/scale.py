"""Preparing data with many workers: each takes some of the files, and one index joins the parts.

`prepare_files` is one worker, on any machine that sees the files; `merge_parts` comes last. Both
can be called by hand, or run by datatrove's executors (extra `scale`), here or on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.data.labels import files_by_source
from mule.data.prepare import Job, Output, Paths, RowSettings, Sources, fulfil, job_key
from mule.data.shards import INDEX, VERSION, Shards, open_shards
from mule.data.sources import expand
from mule.errors import UserError
from mule.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.executor.ray import RayPipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor

_SAME = (
    "kind",
    "valid",
    "dtype",
    "row_length",
    "document_mask",
    "packing",
    "tokenizer",
    "settings",
)
_SUMMED = (
    *("num_rows", "num_tokens", "num_examples", "num_items"),
    *("num_targets", "num_dropped", "num_truncated"),
)


def part_folder(out_dir: str | Path, index: int, count: int) -> Path:
    """Where the worker number `index` of `count` puts its part."""
    return Path(out_dir) / f"part-{index:05d}-of-{count:05d}"


def prepare_files(
    paths: Paths,
    tokenizer: Tokenizer,
    settings: RowSettings,
    out_dir: str | Path,
    index: int,
    count: int,
    *,
    valid: bool = False,
) -> Shards:
    """Prepare every count-th file of `paths`, from the one numbered `index`, as a part.

    Found again when it was made before from the same content; resumed when it was cut off.
    """
    assert 0 <= index < count
    named = files_by_source(paths)
    files = list(named)
    require_files(files, count)
    sources = Sources.of({file: named[file] for file in files[index::count]})
    key = job_key(sources, tokenizer, settings, valid, None)
    output = Output(part_folder(out_dir, index, count), key, valid)
    return fulfil(Job(tokenizer, settings, sources, (output,)))[0]


def require_files(files: Sequence[Path], count: int) -> None:
    """UserError unless there is a file for every worker."""
    if len(files) < count:
        raise UserError(
            f"{count:,} workers for {len(files):,} files: data is split by file, so some would "
            "have nothing to do",
            f"use at most {len(files):,}, or cut the files into more",
        )


def merge_parts(parts: Sequence[str | Path], destination: str | Path) -> Shards:
    """One index over all parts, in the order of their names; the parts stay where they are.

    Raises UserError for parts that do not belong together, StorageError for a damaged one.
    """
    folders = sorted((Path(part) for part in parts), key=lambda part: part.name)
    _check_complete(folders)
    indexes = []
    for folder in folders:
        fsio.verify_folder(folder)
        indexes.append(open_shards(folder).index)
        _check_same(folders[0], indexes[0], folder, indexes[-1])
    destination = Path(destination)
    names = [_relative(folder, destination) for folder in folders]
    sums = [fsio.sha256_file(folder / fsio.MANIFEST) for folder in folders]
    merged = {
        "version": VERSION,
        **{name: indexes[0][name] for name in _SAME},
        **{name: sum(index[name] for index in indexes) for name in _SUMMED},
        "key": fsio.sha256_json(sums),
        "split": None,
        "parts": names,
        "manifests": sums,
        "sources": [source for index in indexes for source in index["sources"]],
    }
    fsio.write_json(destination / INDEX, merged)
    return open_shards(destination)


def _check_complete(folders: list[Path]) -> None:
    if not folders:
        raise UserError("no parts to merge", "prepare them first")
    count = int(folders[0].name.rpartition("-")[2])
    expected = [part_folder("", index, count).name for index in range(count)]
    names = [folder.name for folder in folders]
    if missing := [name for name in expected if name not in names or not _at(folders, name)]:
        raise UserError(
            f"{len(missing):,} of {count:,} parts are missing: {', '.join(missing[:5])}",
            "run the same command again: what is there is found, the rest is prepared",
        )
    if extra := [name for name in names if name not in expected]:
        raise UserError(
            f"{extra[0]} does not belong with {expected[0]}", "merge the parts of one preparation"
        )


def _at(folders: list[Path], name: str) -> bool:
    return any(folder.name == name and (folder / INDEX).is_file() for folder in folders)


def _check_same(first: Path, wanted: dict[str, Any], part: Path, found: dict[str, Any]) -> None:
    for name in _SAME:
        if found[name] != wanted[name]:
            raise UserError(
                f"{part} and {first} were prepared with another {name.replace('_', ' ')}: "
                f"{found[name]} and {wanted[name]}",
                f"delete {part} and prepare it again",
            )


def _relative(folder: Path, destination: Path) -> str:
    """The way from the index to a part; parts elsewhere are named in full."""
    folder, destination = folder.resolve(), destination.resolve()
    inside = folder.is_relative_to(destination)
    return str(folder.relative_to(destination) if inside else folder)


# ---------------------------------------------------------------- datatrove


@dataclass(frozen=True)
class PrepareStep:
    """The one step of a datatrove pipeline: rank i of n prepares its files.

    Plain values only: datatrove pickles the step for its workers (dill) and keeps that file in
    its logging folder; Mule itself neither writes nor reads it. The tokenizer goes by its folder.
    """

    paths: tuple[str, ...]
    tokenizer_dir: str
    settings: RowSettings
    out_dir: str
    valid: bool = False

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        tokenizer = Tokenizer.load(self.tokenizer_dir)
        prepare_files(
            self.paths, tokenizer, self.settings, self.out_dir, rank, world_size, valid=self.valid
        )

    __call__ = run  # what datatrove calls


def prepare_step(
    paths: Paths,
    tokenizer: Tokenizer,
    settings: RowSettings,
    out_dir: str | Path,
    *,
    valid: bool = False,
) -> PrepareStep:
    """The step for these files, with the tokenizer put where every worker finds it."""
    folder = Path(out_dir).resolve() / f"tokenizer-{tokenizer.fingerprint()[:16]}"
    if not folder.exists():
        with fsio.atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
    files = tuple(str(file.resolve()) for file in expand(paths))
    return PrepareStep(files, str(folder), settings, str(folder.parent), valid)


def local_executor(
    step: PrepareStep, *, tasks: int, workers: int | None = None
) -> LocalPipelineExecutor:
    """All tasks on this machine, `workers` processes at once."""
    require_files([Path(path) for path in step.paths], tasks)
    _require_datatrove()
    from datatrove.executor.local import LocalPipelineExecutor

    return LocalPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        workers=workers or tasks,
        logging_dir=_logging_dir(step),
        skip_completed=False,  # Mule finds what is done, by content
    )


def slurm_executor(
    step: PrepareStep, *, tasks: int, time: str, partition: str, **options: Any
) -> SlurmPipelineExecutor:
    """The tasks as a Slurm job array; `options` as datatrove has them (cpus_per_task, ...)."""
    require_files([Path(path) for path in step.paths], tasks)
    _require_datatrove()
    from datatrove.executor.slurm import SlurmPipelineExecutor

    return SlurmPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        time=time,
        partition=partition,
        logging_dir=_logging_dir(step),
        job_name="mule-prepare",
        skip_completed=False,
        **options,
    )


def ray_executor(step: PrepareStep, *, tasks: int, **options: Any) -> RayPipelineExecutor:
    """The tasks on a Ray cluster; `options` as datatrove has them (cpus_per_task, ...)."""
    require_files([Path(path) for path in step.paths], tasks)
    _require_datatrove()
    from datatrove.executor.ray import RayPipelineExecutor

    return RayPipelineExecutor(
        pipeline=[step],
        tasks=tasks,
        logging_dir=_logging_dir(step),
        skip_completed=False,
        **options,
    )


def prepare_locally(
    paths: Paths,
    tokenizer: Tokenizer,
    settings: RowSettings,
    out_dir: str | Path,
    *,
    tasks: int,
    workers: int | None = None,
    valid: bool = False,
) -> Shards:
    """Prepare with several processes on this machine, and merge: everything in one call."""
    step = prepare_step(paths, tokenizer, settings, out_dir, valid=valid)
    local_executor(step, tasks=tasks, workers=workers).run()
    return merge_parts([part_folder(out_dir, n, tasks) for n in range(tasks)], out_dir)


def _logging_dir(step: PrepareStep) -> str:
    return str(Path(step.out_dir) / "datatrove-logs")


def _require_datatrove() -> None:
    try:
        import datatrove  # noqa: F401
    except ImportError:
        raise UserError(
            "several workers need datatrove, which is not installed",
            'pip install "mule[scale]"',
        ) from None
