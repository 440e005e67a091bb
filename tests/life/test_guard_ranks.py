"""Updates that go wrong among several processes: all decide alike, and one may run out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mule.run import Run
from tests.life.harness_guard import check_all_finite
from tests.life.harness_ranks import TRAIN, Ended, Ranks, check_same, facts
from tests.life.tiny_life import outcome, write_data


def train(ranks: Ranks, folder: Path, *words: str, size: int = 2, **fault: Any) -> Ended:
    write_data(folder)
    return ranks.run(folder, size, *TRAIN, *words, fault=fault)


def kinds(folder: Path) -> list[str]:
    return [event["kind"] for event in Run(folder / "runs" / "pretrain").events()]


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_all_go_back_together(ranks: Ranks, tmp_path: Path, killed: bool) -> None:
    """Broken weights at update 10: back to 8, and on with 15; a kill of one on the way is mended."""
    poison = {"bad weights": [10]}
    bad, plain = tmp_path / "bad", tmp_path / "plain"
    if killed:
        ended = train(ranks, bad, rank=1, step=13, kind="kill", poison=poison)
        assert ended.codes == [1, -9], ended.texts
        ended = ranks.run(bad, 2, *TRAIN, "--resume", fault={"poison": poison})
    else:
        ended = train(ranks, bad, poison=poison)
    assert ended.codes == [0, 0], ended.texts
    assert (
        "went back to the weights after update 8, and on with the data after update 14"
        in (ended.texts[0])
    )
    assert not ended.texts[1]
    skipped = train(ranks, plain, poison={"overflow": list(range(9, 15))})
    assert skipped.codes == [0, 0], skipped.texts
    assert outcome(bad / "runs" / "pretrain") == outcome(plain / "runs" / "pretrain")
    assert check_all_finite(bad / "runs" / "pretrain") == 5
    assert kinds(bad).count("rolled back") == 1
    assert kinds(plain).count("update skipped") == 6 and "update refused" not in kinds(plain)


def test_a_nan_in_one_process_is_refused_by_all(ranks: Ranks, tmp_path: Path) -> None:
    for name, poison, where in (
        ("nan", {"nan gradient": [6]}, [1]),
        ("left", {"left out": [6]}, [0, 1]),
    ):
        ended = train(ranks, tmp_path / name, poison=poison, only=where)
        assert ended.codes == [0, 0], ended.texts
        assert "update 6 refused (" in ended.texts[0] and not ended.texts[1]
    found, expected = (outcome(tmp_path / name / "runs" / "pretrain") for name in ("nan", "left"))
    assert found == expected


@pytest.mark.slow
def test_one_process_may_take_fewer_rows_at_once(ranks: Ranks, tmp_path: Path) -> None:
    """Memory runs out in the second process only: it cuts its share smaller, and all goes on."""
    alone = train(ranks, tmp_path / "alone", size=1)
    assert alone.codes == [0], alone.texts
    ended = train(ranks, tmp_path / "two", poison={"no memory": [5]}, only=[1])
    assert ended.codes == [0, 0], ended.texts
    found, expected = facts(tmp_path / "two", 2), facts(tmp_path / "alone", 1)
    found["rows"][4] = list(dict.fromkeys(found["rows"][4]))  # asked for again, in smaller parts
    check_same(found, expected)
    run = Run(tmp_path / "two" / "runs" / "pretrain")
    rows = run.metrics()[-1]["devices"]
    assert [(r["device"], r["micro_batch_rows"]) for r in rows] == [("cpu 0", 3), ("cpu 1", 1)]
    finished = run.events()[-1]
    assert finished["kind"] == "finished" and finished["devices"][1]["peak_resident_bytes"] > 1e6
