"""Durable writes: the old content or the new, never a mixture."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from mule import fsio, locks, logs
from mule.errors import DataError, StorageError


def test_a_file_survives_an_exception(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    fsio.write_json(file, {"old": 1})
    with pytest.raises(ValueError, match="stop"), fsio.atomic_file(file) as out:
        out.write(b"half of the new")
        raise ValueError("stop")
    assert fsio.read_json(file) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_survives_an_exception(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with fsio.atomic_folder(folder) as out:
        (out / "old").write_text("1")
    with pytest.raises(ValueError, match="stop"), fsio.atomic_folder(folder) as out:
        (out / "new").write_text("2")
        raise ValueError("stop")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    with fsio.atomic_folder(folder) as out:
        (out / "new").write_text("2")
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "new"]


def test_a_refused_check_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "large"
    file.write_text("old")

    def refuse(_path: Path) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), fsio.stream_file(file, refuse) as out:
        out.write_text("new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_the_manifest_finds_damage(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    with fsio.atomic_folder(folder) as out:
        (out / "inner").mkdir()
        (out / "inner" / "weights").write_bytes(bytes(range(200)))
    file = folder / "inner" / "weights"
    fsio.verify_folder(folder)
    content = bytearray(file.read_bytes())
    content[117] ^= 1
    for damage, words in (
        (bytes(content), "its content differs from its SHA-256 in the manifest"),
        (bytes(content[:199]), "199 bytes, the manifest says 200"),
        (None, "listed in the manifest but missing"),
    ):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
        with pytest.raises(StorageError, match=words) as caught:
            fsio.verify_folder(folder)
        assert caught.value.message.startswith(f"{file}: ")
        assert caught.value.hint == "use an older checkpoint, or make this folder again"
        file.write_bytes(b"")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StorageError, match=r"manifest\.json: not valid JSON"):
        fsio.verify_folder(folder)


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    log = fsio.AppendLog(file)
    log.append({"step": 1})
    log.close()
    with open(file, "ab") as out:
        out.write('{"step": 2, "é'.encode()[:-1])
    assert logs.read_log(file) == [{"step": 1}]
    log = fsio.AppendLog(file)
    log.append({"step": 3})
    log.sync()
    log.close()
    assert logs.read_log(file) == [{"step": 1}, {"step": 3}]
    assert logs.read_log(tmp_path / "absent") == []


def test_a_line_written_in_two_parts_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fsio.AppendLog(tmp_path / "log")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: write(fd, content[:5]))
    log.append({"step": 12345})
    monkeypatch.undo()
    log.close()
    assert logs.read_log(tmp_path / "log") == [{"step": 12345}]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_full_disk_is_explained(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError) as caught, fsio.atomic_folder(tmp_path / "made"):
        raise error
    assert caught.value.message == f"cannot write {tmp_path}/made: no space left on the disk"
    assert (
        caught.value.hint == "free some space, then try again: what was saved before is untouched"
    )
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_kind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="os error 999"), fsio.atomic_folder(tmp_path / "made"):
        raise RuntimeError("strange (os error 999)")
    with pytest.raises(StorageError) as caught:
        fsio.require_space(tmp_path / "absent", 2**60, "a checkpoint")
    assert caught.value.message.startswith(
        f"a checkpoint needs 1,099,511,627,776 MiB in {tmp_path}"
    )


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".partial-folder").mkdir()
    (tmp_path / ".partial-folder" / "file").write_text("x")
    (tmp_path / ".partial-file").write_text("x")
    (tmp_path / "kept").write_text("x")
    fsio.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_folders_are_resumed_after_a_failure(tmp_path: Path) -> None:
    root, paths = tmp_path / ".partial-work", (tmp_path / "train", tmp_path / "valid")
    for error in (KeyboardInterrupt(), StorageError("full"), OSError(errno.ENOSPC, "full")):
        with pytest.raises(type(error) if not isinstance(error, OSError) else StorageError):
            with fsio.resumable_folders(root, *paths) as work:
                (work.folders[0] / "tokens").write_text("12")
                work.log.write_text("{}")
                raise error
    assert [path.name for path in tmp_path.iterdir()] == [".partial-work"]
    with fsio.resumable_folders(root, *paths) as work:
        assert (work.folders[0] / "tokens").read_text() == "12"
        assert work.log.read_text() == "{}"
        (work.folders[1] / "tokens").write_text("3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train", "valid"]
    for path in paths:
        assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "tokens"]
        fsio.verify_folder(path)


def test_folders_of_bad_input_are_not_kept(tmp_path: Path) -> None:
    root, path = tmp_path / ".partial-work", tmp_path / "train"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(DataError), fsio.resumable_folders(root, path) as work:
        (work.folders[0] / "tokens").write_text("12")
        raise DataError("a.jsonl", 3, "broken")
    assert [found.name for found in tmp_path.iterdir()] == ["train"]
    assert [found.name for found in path.iterdir()] == ["old"]
    with fsio.resumable_folders(root, path) as work:
        assert not list(work.folders[0].iterdir())
    assert [found.name for found in path.iterdir()] == ["manifest.json"]


def test_a_lock_is_waited_for_and_leaves_nothing(tmp_path: Path) -> None:
    lock, order = tmp_path / "work.lock", []
    waiting = threading.Barrier(4)

    def other(name: str) -> None:
        with locks.locked(lock, waiting.wait):
            order.append(f"{name} in")
            order.append(f"{name} out")

    def unexpected() -> None:
        raise AssertionError("nobody else holds it")

    threads = [threading.Thread(target=other, args=(n,), daemon=True) for n in "abc"]
    with locks.locked(lock, unexpected):
        for thread in threads:
            thread.start()
        waiting.wait(10)  # all three are told, then wait
        assert order == []
    for thread in threads:
        thread.join(10)
    assert len(order) == 6 and all(order[n][0] == order[n + 1][0] for n in (0, 2, 4))
    assert not lock.exists()
    with pytest.raises(ValueError, match="stop"), locks.locked(lock, unexpected):
        raise ValueError("stop")
    assert not lock.exists()


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        fsio.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
    assert fsio.sha256_json({"b": 1, "a": 2}) == fsio.sha256_json(json.loads('{"a":2,"b":1}'))
