"""`mule export --adapter-only` and `mule verify` of its files: what is found, told and refused."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from mule.adapters.nf4 import QUANTIZED
from mule.cli import export_tables
from mule.commands import export, export_adapter, verify
from mule.config.adapter import LoraSection
from mule.errors import CheckFailed, ModelError, UserError
from mule.export import adapter_proof
from mule.export.adapter_gguf import write_adapter
from mule.export.adapter_proof import prove_adapter
from mule.export.limits import limits_of
from mule.export.merge_probe import Distance
from mule.generate.gguf_header import read_header
from tests.merge_case import CONFIG, SETTINGS, make_case, save_adapter, save_base

NEAR, FAR = Distance(1e-6, 1e-9, 1.0), Distance(2.0, 0.5, 0.3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, its f32 file, and adapters of LoRA and of QLoRA on it."""
    root = tmp_path_factory.mktemp("adapters")
    make_case(root, shard_bytes=10**9)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        save_adapter(root / "qlora", Path("base"), SETTINGS, quantized=QUANTIZED[True])
        shutil.rmtree(root / "adapter")
        save_adapter(root / "adapter", Path("base"))
        export.run("base", types=["f32"])
    return root


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def shown(show: Any, result: dict[str, Any]) -> str:
    console = Console(width=300, record=True, file=io.StringIO())
    show(console, result)
    return console.export_text()


def test_the_files_of_the_base_are_found_and_used(root: Path) -> None:
    found = export_adapter.run("adapter", types=["f32", "f16"])
    assert found["base_file"] == "exports/base/base-F32.gguf" and found["notes"] == []
    folder = root / "exports" / "adapter" / "adapter"
    assert (
        (folder / "Modelfile")
        .read_text()
        .startswith("FROM ../../base/base-F32.gguf\nADAPTER ./adapter-adapter-F16.gguf\nTEMPLATE")
    )
    metadata = read_header(folder / "adapter-adapter-F32.gguf").metadata
    assert metadata["general.name"] == "adapter (LoRA)"
    base = read_header(root / "exports" / "base" / "base-F32.gguf").metadata
    assert metadata["mule.base.weights"] == base["mule.weights"]
    text = shown(export_tables.show_adapter, found)
    assert "adapter-adapter-F32.gguf on base-F32.gguf, in llama.cpp" in text
    assert "with the adapter, against torch" in text and "ollama create adapter" in text
    checked = verify.run(folder)
    assert checked["ok"] and [row["file"] for row in checked["adapters"]] == [
        *("adapter-adapter-F16.gguf", "adapter-adapter-F32.gguf")
    ]
    assert "what the adapter changes" in shown(export_tables.show_verify, checked)
    record = json.loads((folder / "export.json").read_text())
    assert all(entry["check"]["ok"] for entry in record["files"])
    assert record["base_identity"]["weights"] == record["weights"] and record["quantized"] is None


def test_of_qlora_it_is_said_which_base_was_trained_on() -> None:
    found = export_adapter.run("qlora")
    (note,) = found["notes"]
    assert "it was trained on its base in 4 bits" in note and "nats away, same best token" in note
    assert "mule merge qlora --onto quantized" in note
    assert found["files"][0]["check"]["ok"], (
        "the adapter on the base as it is was what was compared"
    )


def test_without_a_file_of_the_base_nothing_is_claimed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter, base, out = str(root / "adapter"), str(root / "base"), tmp_path / "a" / "b" / "out"
    found = export_adapter.run(adapter, base=base, out=out)
    assert found["base_file"] is None and "not checked in llama.cpp" in found["notes"][0]
    assert not (out / "Modelfile").exists() and "check" not in found["files"][0]
    with pytest.raises(UserError, match="--system goes into the Modelfile") as caught:
        export_adapter.run(adapter, base=base, out=out, system="a")
    assert "write one: mule export base --types f16" in caught.value.hint
    with pytest.raises(
        UserError, match="an adapter runs on a GGUF file of its base, and none is at"
    ):
        verify.run(out, against=adapter, base=base)
    file = root / "exports" / "base" / "base-F32.gguf"
    assert verify.run(out, against=adapter, base=base, base_gguf=file)["ok"]


def test_what_is_no_adapter_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base is no adapter: there is nothing to write"):
        export_adapter.run("base")
    file = tmp_path / "a.gguf"
    write_adapter(root / "adapter", root / "base", file)
    with pytest.raises(UserError, match="nothing says which adapter it was written from"):
        verify.run(file)
    with pytest.raises(UserError, match="base is no adapter, and"):
        verify.run(file, against="base")
    with pytest.raises(UserError, match="--base-gguf is for adapters"):
        verify.run(root / "exports" / "base", base_gguf=file)


def test_an_adapter_of_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    wide = save_base(tmp_path / "wide", replace(CONFIG, intermediate_size=48), shard_bytes=10**9)
    with pytest.raises(ModelError, match=r"the adapter changes .*down_proj.weight of shape"):
        write_adapter(root / "adapter", wide, tmp_path / "a.gguf")
    more = save_base(tmp_path / "more", replace(CONFIG, vocab_size=310), shard_bytes=10**9)
    export.run(str(more), types=["f32"], out=tmp_path / "out", name="more")
    write_adapter(root / "adapter", root / "base", tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="310 tokens, and the adapter's base has 301"):
        prove_adapter(
            tmp_path / "a.gguf", tmp_path / "out" / "more-F32.gguf", root / "adapter", root / "base"
        )
    large = shutil.copytree(root / "adapter", tmp_path / "large")
    state = load_file(large / "adapter_model.safetensors")
    state = {name: tensor * 1e6 for name, tensor in state.items()}
    save_file(state, large / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="beyond what f16 can hold"):
        write_adapter(large, root / "base", tmp_path / "b.gguf", "f16")


def test_a_file_that_is_not_the_adapter_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter_proof._in_llama_cpp

    def shifted(*words: Any) -> Any:
        without, found, off = real(*words)
        return without, [torch.roll(row, 1, 0) for row in found], [row + 1 for row in off]

    monkeypatch.setattr(adapter_proof, "_in_llama_cpp", shifted)
    with pytest.raises(CheckFailed, match=r"not the same adapter: with scale 0 logits differ"):
        export_adapter.run("adapter", out=root / "exports" / "bad")


@pytest.mark.parametrize(
    ("base_type", "with_adapter", "without", "effect", "told"),
    [
        ("f16", FAR, NEAR, FAR, "with the adapter 0.5 nats from the model, at most 1e-05"),
        ("f32", NEAR, NEAR, Distance(1e-5, 1e-9, 1.0), "the adapter has no effect: it changes a"),
        ("q4_k_m", NEAR, Distance(0.5, 0.02, 0.9), Distance(0.1, 0.01, 0.9), "this proves little"),
    ],
)
def test_verdicts(
    root: Path,
    base_type: str,
    with_adapter: Distance,
    without: Distance,
    effect: Distance,
    told: str,
) -> None:
    proof = adapter_proof.AdapterProof(
        *("a.gguf", "b.gguf", base_type, with_adapter, without, effect, 0.0, 9)
    )
    adapter_proof._judge(proof, limits_of(base_type, "qwen3"), 9.0)
    assert told in " ".join(proof.failures + proof.notes)


def test_rslora_and_few_layers_stay_what_they_are(root: Path, tmp_path: Path) -> None:
    settings = LoraSection(
        r=4, alpha=6.0, use_rslora=True, last_layers=1, target_modules=["v_proj"]
    )
    adapter = save_adapter(tmp_path / "few", root / "base", settings)
    report = write_adapter(adapter, root / "base", tmp_path / "a.gguf")
    assert (report.num_weights, report.alpha, report.ranks) == (1, 12.0, [4])
