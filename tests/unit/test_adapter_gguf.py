"""An adapter as a GGUF file: on its base's file in llama.cpp it is the model that was trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mule.config.adapter import LoraSection
from mule.errors import MuleError, UserError
from mule.export import adapter_gguf
from mule.export.adapter_gguf import is_adapter, write_adapter
from mule.export.adapter_proof import AdapterProof, check_base_file, prove_adapter
from mule.export.families import FAMILIES
from mule.export.gguf import write_gguf
from mule.generate.gguf_header import read_header
from tests.merge_case import edit_json, save_adapter
from tests.parity.tiny_families import MODELS, save_family
from tests.parity.tiny_gguf import VOCAB_ROWS

SETTINGS = LoraSection(r=3, alpha=5.0)


def make(
    root: Path, name: str, settings: LoraSection = SETTINGS, **more: Any
) -> tuple[Path, Path, Path]:
    """(base, adapter, f32 file of the base) of a tiny model."""
    base = root / "base"
    save_family(base, name)
    adapter = save_adapter(root / "adapter", base, settings, std=0.1, **more)
    write_gguf(base, root / "base.gguf", "f32")
    return base, adapter, root / "base.gguf"


def prove(root: Path, base: Path, adapter: Path, file: Path, kind: str = "f32") -> AdapterProof:
    write_adapter(adapter, base, root / "lora.gguf", kind)
    return prove_adapter(root / "lora.gguf", file, adapter, base, threads=1)


FAST = ("llama", "gemma3_text", "phi3")  # turned rows, offset norms, fused layers
# Linear layers of a Mamba-1 block that multiply by themselves; the rank of the steps does not.
JAMBA = [*(f"{name}_proj" for name in "qkvo"), "in_proj", "x_proj", "out_proj"]


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST)) for name in FAMILIES],
)
def test_every_family_is_what_was_trained(tmp_path: Path, family: str) -> None:
    name = next(name for name, (kind, _) in MODELS.items() if kind == family)
    targets: Any = JAMBA if family == "jamba" else "all-linear"
    settings = LoraSection(r=3, alpha=5.0, target_modules=targets)
    proof = prove(tmp_path, *make(tmp_path, name, settings))
    assert proof.ok, proof.failures
    assert proof.with_adapter.max_logit_difference < (5e-3 if "gemma" in family else 1e-3)
    assert proof.effect.max_logit_difference > 0.1 and proof.scale_zero == 0


@dataclass(frozen=True)
class Case:
    root: Path
    base: Path
    adapter: Path
    file: Path

    def prove(self, adapter: Path | None = None, kind: str = "f32") -> AdapterProof:
        return prove(self.root, self.base, adapter or self.adapter, self.file, kind)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("adapter")
    return Case(root, *make(root, "llama, wide heads"))


def test_the_file_says_what_llama_cpp_wants(case: Case) -> None:
    report = write_adapter(
        case.adapter, case.base, case.root / "a.gguf", metadata={"name": "x", "mule.base.a": "b"}
    )
    header = read_header(case.root / "a.gguf")
    found = {key: header.metadata[key] for key in header.metadata if not key.startswith("GGUF")}
    assert found == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 5.0,
        "general.name": "x",
        "mule.base.a": "b",
    }
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    assert len(shapes) == 2 * report.num_weights == 28
    assert shapes["blk.0.attn_k.weight.lora_a"] == (3, 128)
    assert shapes["blk.0.attn_k.weight.lora_b"] == (128, 3)
    assert is_adapter(case.root / "a.gguf") and not is_adapter(case.file)


@pytest.mark.parametrize(
    "settings",
    [
        LoraSection(r=4, alpha=6.0, use_rslora=True),
        LoraSection(r=3, alpha=5.0, last_layers=1, target_modules=["q_proj", "down_proj"]),
    ],
    ids=["rslora", "some layers"],
)
def test_every_kind_of_lora(case: Case, tmp_path: Path, settings: LoraSection) -> None:
    proof = Case(tmp_path, case.base, tmp_path, case.file).prove(
        save_adapter(tmp_path / "a", case.base, settings, std=0.1)
    )
    assert proof.ok, proof.failures
    assert proof.with_adapter.max_logit_difference < 1e-4


def test_scales_of_their_own_are_kept(case: Case, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "a", case.base, SETTINGS, std=0.1)
    edit_json(adapter / "adapter_config.json", alpha_pattern={"q_proj": 1.5})
    proof = Case(tmp_path, case.base, adapter, case.file).prove()
    assert proof.ok and proof.with_adapter.max_logit_difference < 1e-4


def test_f16_is_near_and_a_rounded_base_too(case: Case, tmp_path: Path) -> None:
    assert case.prove(kind="f16").with_adapter.kl_mean < 1e-6
    write_gguf(case.base, tmp_path / "q8.gguf", "q8_0")
    proof = prove(case.root, case.base, case.adapter, tmp_path / "q8.gguf")
    assert proof.ok, proof.failures
    assert proof.with_adapter.kl_mean < 4 * proof.without.kl_mean < proof.effect.kl_mean


def test_a_matrix_that_the_file_cuts_in_two_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_family(base, "hybrid")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    layer = "base_model.model.model.layers.0.shared_mlp.input_linear"
    halves = {f"{layer}.lora_A.weight": (2, 128), f"{layer}.lora_B.weight": (320, 2)}
    save_file({n: torch.ones(s) for n, s in halves.items()}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["input_linear"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"a part of blk\.0\.ffn_.* in a GGUF") as error:
        write_adapter(adapter, base, tmp_path / "a.gguf")
    assert "mule merge" in error.value.hint


def test_rows_in_the_wrong_order_are_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_gguf, "to_llama_cpp", lambda _family, _shape, _name, up: up)
    proof = case.prove()
    assert not proof.ok and "its rows are in another order" in proof.failures[0]
    assert proof.verdict.startswith("not the same adapter: logits with the adapter differ by")


def test_what_no_file_can_say_is_refused(case: Case, tmp_path: Path) -> None:
    def refused(adapter: Path, kind: str = "f32") -> MuleError:
        with pytest.raises(MuleError) as caught:
            write_adapter(adapter, case.base, tmp_path / "no.gguf", kind)
        assert not (tmp_path / "no.gguf").exists()
        return caught.value

    dora = save_adapter(tmp_path / "dora", case.base, LoraSection(r=2, alpha=2.0, use_dora=True))
    error = refused(dora)
    assert "DoRA sets the length of its base's rows too" in error.message
    assert f"mule merge {dora}" in error.hint
    head = shutil.copytree(case.adapter, tmp_path / "head")
    halves = {"A": torch.ones(3, 128), "B": torch.ones(VOCAB_ROWS, 3)}
    state = {f"base_model.model.lm_head.lora_{h}.weight": t for h, t in halves.items()}
    save_file(state, head / "adapter_model.safetensors")
    assert "changes the head, which in" in refused(head).message
    assert "an adapter is not written as q4_k_m" in refused(case.adapter, "q4_k_m").message
    idle = save_adapter(tmp_path / "idle", case.base, SETTINGS, std=0.0)
    assert "the adapter has no effect: every lora_B is zero" in refused(idle).message
    saved = shutil.copytree(case.adapter, tmp_path / "saved")
    edit_json(saved / "adapter_config.json", modules_to_save=["embed_tokens"])
    error = refused(saved)
    assert "it replaces whole layers of its base" in error.message and "merge" in error.hint


def test_a_file_of_another_base_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="was written from other weights than those of the adapter"):
        write_gguf(case.base, case.root / "known.gguf", "f32", metadata={"mule.weights": "a"})
        check_base_file(case.root / "known.gguf", "b")
    assert "does not say which weights" in check_base_file(case.file, "b")[0]
    write_adapter(case.adapter, case.base, case.root / "a.gguf")
    with pytest.raises(UserError, match="is an adapter itself"):
        check_base_file(case.root / "a.gguf", "b")
