"""Where the C++ of the decoder cannot be had, torch computes, and a note says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mule import machine, progress
from mule.errors import ModelError
from mule.generate.forward import Part
from mule.generate.native.build import library
from mule.generate.native.decoder import NativeForward, can_be_native
from mule.native import build
from tests.notes import Notes
from tests.tiny import tiny_model


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine on which nothing was compiled yet; where that will be."""
    monkeypatch.setattr(machine, "cache_dir", lambda: tmp_path)
    library.cache_clear()
    yield tmp_path / "native"
    library.cache_clear()


def said() -> list[str]:
    notes = Notes()
    with progress.using(notes):
        assert library() is None
        assert not can_be_native(tiny_model())
    return notes.texts


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpp_compiler_problem", lambda: "no C++ compiler is installed")
    assert said() == [
        "decoding goes through torch, more slowly: no C++ compiler is installed\nhint: install g++"
    ]
    assert not fresh.exists()


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_FLAGS", ("-no-such-flag",))
    [text] = said()
    assert text.startswith("decoding goes through torch, more slowly: ")
    assert "-no-such-flag" in text and "\nhint: install g++ 12" in text
    assert not list(fresh.iterdir())


def test_a_damaged_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: object, **options: object) -> Path:
        fresh.mkdir()
        path = fresh / "decoder.so"
        path.write_bytes(b"not a library")
        return path

    monkeypatch.setattr(build, "_compiled", write)
    [text] = said()
    assert "more slowly: " in text and "decoder.so" in text


def test_other_systems_compute_in_torch(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    assert said() == []


def test_a_step_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = NativeForward(tiny_model(), 1, 32)

    class Full:
        def mule_forward(self, *pointers: object) -> int:
            return 1

    monkeypatch.setattr(forward, "_library", Full())
    with pytest.raises(ModelError) as caught:
        forward.extend([Part(0, 0, [1, 2], 2, True)])
    assert str(caught.value) == (
        "there is no memory left for this step\nhint: serve fewer rows at once"
    )


def test_models_that_are_not_computed_natively() -> None:
    assert not can_be_native(tiny_model(dtype=torch.float16))
    adapted = tiny_model()
    block = adapted.model.layers[0]
    block.mlp.down_proj = torch.nn.Sequential(block.mlp.down_proj)
    assert not can_be_native(adapted)
