"""A mixture of experts: what it computes, whom it turns away, and what its routers are held to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from mule.batch import Batch
from mule.config.schema import OptimSection
from mule.models.capacity import assign_within_capacity
from mule.models.config import ModelConfig, MoEConfig, Routing
from mule.models.decoder import Decoder
from mule.models.experts import _grouped, apply_experts
from mule.models.moe import MoE
from mule.train.optim import Optimizer
from mule.train.scaler import LossScaler
from mule.train.step import RefusedStep, train_step
from tests.tiny import TINY, part, random_batch, tiny_model

MIXED = dataclasses.replace(TINY, family="qwen3_moe", moe=MoEConfig(5, 2, 12))
SHARED = dataclasses.replace(TINY, family="granitemoeshared", moe=MoEConfig(5, 2, 12, 20))
LAYERS = TINY.num_layers


def alone(_tensor: torch.Tensor) -> None:
    """The sum over one process."""


def loud(model: Decoder) -> Decoder:
    """Routers that are sure of themselves: at random, all experts are nearly alike."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.mul_(10)
    return model


def mixture(routing: Routing | None = None, config: ModelConfig = MIXED, **training) -> Decoder:
    model = loud(tiny_model(config)).train()
    model.set_training(routing=routing, **training)
    return model


def padded(rows: int = 3, length: int = 16) -> Batch:
    """Rows of which the last four tokens are padding."""
    batch = random_batch(rows, length)
    segments = batch.segments.clone()
    segments[:, -4:] = 0
    targets = batch.targets.where(segments != 0, -100)
    return dataclasses.replace(batch, segments=segments, targets=targets)


# ---------------------------------------------------------------- the experts


def one_by_one(x, weights, assigned, gate_up, down) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The definition."""
    rows = []
    for token in range(len(x)):
        y = torch.zeros_like(x[0])
        for place, expert in enumerate(assigned[token].tolist()):
            if expert < len(down):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                y = y + weights[token, place] * (down[expert] @ (F.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def experts_case(dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Leaves, and an assignment in which expert 2 is never chosen and some choose none."""
    torch.manual_seed(4)
    shapes = ((17, 8), (17, 3), (6, 48, 8), (6, 8, 24))
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    assigned = torch.rand(17, 6).topk(3).indices
    assigned = assigned.where((assigned != 2) & (torch.rand(17, 3) > 0.2), 6)
    return leaves, assigned


def results(
    compute: Callable[..., torch.Tensor], leaves: list[torch.Tensor], *args: torch.Tensor
) -> list[torch.Tensor]:
    """The result and the gradients of a function of the leaves."""
    for leaf in leaves:
        leaf.grad = None
    y = compute(*leaves[:2], *args, *leaves[2:])
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_experts_compute_what_they_are_defined_to() -> None:
    leaves, assigned = experts_case(torch.float64)
    wanted = results(one_by_one, leaves, assigned)
    for ours, theirs in zip(results(apply_experts, leaves, assigned), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_one_product_for_all_experts_computes_the_same() -> None:
    """What a GPU takes, here on the CPU; rows that no expert computes do not leak."""
    leaves, assigned = experts_case(torch.float32)
    order = assigned.flatten().argsort(stable=True)
    ends = torch.bincount(assigned.flatten(), minlength=7)[:6].cumsum(0)
    wanted = results(apply_experts, leaves, assigned)
    for ours, theirs in zip(results(_grouped, leaves, order, ends), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_no_tokens_are_no_work() -> None:
    leaves, assigned = experts_case(torch.float32)
    empty = [leaf[:0].detach().requires_grad_() for leaf in leaves[:2]]
    y, *gradients = results(apply_experts, [*empty, *leaves[2:]], assigned[:0])
    assert y.shape == (0, 8) and not gradients[2].any()


@pytest.mark.parametrize("config", [MIXED, SHARED], ids=["plain", "shared"])
def test_a_mixture_is_the_weighted_sum_of_its_experts(config: ModelConfig) -> None:
    mlp = loud(tiny_model(config)).model.layers[0].mlp
    assert isinstance(mlp, MoE)
    x = torch.randn(2, 7, TINY.hidden_size)
    y = mlp(x)
    probs = F.linear(x[1, 3], mlp.gate.weight).softmax(-1)
    weights, chosen = probs.topk(2)
    weights = weights / weights.sum()
    wanted = one_by_one(
        x[1, 3:4], weights[None], chosen[None], mlp.experts.gate_up_proj, mlp.experts.down_proj
    )[0]
    if mlp.shared_expert is not None:
        wanted = wanted + mlp.shared_expert(x[1, 3])
    torch.testing.assert_close(y[1, 3], wanted)


# ---------------------------------------------------------------- capacity


def counted_by_hand(
    probs: torch.Tensor, top_k: int, room: int, reroute: bool
) -> tuple[list[dict[int, int]], int, int]:
    """Who sits where (token -> rank of its expert), and how many were dropped and rerouted; by the
    words of the definition: the heaviest first, then what is left asks for its next expert."""
    tokens, experts = probs.shape
    ranking = probs.argsort(1, descending=True).tolist()
    left, seated = [room] * experts, [{} for _ in range(tokens)]
    asking = [(token, rank) for token in range(tokens) for rank in range(top_k)]
    tried, rerouted = [top_k] * tokens, 0
    while asking:
        asking.sort(key=lambda item: -float(probs[item[0], ranking[item[0]][item[1]]]))
        turned_away = []
        for token, rank in asking:
            expert = ranking[token][rank]
            if left[expert]:
                left[expert] -= 1
                seated[token][expert] = rank
                rerouted += rank >= top_k
            else:
                turned_away.append(token)
        if not reroute:
            break
        asking = []
        for token in sorted(turned_away):
            if tried[token] < experts:
                asking.append((token, tried[token]))
            tried[token] += 1
    return seated, tokens * top_k - sum(map(len, seated)), rerouted


@pytest.mark.parametrize("reroute", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(23, 5, 2), (40, 7, 3), (9, 4, 1)])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.6])
def test_capacity_turns_the_lightest_away(
    tokens: int, experts: int, top_k: int, factor: float, reroute: bool
) -> None:
    torch.manual_seed(tokens)
    probs = (3 * torch.randn(tokens, experts)).softmax(-1)
    counted = torch.ones(tokens, dtype=torch.bool)
    chosen, kept = assign_within_capacity(probs, probs, counted, top_k, factor, reroute)
    room = math.ceil(factor * tokens * top_k / experts)
    seated, dropped, _ = counted_by_hand(probs, top_k, room, reroute)
    ours = [
        {expert for expert, is_in in zip(*row) if is_in}
        for row in zip(chosen.tolist(), kept.tolist())
    ]
    assert ours == [set(row) for row in seated]
    assert int((~kept).sum()) == dropped
    assert all(len(set(row)) == top_k for row in chosen.tolist() if not reroute)


def test_padding_takes_no_room() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    counted = torch.tensor([False, True, True, True])
    chosen, kept = assign_within_capacity(probs, probs, counted, 1, 1.0, False)
    assert chosen.tolist() == [[0]] * 4  # room for 2 of 3 tokens
    assert kept.tolist() == [[False], [True], [True], [False]]


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_what_is_dropped_adds_nothing_and_evaluation_drops_nothing(overflow: str) -> None:
    routing = Routing(capacity_factor=0.5, overflow=overflow)  # type: ignore[arg-type]
    model = mixture(routing)
    mlp = model.model.layers[0].mlp
    assert isinstance(mlp, MoE)
    x = torch.randn(2, 8, TINY.hidden_size)
    everyone = torch.ones(2, 8, dtype=torch.bool)
    limited, routed = mlp.train_forward(x, everyone)
    free = mlp(x)
    tokens, dropped, *_ = routed.figures.tolist()
    assert (tokens, dropped) == (16, 32 - 5 * math.ceil(0.5 * 16 * 2 / 5))
    differing = (limited - free).abs().amax(-1) > 1e-6
    assert 1 < differing.sum() <= 16
    mlp.set_routing(Routing())
    torch.testing.assert_close(mlp.train_forward(x, everyone)[0], free)


# ---------------------------------------------------------------- losses and figures


def by_hand(model: Decoder, batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The logits, and what follows from them, of every layer, over the tokens that count."""
    found: list[dict[str, torch.Tensor]] = []

    def look(_module: object, _args: object, logits: torch.Tensor) -> None:
        logits = logits.reshape(*batch.segments.shape, -1)[batch.segments != 0]
        probs = logits.softmax(-1)
        wanted = F.one_hot(probs.topk(2).indices, 5).sum((0, 1))
        auxiliary = 5 / 2 * (wanted / len(probs) * probs.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        entropy = -(probs * probs.log()).sum(-1).mean() / math.log(5)
        confidence = probs.amax(-1).mean()
        found.append(
            dict(wanted=wanted, aux=auxiliary, z=z, entropy=entropy, confidence=confidence)
        )

    handles = [
        layer.mlp.gate.register_forward_hook(look)  # type: ignore[union-attr]
        for layer in model.model.layers
    ]
    with torch.enable_grad():
        model.model(batch.input_ids, batch.positions)
    for handle in handles:
        handle.remove()
    return found


def test_the_losses_are_in_the_gradient_and_not_in_the_loss() -> None:
    batch = padded()
    plain = mixture()
    nll = plain.nll_sum(batch)
    nll.backward()
    model = mixture(Routing(aux_loss=0.5, z_loss=0.2))
    assert model.balance is not None
    model.balance.begin(batch.num_targets / batch.num_tokens)
    loss = model.nll_sum(batch, grad_scale=3.0)
    assert torch.equal(loss, nll)
    loss.backward()
    layers = by_hand(plain, batch)
    extra = sum(0.5 * layer["aux"] + 0.2 * layer["z"] for layer in layers)
    assert isinstance(extra, torch.Tensor)
    (extra * batch.num_targets).backward()  # onto the gradient of nll
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters()):
        assert ours.grad is not None and theirs.grad is not None
        difference = (ours.grad / 3 - theirs.grad).norm()
        assert difference <= 2e-5 * theirs.grad.norm(), name


def test_the_figures_are_those_counted_by_hand() -> None:
    model = mixture(Routing())
    balance = model.balance
    assert balance is not None
    batches = [padded(), random_batch(2, 9, seed=8)]
    for batch in batches:
        balance.begin(1.0)
        model.nll_sum(batch)
        balance.applied(alone)
    row = balance.report(alone)
    layers = [by_hand(model, batch) for batch in batches]
    tokens = [batch.num_tokens for batch in batches]
    assert tokens == [36, 18] and row["layers"] == [0, 1, 2]
    for i in range(LAYERS):
        both = [found[i] for found in layers]
        wanted = sum(one["wanted"] for one in both)
        assert isinstance(wanted, torch.Tensor)
        assert row["tokens_per_expert"][i] == wanted.tolist() and wanted.sum() == 2 * 54
        assert row["max_violation"][i] == pytest.approx(float(wanted.max() / (2 * 54 / 5) - 1))
        for key, name in (
            ("aux_loss", "aux"),
            ("z_loss", "z"),
            ("entropy", "entropy"),
            ("confidence", "confidence"),
        ):
            mean = sum(n * float(one[name].detach()) for n, one in zip(tokens, both)) / 54
            assert row[key][i] == pytest.approx(mean, rel=1e-5)
        assert row["dropped"][i] == row["rerouted"][i] == row["bias_range"][i] == 0
    assert balance.report(alone)["layers"] == []  # counting began anew


@pytest.mark.parametrize("overflow", ["drop", "reroute"])
def test_dropped_and_rerouted_are_counted(overflow: str) -> None:
    model = mixture(Routing(capacity_factor=1.0, overflow=overflow))  # type: ignore[arg-type]
    balance, batch = model.balance, random_batch(3, 16)
    assert balance is not None
    balance.begin(1.0)
    probs: list[torch.Tensor] = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, logits: probs.append(logits.softmax(-1))
    )
    model.nll_sum(batch)
    hook.remove()
    balance.applied(alone)
    row = balance.report(alone)
    reroute = overflow == "reroute"
    _, dropped, rerouted = counted_by_hand(probs[0].detach(), 2, math.ceil(96 / 5), reroute)
    assert row["dropped"][0] == pytest.approx(dropped / 96)
    assert row["rerouted"][0] == pytest.approx(rerouted / 96)
    assert (rerouted > 0) is reroute and dropped + rerouted > 0
    wanted = F.one_hot(probs[0].topk(2).indices, 5).sum((0, 1))
    assert row["tokens_per_expert"][0] == wanted.tolist()  # what was wanted, room or not


def test_recomputation_and_evaluation_count_nothing_twice() -> None:
    rows = []
    for kind in ("none", "selective", "full"):
        model = mixture(Routing(), recompute=kind)
        balance = model.balance
        assert balance is not None
        balance.begin(1.0)
        model.nll_sum(padded()).backward()
        with torch.no_grad():
            model.nll_sum(random_batch(2, 8))
        model.eval().nll_sum(random_batch(2, 8))
        balance.applied(alone)
        rows.append(balance.report(alone))
    assert rows[0] == rows[1] == rows[2]
    assert sum(rows[0]["tokens_per_expert"][0]) == 2 * 36


# ---------------------------------------------------------------- updates


def test_cutting_an_update_changes_nothing_but_the_auxiliary_loss() -> None:
    """Padding and targets are spread unevenly over the rows: the z-loss does not mind."""
    batch = random_batch(8, 13, trained=0.5)
    segments = batch.segments.clone()
    for row in range(8):
        segments[row, 13 - row :] = 0
    batch = dataclasses.replace(
        batch, segments=segments, targets=batch.targets.where(segments != 0, -100)
    )
    states = []
    for size in (8, 4, 1):
        model = mixture(Routing("none", z_loss=0.3))
        optimizer = Optimizer(model, OptimSection())
        parts = [part(batch, slice(i, i + size)) for i in range(0, 8, size)]
        result = train_step(model, optimizer, parts, lr=1e-3, max_grad_norm=1e9)
        states.append((result, {n: m.clone() for n, m in optimizer.moments().items()}))
    for result, moments in states[1:]:
        assert result.loss == pytest.approx(states[0][0].loss, rel=1e-6)
        assert result.grad_norm == pytest.approx(states[0][0].grad_norm, rel=1e-5)
        for name, moment in moments.items():
            difference = (moment - states[0][1][name]).norm()
            assert difference <= 1e-4 * moment.norm(), name


def test_fp16_scales_the_losses_too() -> None:
    """In fp32 with fp16's loss scale: what is scaled comes out as it went in."""
    norms = []
    for scaler in (None, LossScaler(4 * 13)):
        model = mixture(Routing(aux_loss=0.5, z_loss=0.2))
        optimizer, batch = Optimizer(model, OptimSection()), random_batch(4, 13)
        parts = [part(batch, slice(0, 2)), part(batch, slice(2, 4))]
        result = train_step(model, optimizer, parts, lr=1e-3, max_grad_norm=1.0, scaler=scaler)
        norms.append(result.grad_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_bias_moves_against_the_imbalance_and_only_training_sees_it() -> None:
    model = mixture(Routing("bias", z_loss=0.0, bias_rate=0.25))
    optimizer, balance, batch = Optimizer(model, OptimSection()), model.balance, padded()
    assert balance is not None
    before = model.eval()(batch.input_ids)
    wanted = [layer["wanted"] for layer in by_hand(model, batch)]
    train_step(model.train(), optimizer, [batch], lr=0.0, max_grad_norm=1.0)
    for layer, counts in zip(model.model.layers, wanted):
        steps = torch.sign(2 * 36 / 5 - counts)
        assert torch.equal(layer.mlp.bias, 0.25 * steps)  # type: ignore[union-attr]
    assert torch.equal(model.eval()(batch.input_ids), before)
    assert not [name for name in model.state_dict() if "bias" in name]
    first = balance.report(alone)
    assert first["bias_range"] == [0.5] * LAYERS


def test_a_bias_balances_without_a_loss() -> None:
    model = mixture(Routing("bias", z_loss=0.0, bias_rate=0.005))
    optimizer, balance = Optimizer(model, OptimSection()), model.balance
    batch = random_batch(16, 16)
    assert balance is not None
    rows = []
    for _ in range(25):
        train_step(model, optimizer, [batch], lr=0.0, max_grad_norm=1.0)
        rows.append(balance.report(alone))
    assert sum(rows[-1]["max_violation"]) < 0.5 * sum(rows[0]["max_violation"])
    assert rows[-1]["rerouted"][0] > 0 == rows[0]["rerouted"][0]


def test_a_refused_update_leaves_bias_and_counts_alone() -> None:
    model = mixture(Routing("bias"))
    optimizer, balance = Optimizer(model, OptimSection()), model.balance
    assert balance is not None
    with pytest.raises(RefusedStep):
        train_step(
            model,
            optimizer,
            [random_batch(2, 9)],
            lr=1.0,
            max_grad_norm=1.0,
            refuse=lambda loss, norm: "no",
        )
    assert not any(layer.mlp.bias.any() for layer in model.model.layers)  # type: ignore[union-attr]
    assert balance.report(alone)["layers"] == []
    train_step(model, optimizer, [random_batch(1, 9)], lr=1.0, max_grad_norm=1.0)
    assert sum(balance.report(alone)["tokens_per_expert"][0]) == 2 * 9


def test_a_checkpoint_carries_bias_and_counts() -> None:
    models = [mixture(Routing("bias")) for _ in range(2)]
    optimizers = [Optimizer(model, OptimSection()) for model in models]
    first, second = (model.balance for model in models)
    assert first is not None and second is not None
    for step in range(3):
        batch = random_batch(2, 9, seed=step)
        train_step(models[0], optimizers[0], [batch], lr=0.0, max_grad_norm=1.0)
    state = first.state(alone, is_first=True)
    assert state.keys() == second.empty_state().keys()
    second.load(state, is_first=True)
    for model, optimizer in zip(models, optimizers):
        train_step(model, optimizer, [random_batch(2, 9, seed=9)], lr=0.0, max_grad_norm=1.0)
    assert first.report(alone) == second.report(alone)


def test_frozen_blocks_are_routed_freely_and_left_out() -> None:
    model = mixture(Routing("bias", capacity_factor=0.4))
    balance, batch = model.balance, random_batch(2, 9)
    assert balance is not None
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    model.model.num_frozen = 1
    balance.begin(1.0)
    model.nll_sum(batch).backward()
    balance.applied(alone)
    row = balance.report(alone)
    assert row["layers"] == [1, 2] and len(row["tokens_per_expert"]) == 2
    with torch.no_grad():
        kept = model.eval().entering(batch)
    assert torch.equal(model.train().entering(batch), kept)


# ---------------------------------------------------------------- weights and their updates


def test_fresh_weights_and_the_optimizers_part() -> None:
    model = tiny_model(SHARED)
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp, MoE) and mlp.shared_expert is not None
    residual = 0.02 / math.sqrt(2 * LAYERS)
    for weight, std in (
        (mlp.gate.weight, 0.02),
        (mlp.experts.gate_up_proj, 0.02),
        (mlp.experts.down_proj, residual),
        (mlp.shared_expert.gate_up_proj.weight, 0.02),
        (mlp.shared_expert.down_proj.weight, residual),
    ):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.1)


def test_muon_takes_each_matrix_of_each_expert() -> None:
    """A step of the stacked experts is what matrices of their own would make."""
    model = mixture()
    names = [n for n, _ in model.named_parameters() if "layers.0.mlp.experts" in n]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in names}
    optim = OptimSection(kind="muon", weight_decay=0.0)
    optimizer = Optimizer(model, optim)
    model.nll_sum(random_batch(2, 9)).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n in names}  # type: ignore[union-attr]
    optimizer.step(1e-2)
    after = {n: p.detach() for n, p in model.named_parameters() if n in names}
    for name in names:
        halves = 2 if "gate_up" in name else 1
        for expert in range(5):
            for old, new, gradient in zip(
                *(t[expert].chunk(halves) for t in (before[name], after[name], gradients[name]))
            ):
                own = torch.nn.Parameter(old.clone())
                own.grad = gradient.clone()
                torch.optim.Muon(
                    [own],
                    lr=1e-2,
                    weight_decay=0.0,
                    momentum=optim.momentum,
                    adjust_lr_fn="match_rms_adamw",
                ).step()
                torch.testing.assert_close(new, own.detach(), atol=1e-6, rtol=1e-5)
