"""What is done with a mixture of experts once it is there: adapters, 4 bits, serving."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mule.adapters.lora import add_lora, lora_state
from mule.adapters.lora_files import save_lora
from mule.adapters.qlora import load_quantized
from mule.config.adapter import LoraSection
from mule.config.load import load_recipe
from mule.errors import ConfigError, ModelError
from mule.generate.batching import open_forward, serving_dtype
from mule.generate.engine import stream
from mule.generate.forward import ModuleForward, Part
from mule.generate.native.decoder import can_be_native
from mule.models.config import MoEConfig, Routing
from mule.models.folder import load_model
from mule.plan.shape import check_routing
from tests.tiny import random_batch
from tests.unit.test_adapters import randomize, save_base
from tests.unit.test_moe import MIXED, SHARED

FAMILIES = {"qwen3_moe": MIXED, "granitemoeshared": replace(SHARED, qk_norm=False)}
IDS = torch.tensor([[3, 17, 29, 5, 61, 2, 44], [8, 80, 31, 7, 12, 9, 70]])

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", FAMILIES[request.param])


@torch.no_grad()
def test_an_adapter_of_attention_opens_in_peft(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = LoraSection(r=3, alpha=5.0)
    ours = load_model(base)
    add_lora(ours, settings, seed=4)
    randomize(ours)
    adapted = {
        name.partition(".lora_")[0] for name, _ in ours.named_parameters() if "lora_" in name
    }
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_lora(lora_state(dict(ours.named_parameters())), settings, str(base), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    plain = theirs(IDS).logits
    found = PeftModel.from_pretrained(theirs, folder).eval()(IDS).logits
    torch.testing.assert_close(found, ours(IDS), atol=1e-4, rtol=0)
    assert (found - plain).abs().max() > 1e-2


def test_a_layer_that_files_call_otherwise_is_refused(tmp_path: Path) -> None:
    model = load_model(save_base(tmp_path / "base", FAMILIES["granitemoeshared"]))
    for target in ("down_proj", "shared_expert.gate_up_proj"):
        with pytest.raises(ModelError, match=f"names {target}: files of this family call") as found:
            add_lora(model, LoraSection(target_modules=["q_proj", target]))
        assert "shared_mlp." in found.value.message
        assert found.value.hint == "choose among q_proj, k_proj, v_proj, o_proj"
    with pytest.raises(ModelError, match="names gate, which the model does not have"):
        add_lora(model, LoraSection(target_modules=["gate"]))


def test_routers_beside_an_adapter_learn_nothing_and_are_watched(base: Path) -> None:
    model = load_model(base).train()
    add_lora(model, LoraSection(r=2))
    plain = model.nll_sum(random_batch(2, 9))
    model.set_training(routing=Routing("none", z_loss=0.0))
    assert model.balance is not None
    model.balance.begin(1.0)
    watched = model.nll_sum(random_batch(2, 9))
    watched.backward()
    assert torch.equal(plain, watched)
    model.balance.applied(lambda tensor: None)
    assert sum(model.balance.report(lambda tensor: None)["tokens_per_expert"][0]) == 2 * 18


def test_settings_that_cannot_take_effect_are_refused() -> None:
    words = ["data.train=[a.txt]", "model.path=base", "adapter.kind=lora"]
    asked = load_recipe(None, [*words, "model.moe.z_loss=0.1"]).recipe
    with pytest.raises(
        ConfigError, match=r"adapter\.kind=lora leaves the routers as they are"
    ) as got:
        check_routing(asked, MIXED)
    assert got.value.hint == "remove model.moe.z_loss"
    single = replace(MIXED, moe=MoEConfig(5, 1, 12))
    full = load_recipe(None, ["data.train=[a.txt]", "model.path=base"]).recipe
    with pytest.raises(ConfigError, match="its weight is always 1") as got:
        check_routing(full, single)
    assert got.value.hint == "set model.moe.experts_per_token=2"
    check_routing(load_recipe(None, words).recipe, single)  # its routers are not trained


@torch.no_grad()
def test_a_base_in_4_bits_keeps_its_experts(base: Path) -> None:
    exact = load_model(base)
    model = load_quantized(base, exact.config, torch.float32, double_quant=True)
    ours, theirs = (dict(m.named_parameters()) for m in (model, exact))
    for name in theirs:
        if ".experts." in name or ".gate." in name:
            assert torch.equal(ours[name], theirs[name])
    assert 0 < (model(IDS) - exact(IDS)).abs().max() < 5


@torch.no_grad()
def test_serving_gives_the_text_of_the_modules(base: Path) -> None:
    """In torch: the C++ does not know experts. A neighbour changes nothing."""
    model = load_model(base).eval()
    assert not can_be_native(model)
    prompt = IDS[0].tolist()
    wanted = list(stream(model, prompt, max_tokens=12, stop_ids=[]))
    forward = open_forward(model, 3, 64)
    assert isinstance(forward, ModuleForward)
    forward.extend([Part(2, 0, IDS[1].tolist(), 40, False)])
    (logits,) = forward.extend([Part(0, 0, prompt, 40, True)])
    found = []
    for step in range(12):
        found.append(int(logits.argmax()))
        beside = Part(2, 7 + step, [5 + step], 40, True)
        logits, _ = forward.extend([Part(0, 7 + step, found[-1:], 40, True), beside])
    assert found == wanted


def test_weights_in_bf16_are_served_in_fp32(base: Path) -> None:
    """Where the C++ would read them as they are, torch computes in bf16 slowly."""
    raw = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    assert serving_dtype(base, adapted=False) == serving_dtype(base, adapted=True)


def test_files_hold_the_names_of_the_hub(base: Path) -> None:
    names = {name for name in load_file(base / "model.safetensors") if ".layers.1." in name}
    ends = {name.removeprefix("model.layers.1.") for name in names}
    if "qwen3" in json.loads((base / "config.json").read_text())["model_type"]:
        assert {f"mlp.experts.{e}.up_proj.weight" for e in range(5)} <= ends
        assert "mlp.gate.weight" in ends and not [end for end in ends if "gate_up" in end]
    else:
        parts = ("router.layer", "input_linear", "output_linear")
        assert {f"block_sparse_moe.{part}.weight" for part in parts} <= ends
        assert {"shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"} <= ends
