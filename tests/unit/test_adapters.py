"""LoRA: PEFT's files and arithmetic, merging, and whose base it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mule import fsio
from mule.adapters.identity import base_identity, check_base, save_identity
from mule.adapters.lora import add_lora, load_lora, lora_state, merge_lora, save_lora
from mule.config.schema import LoraSection
from mule.errors import ModelError
from mule.models.decoder import Decoder
from mule.models.folder import load_model, model_state, save_model
from tests.tiny import TINY, tiny_model

SETTINGS = LoraSection(r=3, alpha=5.0, dropout=0.2)
IDS = torch.tensor([[3, 17, 29, 5, 61, 2, 44], [8, 80, 31, 7, 12, 9, 70]])


def save_base(folder: Path, seed: int = 1) -> Path:
    model = tiny_model(seed=seed)
    with fsio.atomic_folder(folder) as out:
        save_model(model_state(model), TINY, out)
        (out / "tokenizer.json").write_text('{"made": "up"}')
    return folder


def adapted(base: Path, settings: LoraSection = SETTINGS) -> Decoder:
    """The base with an adapter whose every weight is random, as after training."""
    model = load_model(base)
    add_lora(model, settings, seed=4)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.2, generator=generator)
    return model.eval()


def save_adapter(model: Decoder, base: Path, folder: Path) -> Path:
    with fsio.atomic_folder(folder) as out:
        save_lora(lora_state(dict(model.named_parameters())), SETTINGS, str(base), out)
        save_identity(base, base_identity(base), out)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found = model(IDS)
    return getattr(found, "logits", found)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


def test_a_fresh_adapter_changes_nothing_and_trains_only_itself(base: Path) -> None:
    model = load_model(base).eval()
    before = logits(model)
    add_lora(model, SETTINGS, seed=4)
    assert torch.equal(logits(model.eval()), before)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * TINY.num_layers


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_an_adapter_opens_in_peft(base: Path, tmp_path: Path) -> None:
    """PEFT on the transformers class gives our logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours = adapted(base)
    folder = save_adapter(ours, base, tmp_path / "adapter")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    plain = logits(theirs.eval())
    found = logits(PeftModel.from_pretrained(theirs, folder).eval())
    torch.testing.assert_close(found, logits(ours), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-2


def test_an_adapter_comes_back_from_its_folder(base: Path, tmp_path: Path) -> None:
    ours = adapted(base)
    folder = save_adapter(ours, base, tmp_path / "adapter")
    again = load_model(base)
    load_lora(again, folder)
    assert torch.equal(logits(again.eval()), logits(ours))


def test_merged_equals_adapter(base: Path) -> None:
    model = adapted(base)
    expected = logits(model)
    assert merge_lora(model) == 7 * TINY.num_layers
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)
    assert (logits(load_model(base).eval()) - expected).abs().max() > 1e-2


def test_the_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(adapted(base), base, tmp_path / "adapter")
    check_base(folder, base)
    other = save_base(tmp_path / "other", seed=2)
    with pytest.raises(ModelError) as caught:
        check_base(folder, other)
    assert caught.value.message == (
        f"{folder}: this adapter was trained on {base}; {other} differs from it in weights"
    )
    assert caught.value.hint == f"give the original base: --base {base}"
    (other / "tokenizer.json").write_text("{}")
    (other / "chat_template.jinja").write_text("new")
    with pytest.raises(
        ModelError, match=r"in weights, tokenizer, chat template\nhint: give the original"
    ):
        check_base(folder, other)


def test_damaged_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_adapter(adapted(base), base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: weights[name] * torch.nan}, file)
    with pytest.raises(ModelError, match="or holds NaN"):
        load_lora(load_model(base), folder)
    save_file({key: value for key, value in weights.items() if key != name}, file)
    with pytest.raises(ModelError) as caught:
        load_lora(load_model(base), folder)
    assert caught.value.message == f"{file}: does not fit the model, first at {name}"


def test_other_kinds_of_adapter_are_named(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    for change, kind in (({"peft_type": "IA3"}, "IA3"), ({"use_dora": True}, "DoRA or rsLoRA")):
        file.write_text(json.dumps({"peft_type": "LORA", **change}))
        with pytest.raises(ModelError, match=f"an adapter of kind {kind}"):
            load_lora(load_model(base), tmp_path)


def test_an_unknown_layer_is_named(base: Path) -> None:
    with pytest.raises(ModelError) as caught:
        add_lora(load_model(base), LoraSection(target_modules=["q_proj", "w_pack"]))
    assert "target_modules names w_pack, which the model does not have" in caught.value.message
    assert caught.value.hint.startswith("choose among q_proj, ")
