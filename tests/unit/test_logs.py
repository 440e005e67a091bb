"""Rows held as numbers: what was put in comes out again, in a fraction of the memory."""

from __future__ import annotations

import tracemalloc

import pytest

from mule.logs import Rows, pick

ROWS = [
    {"step": 1, "loss": 2.5, "at": 1795370062.061, "note": None},
    {"step": 2, "loss": 2.0, "val_loss_by": {"a": 1.0}, "is_last": True},
    {"loss": 3, "step": 3, "bytes": 2**60, "small": -(2**53), "name": "x", "moe": [1, 2]},
    {},
    {"step": 2, "loss": 0.1 + 0.2},
]


def test_rows_come_out_as_they_went_in():
    rows = Rows(ROWS)
    assert list(rows) == ROWS
    assert [list(row) for row in rows] == [list(row) for row in ROWS]
    assert [type(value) for row in rows for value in row.values()] == [
        type(value) for row in ROWS for value in row.values()
    ]
    assert (
        len(rows) == 5
        and rows[-1] == ROWS[-1]
        and rows[1:4] == ROWS[1:4]
        and rows[::-2] == ROWS[::-2]
    )
    with pytest.raises(IndexError):
        rows[5]
    assert not Rows() and list(Rows()) == []


@pytest.mark.parametrize("rows", [ROWS, Rows(ROWS)], ids=["list", "Rows"])
def test_figures_are_picked_out_of_rows(rows):
    assert list(pick(rows, "step", "loss")) == [
        (1, 2.5),
        (2, 2.0),
        (3, 3),
        (None, None),
        (2, 0.1 + 0.2),
    ]
    assert list(pick(rows, "moe", "name")) == [
        *[(None, None)] * 2,
        ([1, 2], "x"),
        *[(None, None)] * 2,
    ]


def test_a_long_log_takes_less_than_a_third_of_its_dictionaries():
    names = [f"figure_{number}" for number in range(14)]

    def made():
        for step in range(5000):
            yield {"step": step} | {name: step / 7 for name in names}

    def held(build) -> int:
        tracemalloc.start()
        kept = build(made())
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(kept) == 5000
        return size

    assert held(Rows) < held(list) / 3
