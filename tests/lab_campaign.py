"""A synthetic campaign's folder, written by the schema of the real ones; its effects are planted."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mule.run import Run

VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"attention": "gqa"},
    "mqa": {"attention": "mqa"},
    "gqa-moe": {"attention": "gqa", "num_experts": 4},
    "gqa-moe-cap": {"attention": "gqa", "num_experts": 4, "capacity_factor": 1.0},
    "mamba2": {"mixer": "mamba2"},
    "hybrid": {"mixer": "hybrid", "attention": "gqa"},
}
_LAYERS, _EXPERTS, _CONTEXTS = 6, 4, (128, 512, 2048)


@dataclass
class Plan:
    """What is in the folder: `effects` are added to a variant's test loss, in nats."""

    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(VARIANTS))
    effects: dict[str, float] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    sizes: tuple[str, ...] = ()
    noise: float = 0.002  # of one run, beside what a seed does to all variants alike
    seed_noise: float = 0.01
    steps: int = 1200
    chance: int = 0
    runs: bool = True
    measured: bool = True


def write_campaign(folder: Path, plan: Plan | None = None) -> Path:
    """The folder, as `mule lab run` would leave it."""
    plan = plan or Plan()
    rng = random.Random(plan.chance)
    seed_effects = {seed: rng.gauss(0, plan.seed_noise) for seed in plan.seeds}
    asked: dict[str, Any] = {"name": "lab-test", "budget": {"active_params": "6m"}}
    asked |= {
        "variants": plan.variants,
        "seeds": list(plan.seeds),
        "baseline": next(iter(plan.variants)),
    }
    if plan.sizes:
        asked["sizes"] = list(plan.sizes)
    _write(folder / "campaign.yaml", asked)
    shapes = []
    for place, size in enumerate(plan.sizes or ("",)):
        for name, variant in plan.variants.items():
            stem = f"{name}-{size}" if size else name
            model = settings_of(variant)
            shape = _shape(variant, model, 6_000_000 * (place + 1))
            shapes.append({"variant": stem, **model, **shape, "residual": 0.0031})
            for seed in plan.seeds:
                loss = 4.0 - 0.2 * place + seed_effects[seed] + rng.gauss(0, plan.noise)
                loss += plan.effects.get(name, 0.0)
                one = _result(name, size, seed, plan, loss) | {"shape": shape}
                if plan.runs:
                    _write_run(folder / "runs" / f"{stem}-s{seed}", one, model, loss, rng)
                _write(folder / "results" / f"{stem}-s{seed}.json", one)
            if plan.measured:
                _write(folder / "decode" / f"{stem}.json", _decode(name, model))
                figures = {"graph_breaks": 0, "recompiles": 0, "compile_s": 41.5, "gain": 1.31}
                _write(folder / "compile" / f"{stem}.json", {"variant": name, **figures})
    _write(folder / "shapes.json", shapes)
    return folder


def settings_of(variant: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of a variant's runs."""
    model: dict[str, Any] = {"family": "qwen3", "hidden_size": 256, "num_layers": _LAYERS}
    kv_heads = {"mha": 8, "gqa": 2, "mqa": 1}[variant.get("attention", "mha")]
    mixer = variant.get("mixer", "attention")
    if mixer != "mamba2":
        model |= {"num_heads": 8, "num_kv_heads": kv_heads, "head_dim": 32}
    if mixer != "attention":
        model |= {"family": "granitemoehybrid", "mamba": {"state_size": 64}}
    if mixer == "hybrid":
        model["mamba"]["attention_every"] = 3
    if variant.get("num_experts"):
        model["family"] = "qwen3_moe"
        model["moe"] = {"num_experts": _EXPERTS, "experts_per_token": 2, "intermediate_size": 352}
        if variant.get("capacity_factor"):
            model["moe"]["capacity_factor"] = variant["capacity_factor"]
    else:
        model["intermediate_size"] = 704
    return model


def kv_bytes(model: dict[str, Any]) -> int:
    """Keys and values of a token in bf16, in the layers that attend."""
    mamba = model.get("mamba") or {}
    layers = _LAYERS // mamba["attention_every"] if "attention_every" in mamba else 0
    layers = layers if model["family"] == "granitemoehybrid" else _LAYERS
    return 2 * layers * model.get("num_kv_heads", 0) * model.get("head_dim", 0) * 2


def _shape(variant: dict[str, Any], model: dict[str, Any], active: int) -> dict[str, Any]:
    total = active * (2 if variant.get("num_experts") else 1)
    return {
        "active_params": active,
        "active_params_without_embeddings": active - 2_000_000,
        "total_params": total,
        "total_params_without_embeddings": total - 2_000_000,
        "flops_per_token": 6.2 * active,
        "kv_bytes_per_token": kv_bytes(model),
        "state_bytes": 98_304 if "mamba" in model else 0,
    }


def _result(name: str, size: str, seed: int, plan: Plan, loss: float) -> dict[str, Any]:
    speed = 5000 - 300 * list(plan.variants).index(name) + 7 * seed
    return {
        "variant": name,
        "seed": seed,
        "size": size,
        "run": f"elsewhere/{name}",
        "tokens": plan.steps * 8192,
        "steps": plan.steps,
        "seconds": plan.steps * 8192 / speed,
        "valid": _losses(loss + 0.02, 40_000),
        "test": _losses(loss, 50_000),
        "train": {
            "tokens_per_second": float(speed),
            "share_of_peak": speed / 12_000,
            "peak_memory_bytes": 700 * 2**20,
            "final_loss": loss + 0.05,
            "max_grad_norm": 3.1 + seed,
            "mean_grad_norm": 0.61,
            "num_spikes": seed,
            "refused_updates": 0,
        },
        "learning_rate": 0.001,
    }


def _losses(loss: float, tokens: int) -> dict[str, Any]:
    bits = loss / math.log(2)
    figures = {"loss": loss, "perplexity": math.exp(loss), "num_tokens": tokens}
    by_source = {"books": loss + 0.3, "stories": loss - 0.3}
    return {
        **figures,
        "bits_per_byte": bits / 3.7,
        "bits_per_word": bits * 1.3,
        "by_source": by_source,
    }


def _write_run(
    folder: Path, result: dict[str, Any], model: dict[str, Any], loss: float, rng: random.Random
) -> None:
    run = Run.create(folder.parent, folder.name, "model: {}\n")
    train = {"seed": result["seed"], "steps": result["steps"], "step_rows": 32, "precision": "bf16"}
    optim = {"kind": "adamw", "learning_rate": 0.001, "schedule": "cosine", "weight_decay": 0.1}
    data = {"train": ["books.txt"], "max_seq_length": 256}
    sections = {"model": model, "data": data, "train": train, "optim": optim}
    run.write_resolved(json.dumps(sections))
    machine = {"cpu": "A processor", "cores": 2, "memory_bytes": 2**34, "system": "Linux"}
    sources = [{"file": "books.txt", "bytes": 5_200_000}]
    lineage = {
        "mule": "0.1.0",
        "data": "train-1f",
        "torch": "2.13.0",
        "machine": machine,
        "sources": sources,
    }
    run.write_lineage(lineage | {"tokenizer": "a1b2" * 16})
    run.start_attempt(from_step=0)
    started_at = run.events()[0]["at"]
    count = 60
    for place in range(1, count + 1):
        done = place / count
        falling = loss + 3.0 * math.exp(-6 * done) + rng.gauss(0, 0.03)
        row = {"step": round(done * result["steps"]), "loss": falling, "num_targets": 8192}
        row |= {"grad_norm": 0.4 + 2 * math.exp(-5 * done) + 0.05 * rng.random()}
        if place % 6 == 0:
            row["val_loss"] = loss + 0.02 + 3.0 * math.exp(-6 * done) * (1 - done)
        if "moe" in model and place % 3 == 0:
            row["moe"] = _routing(done, bool(model["moe"].get("capacity_factor")), rng)
        run.log_metrics(row | {"at": started_at + done * result["seconds"]})
    run.log_event("finished", step=result["steps"])


def _routing(done: float, is_capped: bool, rng: random.Random) -> dict[str, Any]:
    """Uneven at first, even at the end; in the first layer one expert dies half-way."""
    uneven = math.exp(-3 * done)
    counts = [
        [round(2000 * (1 + uneven * rng.uniform(-0.9, 2))) for _ in range(_EXPERTS)]
        for _ in range(_LAYERS)
    ]
    if done > 0.5:
        counts[0][2] = 0
    means = [sum(layer) / _EXPERTS for layer in counts]
    return {
        "layers": list(range(_LAYERS)),
        "tokens_per_expert": counts,
        "max_violation": [max(layer) / mean - 1 for layer, mean in zip(counts, means)],
        "dropped": [0.2 * uneven if is_capped else 0.0] * _LAYERS,
        "rerouted": [0.0] * _LAYERS,
        "entropy": [0.9 - 0.05 * layer * done for layer in range(_LAYERS)],
        "confidence": [0.4 + 0.03 * layer * done for layer in range(_LAYERS)],
        "aux_loss": [1 + uneven] * _LAYERS,
        "z_loss": [2.0 * uneven + 0.1] * _LAYERS,
        "bias_range": [0.0] * _LAYERS,
    }


def _decode(name: str, model: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    gains = []
    for batch in (1, 8):
        for context in _CONTEXTS:
            place = {"batch": batch, "context": context}
            fast = batch * 900 / (1 + kv_bytes(model) * context / 2e8)
            slow = 40_000 / context
            shared = {"decode_std": 2.5, "prefill_tokens_per_second": 40_000.0}
            cache = {"cache_bytes": kv_bytes(model) * context * batch}
            cache["cache_formula_bytes"] = cache["cache_bytes"]
            cached = {"cached": True, "decode_tokens_per_second": fast, "share_of_bandwidth": 0.7}
            cached |= {"time_to_first_token_s": context / 40_000}
            rows.append(place | cached | shared | cache)
            rows.append(place | {"cached": False, "decode_tokens_per_second": slow} | shared)
            predicted = fast / slow / 0.88
            gains.append(place | {"gain": fast / slow, "predicted": predicted, "share": 0.88})
    return {
        "variant": name,
        "precision": "bf16",
        "engine": "C++",
        "rows": rows,
        "gains": gains,
        "not_measured": [],
        "max_error": 0.0031,
    }


def _write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
