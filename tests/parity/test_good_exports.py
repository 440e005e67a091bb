"""Exports of trained models pass `mule verify`: no false alarm, in any family and type."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mule import fsio
from mule.commands import export, verify
from mule.data.atlas.corpus import END_OF_DOCUMENT, pretrain_text
from mule.data.atlas.facts import COUNTRIES
from mule.data.atlas.plan import Sizes, make_plan
from mule.export.mixtures import TYPES
from tests.parity.trained_families import ADAPTED, marked, trained

BASIC = ("f32", "q8_0", "q4_k_m")
OF_EXPERTS = "mxfp4"
FURTHER = tuple(kind for kind in TYPES if kind not in (*BASIC, OF_EXPERTS))  # of one family
FURTHER_FAMILY = "qwen3"
_VOCAB = 1024
_NUM_DOCUMENTS, _NUM_PROMPTS = 6, 3
# Perplexities of a trained model, as shares of the vocabulary: on what its chats trained, and on
# the documents it read before.
_ON_ANSWERS, _ON_DOCUMENTS = 0.02, 0.5


def held_out(file: Path) -> Path:
    """Documents of the atlas in words of another seed."""
    plan = make_plan(99, COUNTRIES[:24], Sizes(pretrain_bytes=12_000))
    texts = pretrain_text(plan).split(f"\n{END_OF_DOCUMENT}\n")[:_NUM_DOCUMENTS]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def exported(source: str, types: tuple[str, ...], out: Path) -> list[dict[str, Any]]:
    """What `mule verify` reports of each type, after one `mule export`."""
    export.run(source, types=list(types), out=out, name="m")
    texts = [held_out(out.with_suffix(".jsonl"))]
    place = out if len(types) > 1 else out / f"m-{types[0].upper()}.gguf"
    found = verify.run(place, against=source, texts=texts, prompts=_NUM_PROMPTS)["files"]
    return [report for report in found if report["type"] in types]  # not the master kept beside


def check(reports: list[dict[str, Any]], types: tuple[str, ...]) -> None:
    assert {report["type"] for report in reports} == set(types)
    for report in reports:
        assert report["ok"], (report["type"], report["failures"])
        assert report["tokens_equal"] and report["template_equal"] and report["stops"]
        assert report["num_prompts"] > 0
        assert report["ppl_reference"] < _ON_DOCUMENTS * _VOCAB


@pytest.mark.parametrize("family", marked())
def test_every_model_learned(family: str) -> None:
    losses = fsio.read_json(trained(family).folder / "made.json")
    assert math.exp(losses["chat"]["val_loss"]) < _ON_ANSWERS * _VOCAB


@pytest.mark.parametrize("family", marked())
def test_every_family_passes(tmp_path: Path, family: str) -> None:
    check(exported(str(trained(family).run), BASIC, tmp_path / "out"), BASIC)


@pytest.mark.slow
@pytest.mark.parametrize("type_name", FURTHER)
def test_every_type_passes(tmp_path: Path, type_name: str) -> None:
    check(exported(str(trained(FURTHER_FAMILY).run), (type_name,), tmp_path / "out"), (type_name,))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoeshared"])
def test_a_mixture_passes_in_the_type_of_experts(tmp_path: Path, family: str) -> None:
    check(exported(str(trained(family).run), (OF_EXPERTS,), tmp_path / "out"), (OF_EXPERTS,))


@pytest.mark.slow
@pytest.mark.parametrize("family", ADAPTED)
def test_a_merged_adapter_passes(tmp_path: Path, family: str) -> None:
    adapter = trained(family).adapter
    assert adapter is not None
    check(exported(str(adapter), BASIC, tmp_path / "out"), BASIC)
