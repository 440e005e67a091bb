"""Preparing with many workers: each its files, one index over all."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mule import progress
from mule.data import scale
from mule.data.loader import make_batch
from mule.data.prepare import RowSettings, prepare
from mule.data.scale import merge_parts, part_folder, prepare_files
from mule.data.shards import open_shards
from mule.data.sources.options import ReadOptions
from mule.errors import StorageError, UserError
from mule.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["The capital of France is Paris, of Spain Madrid.\n" * 9], 300)
SETTINGS = RowSettings(ReadOptions(), 40)


def _rows(kind: str, number: int) -> list[dict[str, Any]]:
    texts = [f"File {number} row {n} is Paris{' and Spain' * (n % 3)}." for n in range(9)]
    if kind == "text":
        return [{"text": text} for text in texts]
    return [
        {
            "messages": [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": text[:20]},
            ]
        }
        for text in texts
    ]


def _write_files(folder: Path, kind: str = "text", count: int = 5) -> list[Path]:
    files = [folder / f"{number}.jsonl" for number in range(count)]
    for number, file in enumerate(files):
        file.write_text("".join(json.dumps(row) + "\n" for row in _rows(kind, number)))
    return files


def _parts(files: list[Path], out: Path, count: int) -> list[Path]:
    return [
        prepare_files(files, TOKENIZER, SETTINGS, out, index, count).folder
        for index in range(count)
    ]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_parts_merged_are_their_rows_one_after_the_other(tmp_path: Path, kind: str) -> None:
    files = _write_files(tmp_path, kind)
    parts = _parts(files, tmp_path / "out", 2)
    merged = merge_parts(reversed(parts), tmp_path / "out")
    alone = [prepare(files[n::2], TOKENIZER, SETTINGS, out_dir=tmp_path / "alone") for n in (0, 1)]
    assert merged.num_rows == alone[0].num_rows + alone[1].num_rows > 6
    for name in ("num_tokens", "num_examples", "num_targets"):
        assert getattr(merged, name) == getattr(alone[0], name) + getattr(alone[1], name)
    expected = [make_batch(shards, np.arange(shards.num_rows)) for shards in alone]
    order = np.random.Generator(np.random.Philox(1)).permutation(merged.num_rows)
    found = make_batch(merged, order)
    for name in ("input_ids", "targets", "positions", "segments"):
        rows = np.concatenate([getattr(batch, name).numpy() for batch in expected])
        assert (getattr(found, name).numpy() == rows[order]).all(), name
    used = int((found.segments > 0).sum())
    rest = 0 if kind == "chat" else sum(s.num_tokens - 1 - s.num_rows * 40 for s in alone)
    assert merged.fill == pytest.approx(min(1, (used + rest) / found.segments.numel()))
    sources = [source["file"] for source in merged.index["sources"]]
    assert sources == [str(file) for file in (*files[::2], *files[1::2])]
    assert open_shards(tmp_path / "out").index == merged.index


def test_a_part_is_found_again_and_made_again_when_its_files_change(tmp_path: Path) -> None:
    files = _write_files(tmp_path)
    first = prepare_files(files, TOKENIZER, SETTINGS, tmp_path / "out", 0, 2)
    written = (first.folder / "index.json").stat().st_mtime_ns
    again = prepare_files(files, TOKENIZER, SETTINGS, tmp_path / "out", 0, 2)
    assert (again.folder / "index.json").stat().st_mtime_ns == written
    files[2].write_text(json.dumps({"text": "Paris is of Spain. " * 20}) + "\n")
    changed = prepare_files(files, TOKENIZER, SETTINGS, tmp_path / "out", 0, 2)
    assert changed.folder == first.folder == part_folder(tmp_path / "out", 0, 2)
    assert changed.index["key"] != first.index["key"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["part-00000-of-00002"]


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    files, out = _write_files(tmp_path), tmp_path / "out"
    parts = _parts(files, out, 2)
    with pytest.raises(UserError, match="no parts to merge"):
        merge_parts([], out)
    with pytest.raises(UserError, match="1 of 2 parts are missing: part-00001-of-00002") as caught:
        merge_parts(parts[:1], out)
    assert caught.value.hint.startswith("run the same command again")
    with pytest.raises(UserError, match="1 of 2 parts are missing: part-00001-of-00002"):
        merge_parts([parts[0], out / "elsewhere" / "part-00001-of-00002"], out)
    extra = part_folder(out, 2, 3)
    prepare_files(files, TOKENIZER, SETTINGS, out, 2, 3)
    with pytest.raises(UserError, match="part-00002-of-00003 does not belong with part-00000-of-"):
        merge_parts([*parts, extra], out)
    other = RowSettings(ReadOptions(), 41)
    prepare_files(files, TOKENIZER, other, out, 1, 2)
    with pytest.raises(UserError, match=r"prepared with another row length: 41 and 40") as caught:
        merge_parts(parts, out)
    assert caught.value.hint == f"delete {parts[1]} and prepare it again"
    (parts[0] / "tokens.bin").write_bytes(b"1")
    with pytest.raises(StorageError, match=r"tokens.bin: 1 bytes, the manifest says"):
        merge_parts(parts, out)


def test_more_workers_than_files_are_refused(tmp_path: Path) -> None:
    files = _write_files(tmp_path)
    message = "6 workers for 5 files: data is split by file, so some would have nothing to do"
    with pytest.raises(UserError, match=message) as caught:
        prepare_files(files, TOKENIZER, SETTINGS, tmp_path / "out", 0, 6)
    assert caught.value.hint == "use at most 5, or cut the files into more"
    step = scale.prepare_step(files, TOKENIZER, SETTINGS, tmp_path / "out")
    for make in (scale.local_executor, scale.ray_executor):
        with pytest.raises(UserError, match=message):
            make(step, tasks=6)


# ---------------------------------------------------------------- datatrove


def test_datatrove_runs_the_workers_on_this_machine(tmp_path: Path) -> None:
    """Two processes, and the same bytes as by hand."""
    pytest.importorskip("datatrove")
    files = _write_files(tmp_path)
    by_hand = _parts(files, tmp_path / "hand", 2)
    merged = scale.prepare_locally(files, TOKENIZER, SETTINGS, tmp_path / "out", tasks=2)
    assert merged.index["parts"] == [folder.name for folder in by_hand]
    for folder in by_hand:
        for file in folder.iterdir():
            assert (tmp_path / "out" / folder.name / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "out").rglob("*.pik"))  # datatrove pickles for a cluster only


def test_executors_for_clusters_take_the_same_step(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    files = _write_files(tmp_path)
    step = scale.prepare_step(files, TOKENIZER, SETTINGS, tmp_path / "out", valid=True)
    slurm = scale.slurm_executor(step, tasks=5, time="01:00:00", partition="cpu", cpus_per_task=2)
    assert (slurm.tasks, slurm.time, slurm.partition, slurm.cpus_per_task) == (
        *(5, "01:00:00", "cpu"),
        2,
    )
    ray = scale.ray_executor(step, tasks=5, cpus_per_task=2)
    assert (ray.tasks, ray.cpus_per_task) == (5, 2)
    for executor in (slurm, ray):
        (found,) = executor.pipeline
        assert found == step
        found(None, 3, 5)
    shards = open_shards(part_folder(tmp_path / "out", 3, 5))
    assert shards.index["sources"][0]["file"] == str(files[3])
    assert shards.num_rows * 40 > shards.num_tokens - 1  # validation keeps the last, short row


def test_without_datatrove_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "datatrove":
            raise ImportError(name)
        return real_import(name, *rest)

    files = _write_files(tmp_path)
    step = scale.prepare_step(files, TOKENIZER, SETTINGS, tmp_path / "out")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="several workers need datatrove, which is not") as caught:
        scale.local_executor(step, tasks=2)
    assert caught.value.hint == 'pip install "mule[scale]"'


def test_bars_and_notes_of_a_part(tmp_path: Path) -> None:
    """A worker is told of what it leaves out, as anyone is."""
    texts: list[str] = []

    class Notes(progress.Silence):
        def note(self, text: str, level: str) -> None:
            texts.append(text)

    files = _write_files(tmp_path, "chat", 2)
    long = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Paris " * 99}]
    with open(files[1], "a") as opened:
        opened.write(json.dumps({"messages": long}) + "\n")
    with progress.using(Notes()):
        _parts(files, tmp_path / "out", 2)
    assert texts == ["1 of 10 examples are longer than data.max_seq_length=40 and were left out"]
