"""What the tests of the doctor's rules find must have its French, whichever rule finds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mule.doctor.finding import Found
from tests.french_case import assert_in_french


@pytest.fixture(autouse=True)
def findings_are_told_in_french(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Note what the rules find in the tests of test_doctor_rules_*.py, and tell it in French."""
    if not request.module.__name__.rpartition(".")[2].startswith("test_doctor_rules"):
        yield
        return
    found: list[Found] = []
    plain = Found.__init__

    def noted(self: Found, *values: Any, **named: Any) -> None:
        plain(self, *values, **named)
        found.append(self)

    monkeypatch.setattr(Found, "__init__", noted)
    yield
    for one in found:
        assert_in_french("doctor", one.what)
        assert_in_french("doctor", one.remedy)
