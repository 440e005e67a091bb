"""Decoders with state-space layers: causality, documents, caches, and what they begin as."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mule.adapters.lora import add_lora
from mule.batch import Batch
from mule.config.adapter import LoraSection
from mule.errors import ModelError
from mule.models import cost
from mule.models.cache import SlotCache
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.folder import load_model, model_state, read_config, save_model
from mule.models.stored import null_params
from mule.train.optim import decays
from tests.tiny import random_batch, tiny_model
from tests.tiny_mamba import ALL, HYBRID1, HYBRID2, PURE1, PURE2, loud_model


@pytest.fixture(params=ALL)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return ALL[request.param]


def influence(
    model: Decoder, ids: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """(T, T): how much each token's output depends on what enters at each place."""
    entering = model.model.embed(ids).detach().requires_grad_()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = model.model(ids, positions, segments, entering=entering)
    outputs = [hidden[0, place].square().sum() for place in range(ids.shape[1])]
    found = [torch.autograd.grad(output, entering, retain_graph=True)[0] for output in outputs]
    return torch.stack(found)[:, 0].norm(dim=-1)


def test_no_token_sees_a_later_one(config: ModelConfig) -> None:
    model = loud_model(config)
    seen = influence(model, torch.randint(0, 89, (1, 21)))
    assert (seen.triu(1) == 0).all()
    assert (seen.tril() > 0).sum() == 21 * 22 // 2  # and each one sees all before it


def test_no_token_sees_another_document(config: ModelConfig) -> None:
    model = loud_model(config)
    segments = torch.tensor([[1] * 5 + [2] + [3] * 13 + [4] * 2 + [0] * 3])
    seen = influence(model, torch.randint(0, 89, (1, 24)), segments)
    same = segments[0][:, None] == segments[0]
    assert (seen[~same] == 0).all() and (seen.triu(1) == 0).all()
    assert (seen[same.tril()] > 0).all()


@torch.no_grad()
def test_packed_documents_are_computed_as_alone(config: ModelConfig) -> None:
    model = loud_model(config)
    lengths = (9, 1, 22, 5)
    ids = torch.randint(0, 89, (1, sum(lengths)))
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model.model(ids, positions, segments)
    alone = [model.model(part, torch.arange(part.shape[1])[None]) for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=0)


@torch.no_grad()
def test_pieces_on_a_cache_give_the_logits_of_the_whole(config: ModelConfig) -> None:
    model = loud_model(config)
    ids = torch.randint(0, 89, (2, 75))
    whole = model(ids)
    cache, place = model.new_cache(2, 75), 0
    for count in (1, 1, 17, 1, 1, 2, 30, 1, 21):
        logits = model.step(ids[:, place : place + count], cache)
        place += count
        torch.testing.assert_close(logits, whole[:, place - 1], atol=2e-5, rtol=0)
    assert place == 75 and whole.std() > 0.5


@torch.no_grad()
def test_slots_begin_anew_and_idle_ones_keep_their_state(config: ModelConfig) -> None:
    model = loud_model(config)
    first, second = torch.randint(0, 89, (2, 1, 20))
    cache = SlotCache(config, 3, 40, model.lm_head.weight)

    def extend(slots: slice, ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
        rows = cache.rows(slots, starts, ids.shape[1], [20] * len(starts), 40)
        return model.extend(ids, rows)

    extend(slice(1, 2), torch.randint(0, 89, (1, 13)), [0])  # an older text in the slot
    extend(slice(1, 2), first[:, :15], [0])
    cache.copy(1, 2, 15)
    scratch = cache.scratch
    extend(slice(0, 2), torch.tensor([[5], [7]]), [scratch, scratch])  # rows that count for nothing
    found = extend(slice(1, 3), first[:, 15:16].expand(2, 1), [15, 15])
    torch.testing.assert_close(found, model(first)[:, 15].expand(2, -1), atol=2e-5, rtol=0)
    cache.clear(1)
    found = extend(slice(1, 2), second, [0])
    torch.testing.assert_close(found, model(second)[:, -1], atol=2e-5, rtol=0)


def test_a_cache_has_keys_of_the_layers_that_attend_only(config: ModelConfig) -> None:
    model = tiny_model(config)
    cache = model.new_cache(3, 64)
    keys = cost.kv_bytes_per_token(config, 4) * 64
    assert cache.num_bytes == 3 * (keys + cost.state_bytes(config, 4))
    slots = SlotCache(config, 3, 63, model.lm_head.weight)
    assert slots.num_bytes == cache.num_bytes


def test_the_parameters_are_counted(config: ModelConfig) -> None:
    assert cost.total_params(config) == sum(p.numel() for p in tiny_model(config).parameters())


def test_fresh_weights(config: ModelConfig) -> None:
    """As mamba_ssm begins them; with weight decay on none of what is no matrix."""
    model = tiny_model(config, seed=3)
    again = dict(tiny_model(config, seed=3).named_parameters())
    other = dict(tiny_model(config, seed=4).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again[name])
        part = name.rpartition(".mamba.")[2]
        if part in ("dt_bias", "dt_proj.bias"):
            steps = F.softplus(parameter.double())
            assert 0.999e-3 < steps.min() and steps.max() < 0.1001
            assert not torch.equal(parameter, other[name])
        elif part == "A_log" and parameter.dim() == 1:
            assert 1 <= parameter.exp().min() and parameter.exp().max() <= 16
        elif part == "A_log":
            wanted = torch.arange(1.0, 6.0).expand_as(parameter)
            torch.testing.assert_close(parameter.exp(), wanted)
        elif part in ("D", "norm.weight"):
            assert (parameter == 1).all()
        elif part.startswith("conv1d"):
            assert 0.2 < parameter.abs().max() <= config.mamba.conv_kernel**-0.5  # type: ignore[union-attr]
        elif part == "out_proj.weight":
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.15)
        is_matrix = part.endswith("proj.weight") and parameter.dim() == 2
        if part != name:
            assert decays(name, parameter) == is_matrix, name


def test_a_step_trains_every_weight(config: ModelConfig) -> None:
    model = loud_model(config).train()
    batch = random_batch(2, 40)
    segments = torch.tensor([[1] * 25 + [2] * 15, [1] * 40])
    batch = Batch(batch.input_ids, batch.targets, batch.positions, segments, isolated=True)
    model.nll_sum(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


@pytest.mark.parametrize("config", [PURE2, PURE1])
def test_a_model_without_attention_has_a_null_layer_in_its_files(
    tmp_path: Path, config: ModelConfig
) -> None:
    from safetensors import safe_open

    model = loud_model(config)
    save_model(model_state(model), config, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        null = [name for name in tensors.keys() if name.startswith("model.layers.3.")]
        assert all(not tensors.get_tensor(name).any() for name in null)
        assert sum(tensors.get_tensor(name).numel() for name in null) == null_params(config) > 0
    assert read_config(tmp_path) == config
    again = load_model(tmp_path)
    ids = torch.randint(0, 89, (1, 20))
    assert torch.equal(again(ids), model(ids))


@pytest.mark.parametrize("config", [HYBRID2, HYBRID1])
def test_a_mixed_model_has_none(tmp_path: Path, config: ModelConfig) -> None:
    assert null_params(config) == 0
    save_model(model_state(tiny_model(config)), config, tmp_path)
    assert read_config(tmp_path) == config


def test_a_null_layer_that_is_not_null_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(model_state(tiny_model(PURE2)), PURE2, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.self_attn.o_proj.weight"][0, 0] = 1.0
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="null attention layer, and not zero"):
        load_model(tmp_path)


@pytest.mark.parametrize("config", ALL.values(), ids=ALL)
def test_an_adapter_on_every_linear_layer_takes_part(config: ModelConfig) -> None:
    model, ids = tiny_model(config), torch.randint(config.vocab_size, (1, 9))
    before = model(ids)
    add_lora(model, LoraSection(r=2))
    assert torch.equal(model(ids), before), "B is 0"
    names = [name for name, _ in model.named_parameters() if "lora_B" in name]
    for name in names:
        torch.nn.init.normal_(model.get_parameter(name))
    model(ids).square().sum().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)
    expected = {"in_proj", "out_proj"} | (
        {"x_proj", "dt_proj"} if config.family == "jamba" else set()
    )
    assert expected <= {name.split(".")[-3] for name in names}
