"""Which base an adapter belongs to: what counts as the same, and that what differs is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mule import fsio, machine, progress
from mule.adapters import identity
from mule.adapters.identity import (
    base_identity,
    check_base,
    recorded_base,
    recorded_quantization,
    save_identity,
)
from mule.adapters.source import find_source
from mule.errors import ModelError
from mule.models import weight_hash
from mule.models.folder import weight_files
from tests.merge_case import CONFIG, MergeCase, edit_json, make_case, save_adapter, save_base


@pytest.fixture
def case(tmp_path: Path) -> MergeCase:
    return make_case(tmp_path)


def copy_of(case: MergeCase) -> Path:
    return Path(shutil.copytree(case.base, case.root / "copy"))


def one_file(folder: Path) -> None:
    """The same weights, in one file, under other metadata and in another order."""
    weights = {name: t for file in weight_files(folder) for name, t in load_file(file).items()}
    for file in [*weight_files(folder), folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file(dict(reversed(weights.items())), folder / "model.safetensors", {"made": "elsewhere"})


def template_in_config(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=template)


SAME: list[Callable[[Path], object]] = [
    one_file,
    template_in_config,
    lambda f: edit_json(f / "config.json", transformers_version="9.9", torch_dtype="bfloat16"),
    lambda f: edit_json(f / "tokenizer.json", truncation=None, padding=None),
    lambda f: (f / "README.md").write_text("a card"),
]


@pytest.mark.parametrize("change", SAME, ids=["shards", "template", "config", "tokenizer", "card"])
def test_the_same_model_in_other_files_is_the_same(
    case: MergeCase, change: Callable[[Path], object]
) -> None:
    copy = copy_of(case)
    change(copy)
    assert base_identity(copy) == base_identity(case.base)
    check_base(case.adapter, copy)


def change_weight(folder: Path) -> None:
    file = weight_files(folder)[1]
    weights = load_file(file)
    name = min(weights)
    weights[name].view(-1)[0] += 1e-6
    save_file(weights, file, {"format": "pt"})


DIFFERENT: list[tuple[Callable[[Path], object], str]] = [
    (change_weight, "weights"),
    (
        lambda f: edit_json(f / "config.json", rope_theta=5e5, rope_parameters=None),
        "shape (rope_th",
    ),
    (lambda f: edit_json(f / "tokenizer_config.json", eos_token="<|endoftext|>"), "tokenizer"),
    (lambda f: edit_json(f / "tokenizer.json", normalizer={"type": "NFC"}), "tokenizer"),
    (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "chat template"),
]


@pytest.mark.parametrize(
    ("change", "what"), DIFFERENT, ids=lambda v: v if isinstance(v, str) else ""
)
def test_what_differs_is_named(
    case: MergeCase, change: Callable[[Path], object], what: str
) -> None:
    copy = copy_of(case)
    change(copy)
    with pytest.raises(ModelError) as caught:
        find_source(str(case.adapter), base=str(copy))
    assert f"was trained on {case.base}; {copy} differs from it in {what}" in caught.value.message
    assert "," not in caught.value.message.rpartition(" in ")[2].partition("(")[0], "nothing else"
    assert caught.value.hint == f"give the original base: --base {case.base}"


def test_a_base_of_another_shape_is_refused_by_its_figures(case: MergeCase) -> None:
    """No size mismatch or IndexError from deep inside."""
    wider = save_base(case.root / "wider", replace(CONFIG, hidden_size=32))
    with pytest.raises(ModelError, match=r"differs from it in shape \(hidden_size 24, here 32\)"):
        check_base(case.adapter, wider)


def test_a_record_of_earlier_days_still_checks(case: MergeCase) -> None:
    record = {"base": str(case.base), "sha256": identity._file_identity(case.base)}
    (case.adapter / "mule_base.json").write_text(json.dumps(record))
    assert find_source(str(case.adapter)).model_dir == case.base
    assert recorded_quantization(case.adapter) is None
    change_weight(case.base)
    (case.base / "chat_template.jinja").write_text("new")
    with pytest.raises(ModelError, match="differs from it in weights, chat template"):
        check_base(case.adapter, case.base)


def test_a_field_added_to_the_config_later_changes_no_identity() -> None:
    assert identity._shape(CONFIG) == identity._shape(replace(CONFIG, logit_scale=1.0))
    assert "logit_scale=0.5" in identity._shape(replace(CONFIG, logit_scale=0.5))


def test_a_damaged_or_newer_record_is_told(case: MergeCase) -> None:
    file = case.adapter / "mule_base.json"
    file.write_text('{"base": 3}')
    with pytest.raises(ModelError, match=r"record of the adapter's base is damaged"):
        check_base(case.adapter, case.base)
    file.write_text(json.dumps({"base": "x", "version": 3, "identity": {}}))
    with pytest.raises(ModelError, match="written by a newer version of Mule"):
        check_base(case.adapter, case.base)


def test_the_record_says_how_the_base_was_stored(case: MergeCase, tmp_path: Path) -> None:
    folder = tmp_path / "record"
    folder.mkdir()
    save_identity(case.base, base_identity(case.base), folder, quantized="nf4, double quantised")
    assert recorded_quantization(folder) == "nf4, double quantised"
    assert recorded_quantization(case.adapter) is None


# ---------------------------------------------------------------- adapters of other programs


class Notes(progress.Silence):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str, level: str) -> None:
        self.texts.append(text)


def test_a_foreign_adapter_names_its_base_and_is_told_unproven(case: MergeCase) -> None:
    foreign = save_adapter(case.root / "foreign", case.base, record=False)
    assert recorded_base(foreign) == str(case.base)
    notes = Notes()
    with progress.using(notes):
        assert find_source(str(foreign)).model_dir == case.base
    assert "carries no hash of its base" in notes.texts[0] and str(case.base) in notes.texts[0]
    assert find_source(str(foreign)).tokenizer_dir == case.base, "it has no tokenizer of its own"
    edit_json(foreign / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not say where its base model is"):
        find_source(str(foreign))


def test_the_missing_base_of_a_foreign_adapter_is_named(case: MergeCase) -> None:
    foreign = save_adapter(case.root / "foreign", case.base, record=False)
    edit_json(foreign / "adapter_config.json", base_model_name_or_path="/elsewhere/base")
    with pytest.raises(ModelError, match="its base model /elsewhere/base is not there"):
        find_source(str(foreign))


def test_an_adapter_is_no_base(case: MergeCase) -> None:
    with pytest.raises(ModelError) as caught:
        find_source(str(case.adapter), base=str(case.adapter))
    assert "an adapter itself, so no base" in caught.value.message
    assert f"mule merge {case.adapter}" in caught.value.hint


# ---------------------------------------------------------------- sums kept for large files


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Small files count as large and old; what is hashed is noted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(weight_hash, "_WORTH_KEEPING_BYTES", 1)
    monkeypatch.setattr(weight_hash, "_SETTLED_S", -60.0)
    hashed: list[str] = []
    original = weight_hash._hashed

    def noted(file: Path, *args: object) -> dict[str, str]:
        hashed.append(file.name)
        return original(file, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(weight_hash, "_hashed", noted)
    return hashed


def test_sums_are_kept_until_the_file_changes(case: MergeCase, kept: list[str]) -> None:
    first = base_identity(case.base)
    assert len(kept) == len(weight_files(case.base))
    kept.clear()
    assert base_identity(case.base) == first and not kept
    assert base_identity(case.base, fresh=True) == first and len(kept) > 3
    kept.clear()
    file = weight_files(case.base)[1]
    before = file.stat()
    change_weight(case.base)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime as they were
    assert file.stat().st_size == before.st_size
    assert base_identity(case.base) != first and kept == [file.name]


def test_a_file_that_may_still_change_is_not_kept(
    case: MergeCase, kept: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_hash, "_SETTLED_S", 60.0)
    base_identity(case.base)
    kept.clear()
    base_identity(case.base)
    assert len(kept) == len(weight_files(case.base))


def test_a_torn_cache_is_no_reason_to_fail(case: MergeCase, kept: list[str]) -> None:
    first = base_identity(case.base)
    (machine.cache_dir() / weight_hash.FILE).write_text("{torn")
    assert base_identity(case.base) == first


def test_a_cut_off_file_is_named(case: MergeCase) -> None:
    file = weight_files(case.base)[0]
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"model-00001-of-.*not a readable safetensors file"):
        base_identity(case.base)
    file.write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        base_identity(case.base)
    assert fsio.sha256_file(file)
