"""Fine-tuning an adapter on a laptop beside its peers: TRL with PEFT, and mlx-lm on a CPU.

    python bench/data.py setup        # TRL in an environment of its own: bench/peers/trl
    python bench/finetune.py setup    # PEFT and bitsandbytes beside it, and mlx-lm: bench/peers/mlx
    python bench/finetune.py smoke    # every way once at a tiny shape; keeps nothing
    python bench/finetune.py run      # all workloads, one round; for less:
    python bench/finetune.py run last-8 mule mule-order trl-kept rounds=1 updates=3
    python bench/finetune.py report   # the table of docs/performance.md

A model of the shape of Qwen2.5-0.5B-Instruct with random weights in a folder, and hawaiian-pizza chats,
four an update. Workloads: `last-8` adapts the last 8 blocks, `all` every block, `qlora` every block of a
model in NF4. Each way runs in a process of its own, in turn: `mule` is `mule train` (packed rows, the
frozen trunk kept), `mule-order` the same one chat a row, in the order that the peers get: that is what
loss curves are compared with, update by update. All begin with the same adapter. `run` writes
bench/results/finetune.json after each round. A way of `last-8` takes about two minutes on two cores
without bf16.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune_job import ALPHA, BETAS, LEARNING_RATE, RANK, TuneJob, begin_tuning, tune_figures
from train import PEERS, ROOT, THREADS, Way, one_way
from train_timing import split, versions

from mule import fsio, machine
from mule.commands import docs
from mule.errors import UserError

RESULTS = ROOT / "bench" / "results" / "finetune.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
SHARED = ROOT.parent / "shared" / "data"
CHATS = "hawaiian-pizza/train.jsonl"
TOKENIZER_SIZE = 8_192
ROUNDS, UPDATES, STEP_CHATS = 1, 3, 4
_SETUP = "python bench/finetune.py setup"
_TRL_SETUP = f"python bench/data.py setup, then {_SETUP}"
# Into TRL's environment, which bench/data.py makes; and mlx-lm's, with the part that computes on a CPU.
PEER_PINS = {
    "trl": ("peft==0.21.2", "bitsandbytes==0.50.2"),
    "mlx": ("mlx[cpu]==0.32.4", "mlx-lm==0.32.2"),
}

WAYS = {
    "mule": Way("**Mule**", "finetune.py", None, "one"),
    "mule-order": Way("Mule, in the peers' order", "finetune.py", None, "one"),
    "trl": Way("TRL, its defaults", "finetune_trl.py", "trl", "default", _TRL_SETUP),
    "trl-kept": Way("TRL, activations kept", "finetune_trl.py", "trl", "kept", _TRL_SETUP),
    # Its wheel for processors brings the reference BLAS: one thread, tens of times slower.
    "mlx": Way(
        "mlx-lm, OpenBLAS, fp32", "finetune_mlx.py", "mlx", "cpu", _SETUP, preload="openblas"
    ),
}
WORKLOADS = {"last-8": 8, "all": None, "qlora": None}  # adapted blocks; None is every one
PEER_NAMES = ("trl", "trl-kept", "mlx")


def setup() -> None:
    """Complete TRL's environment, and make mlx-lm's."""
    if not (PEERS / "trl" / "bin" / "python").is_file():
        raise UserError("bench/peers/trl is missing", "make it: python bench/data.py setup")
    subprocess.run([sys.executable, "-m", "venv", str(PEERS / "mlx")], check=True)
    for name, packages in PEER_PINS.items():
        pip = [str(PEERS / name / "bin" / "python"), "-m", "pip", "install"]
        subprocess.run([*pip, *packages], check=True)


def run(words: list[str], rounds: int = ROUNDS, updates: int = UPDATES) -> None:
    """Measure the workloads, the ways in turn; a finished round is kept at once."""
    known = {**WORKLOADS, **WAYS}
    if unknown := [word for word in words if word not in known]:
        raise UserError(
            f"there is no workload or way called `{unknown[0]}`", f"some of {', '.join(known)}"
        )
    ways = [name for name in WAYS if name in words]
    if ways and "mule" not in ways:  # what the others are compared with
        ways.insert(0, "mule")
    kept = fsio.read_json(RESULTS)["workloads"] if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as name:
        job = qwen_job(Path(name), updates)
        make_inputs(job, SHARED / CHATS, TOKENIZER_SIZE)
        for workload in [word for word in words if word in WORKLOADS] or WORKLOADS:
            own = workload_job(job, workload)
            found: list[dict[str, Any]] = []
            for number in range(rounds):
                label = f"{workload} {number + 1}/{rounds}"
                found.append(_round(own, ways or ways_of(workload), label))
                kept[workload] = _described(own, found)
                fsio.write_json(RESULTS, {"bench": "finetune", "workloads": kept})
                report()


def smoke(words: list[str]) -> dict[str, Any]:
    """The ways of the workloads once at a tiny shape; the times mean nothing."""
    ways = [word for word in words if word in WAYS]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        job = tiny_job(Path(name))
        make_inputs(job, SHARED / CHATS, 1_000)
        for workload in [word for word in words if word in WORKLOADS] or WORKLOADS:
            own = workload_job(job, workload)
            rounds = [_round(own, ways or ways_of(workload), f"{workload} tiny")]
            found[workload] = _described(own, rounds)
    return found


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "finetune"))


# ---------------------------------------------------------------- the jobs


def qwen_job(folder: Path, updates: int = UPDATES) -> TuneJob:
    """Qwen2.5-0.5B's shape; one update before the timed ones."""
    return TuneJob(
        vocab_size=151_936,
        hidden_size=896,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        intermediate_size=4_864,
        row_length=1024,
        rows=STEP_CHATS,
        warm_up=1,
        timed=updates,
        threads=THREADS,
        precision="bf16" if machine.has_fast_bf16() else "fp32",
        folder=str(folder),
        last_layers=24,
    )


def tiny_job(folder: Path) -> TuneJob:
    """The same in small."""
    small = {"vocab_size": 1_024, "hidden_size": 128, "num_layers": 10, "num_heads": 2}
    small |= {"num_kv_heads": 1, "intermediate_size": 192, "timed": 2, "threads": 1}
    job = asdict(qwen_job(folder)) | small | {"precision": "fp32", "last_layers": 10}
    return TuneJob(**job)


def ways_of(workload: str) -> list[str]:
    """All ways, but for mlx-lm where weights are in NF4, which it does not know."""
    return [name for name in WAYS if name != "mlx" or workload != "qlora"]


def workload_job(job: TuneJob, workload: str) -> TuneJob:
    """The job with the workload's adapter; where blocks stay frozen, two epochs for Mule."""
    last_layers = WORKLOADS[workload] or job.num_layers
    return replace(
        job,
        last_layers=last_layers,
        quantized=workload == "qlora",
        epochs=1 if last_layers == job.num_layers else 2,
    )


# ---------------------------------------------------------------- inputs


def make_inputs(job: TuneJob, chats: Path, tokenizer_size: int) -> None:
    """The model's folder with its tokenizer, and as many chats as the job trains on."""
    from mule.tokenizer import Tokenizer

    if not chats.is_file():
        raise UserError(f"{chats} is missing", "this benchmark needs the development data")
    lines = chats.read_text(encoding="utf-8").splitlines()
    texts = (m["content"] for line in lines for m in json.loads(line)["messages"])
    Tokenizer.train(texts, tokenizer_size).save(job.model)
    _write_model(job)
    chosen = lines[: (job.warm_up + job.timed) * job.rows]
    text = "\n".join(chosen) + "\n"
    (Path(job.folder) / "chat.jsonl").write_text(text, encoding="utf-8")
    _write_order(job, [json.loads(line) for line in chosen])


def _write_model(job: TuneJob) -> None:
    """Random bf16 weights of Qwen2, as transformers names them."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    keys = job.num_kv_heads * job.head_dim
    sides = {
        "self_attn.q_proj": (job.hidden_size, job.hidden_size),
        "self_attn.k_proj": (keys, job.hidden_size),
        "self_attn.v_proj": (keys, job.hidden_size),
        "self_attn.o_proj": (job.hidden_size, job.hidden_size),
        "mlp.gate_proj": (job.intermediate_size, job.hidden_size),
        "mlp.up_proj": (job.intermediate_size, job.hidden_size),
        "mlp.down_proj": (job.hidden_size, job.intermediate_size),
    }

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.02).bfloat16()

    ones = torch.ones(job.hidden_size, dtype=torch.bfloat16)
    state = {"model.embed_tokens.weight": normal(job.vocab_size, job.hidden_size)}
    for layer in range(job.num_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in sides.items():
            state[f"{prefix}.{name}.weight"] = normal(*shape)
        for name in ("q_proj", "k_proj", "v_proj"):
            state[f"{prefix}.self_attn.{name}.bias"] = normal(sides[f"self_attn.{name}"][0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{name}.weight"] = ones.clone()
    state["model.norm.weight"] = ones
    save_file(state, job.model / "model.safetensors", metadata={"format": "pt"})
    fsio.write_json(job.model / "config.json", _config(job))


def _config(job: TuneJob) -> dict[str, Any]:
    """As Qwen2.5-0.5B-Instruct has it."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": job.vocab_size,
        "hidden_size": job.hidden_size,
        "intermediate_size": job.intermediate_size,
        "num_hidden_layers": job.num_layers,
        "num_attention_heads": job.num_heads,
        "num_key_value_heads": job.num_kv_heads,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def _write_order(job: TuneJob, chats: list[dict[str, Any]]) -> None:
    """ordered.jsonl: the chats as Mule takes them one a row, with their tokens and what is trained."""
    from mule.config.load import load_recipe
    from mule.data.loader import Loader
    from mule.data.prepare import RowSettings, prepare
    from mule.tokenizer import Tokenizer

    alone = replace(job, packed=False)
    recipe = load_recipe(None, _words(alone)).recipe
    out_dir = Path(job.folder) / "order"
    shards = prepare(
        recipe.data.train, Tokenizer.load(job.model), RowSettings.of(recipe.data), out_dir=out_dir
    )
    if shards.num_rows != len(chats):
        raise UserError(
            f"{len(chats) - shards.num_rows} chats have no place in rows of {job.row_length}",
            "use a larger tokenizer, or longer rows",
        )
    loader, (part,) = Loader(shards, job.rows, seed=0), shards.parts
    lines = []
    for step in range(job.warm_up + job.timed):
        for row in loader.rows_for_step(step).tolist():
            example = int(part.order[part.rows[row]])
            span = slice(*part.offsets[example : example + 2].tolist())
            trained = part.trained[span].nonzero()[0]
            line = {
                **chats[example],
                "ids": part.tokens[span].tolist(),
                "trained": [int(trained[0]), int(trained[-1])],
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (Path(job.folder) / "ordered.jsonl").write_text("".join(lines), encoding="utf-8")


def _write_adapter(job: TuneJob) -> None:
    """What `mule train` begins with, in PEFT's layout, for the peers."""
    from safetensors.torch import save_file

    from mule.config.load import load_recipe
    from mule.models.folder import read_config
    from mule.train.assemble import model_and_optimizer

    recipe = load_recipe(None, _words(job)).recipe
    train = recipe.train.model_copy(
        update={"activation_checkpointing": "none", "compile": False, "sharding": "none"}
    )
    recipe = recipe.model_copy(update={"train": train})
    model, _ = model_and_optimizer(recipe, read_config(job.model), job.model)
    state = {
        f"base_model.model.{name}": parameter.detach().float().contiguous()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    job.adapter.mkdir(exist_ok=True)
    save_file(state, job.adapter / "adapter_model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------- one way


def _round(job: TuneJob, names: list[str], label: str) -> dict[str, Any]:
    """The ways once, one after the other: what was found, by way."""
    script = str(ROOT / "bench" / "finetune.py")
    subprocess.run([sys.executable, script, "start", json.dumps(asdict(job))], check=True)
    found = {}
    for name in names:
        own = replace(job, packed=name != "mule-order", started_at=time.time())
        if name == "mlx":  # minutes an update; its first compiles
            own = replace(own, timed=1)
        found[name] = one_way(WAYS[name], own, Path(job.folder) / "compiled" / name)
        print(f"{label} {name}: {json.dumps(found[name])}", flush=True)
    return found


def _words(job: TuneJob) -> list[str]:
    """The job as settings of a recipe."""
    last = job.last_layers if job.last_layers < job.num_layers else -1
    return [
        *(f"model.path={job.model}", f"data.train=[{job.folder}/chat.jsonl]"),
        *("data.format=messages", "data.valid_share=0", f"data.packing={str(job.packed).lower()}"),
        f"data.max_seq_length={job.row_length}",
        *(f"adapter.kind={'qlora' if job.quantized else 'lora'}", f"adapter.lora.r={RANK}"),
        *(f"adapter.lora.alpha={ALPHA}", f"adapter.lora.last_layers={last}"),
        *(f"train.step_examples={job.rows}", f"train.epochs={job.epochs if job.packed else 1}"),
        *(f"train.precision={job.precision}", f"train.threads={job.threads}", "train.device=cpu"),
        *("optim.schedule=constant", "optim.warmup_steps=0", "optim.max_grad_norm=1e6"),
        *(f"optim.learning_rate={LEARNING_RATE}", "optim.weight_decay=0"),
        *(f"optim.beta1={BETAS[0]}", f"optim.beta2={BETAS[1]}", "checkpoint.every_steps=1000000"),
    ]


def mule_figures(job: TuneJob) -> dict[str, Any]:
    """`mule train` on the chats, read from the log of its run."""
    from train_run import logged

    import mule
    import mule.train.loop  # so that it counts among the imports
    from mule.commands import train

    baseline = begin_tuning(job)
    runs, name = Path(job.folder) / "runs", f"run-{time.time_ns()}"
    train.run(None, _words(job), root=runs, name=name)
    found = logged(runs, name)
    chats = _chats_of_updates(found)
    begun_at = found["rows"][0]["at"] - found["seconds"][0]
    later = [i for i, row in enumerate(found["rows"]) if i and found["rows"][i - 1]["epoch"] >= 1]
    end = later[0] if later and later[0] > job.warm_up else None  # of the first epoch
    own = tune_figures(
        job,
        found["seconds"][:end],
        found["losses"],
        chats[:end],
        found["targets"][:end],
        baseline=baseline,
        begun_at=begun_at,
    )
    settings = found["recipe"]
    return own | {
        "later_chats_per_second": _rate(found["seconds"], chats, later),
        "chats_per_update": statistics.mean(chats),
        "trunk_cache": settings.adapter.trunk_cache,
        "compile": settings.train.compile,
        "versions": {**versions(), "mule": mule.__version__},
    }


def _chats_of_updates(found: dict[str, Any]) -> list[int]:
    """How many chats each update of a run trained on."""
    import numpy as np

    from mule.data.loader import Loader

    shards, train = found["shards"], found["recipe"].train
    loader = Loader(shards, train.step_rows, train.seed)
    counts = np.concatenate([np.diff(part.rows) for part in shards.parts])
    return [int(counts[loader.rows_for_step(s)].sum()) for s in range(len(found["seconds"]))]


def _rate(seconds: list[float], chats: list[int], updates: list[int]) -> float | None:
    """Chats a second of these updates, if there are any."""
    if not updates:
        return None
    return sum(chats[i] for i in updates) / sum(seconds[i] for i in updates)


# ---------------------------------------------------------------- the table


def _described(job: TuneJob, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The rounds with what they are computed from; no path of this machine."""
    return {
        "command": "python bench/finetune.py run",
        "date": time.strftime("%Y-%m-%d"),
        "job": {key: value for key, value in asdict(job).items() if key != "folder"},
        "rounds": rounds,
        "machine": machine.describe(),
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/performance.md, and what it says about each workload."""
    if not results.is_file():
        return f"Not measured yet: `{_SETUP}`, then `python bench/finetune.py run`.\n"
    head = (
        "| workload | way | chats/s in epoch 1 | later | Mule is faster by | later "
        "| trained tokens/s | s for 4 chats | memory | to the first update | loss | differs by |"
    )
    lines, notes = [head, "|---|---|" + "--:|" * 10], []
    for workload, found in fsio.read_json(results)["workloads"].items():
        rows = {name: _row(found["rounds"], name) for name in found["rounds"][0]}
        lines += [_line(workload, WAYS[name].title, row) for name, row in rows.items()]
        notes.append(_note(workload, found, rows))
    return "\n".join([*lines, "", *notes]) + "\n"


def _row(rounds: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The figures of one way over the rounds; ratios are taken within a round."""
    own, mine = ([r[way] for r in rounds] for way in (name, "mule"))
    rates = [way["chats_per_second"] for way in own]
    first = [way["chats_per_second"] for way in mine]
    later = [way["later_chats_per_second"] or way["chats_per_second"] for way in mine]
    return {
        "rate": statistics.median(rates),
        "later": statistics.median(later) if name == "mule" else None,
        "ratio": statistics.median(a / b for a, b in zip(first, rates, strict=True)),
        "later_ratio": statistics.median(a / b for a, b in zip(later, rates, strict=True)),
        "targets": statistics.median(way["targets_per_second"] for way in own),
        "memory": statistics.median(way["peak_bytes"] for way in own),
        "first_s": statistics.median(way["to_first_update_s"] for way in own),
        "losses": own[0]["losses"],
        "differs": _difference(rounds[0], name),
    }


def _difference(found: dict[str, Any], name: str) -> float | None:
    """The greatest difference of a peer's losses from Mule's; None where other tokens were trained."""
    peer, mule = found[name], found.get("mule-order")
    if name not in PEER_NAMES or mule is None:
        return None
    if peer["targets"] != mule["targets"][: len(peer["targets"])]:
        return None
    return max(abs(a - b) for a, b in zip(peer["losses"], mule["losses"]))


def _line(workload: str, title: str, row: dict[str, Any]) -> str:
    cells = (
        f"{row['rate']:.3f}",
        "" if row["later"] is None else f"{row['later']:.3f}",
        f"{row['ratio']:.2f}x",
        f"{row['later_ratio']:.2f}x",
        f"{row['targets']:,.1f}",
        f"{STEP_CHATS / row['rate']:.1f}",
        f"{row['memory'] / 2**30:.2f} GiB",
        f"{row['first_s']:.0f} s",
        f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
        "" if row["differs"] is None else f"{row['differs']:.1e}",
    )
    return f"| {workload} | {title} | {' | '.join(cells)} |"


def _note(workload: str, found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """How Mule compares with its peers, and on what this was measured."""
    job, first = found["job"], found["rounds"][0]
    names: dict[str, str] = {}
    for name in rows:
        names |= first[name]["versions"]
    used = ", ".join(f"{package} {version}" for package, version in sorted(names.items()))
    compiled = "compiled" if first["mule"]["compile"] else "not compiled"
    return (
        f"- **{workload}**: the last {job['last_layers']} of {job['num_layers']} blocks, rank {RANK}, "
        f"{job['precision']}{', frozen weights in NF4' if job['quantized'] else ''}. "
        f"{_against_peers(rows)}Mule packs {first['mule']['chats_per_update']:.1f} chats an update, "
        f"keeps the trunk: {first['mule']['trunk_cache']}, and is {compiled}. Rounds: "
        f"{len(found['rounds'])}, {job['timed']} timed updates each after {job['warm_up']}. "
        f"{found['machine']['cpu']}, {job['threads']} threads, {found['date']}; {used}; "
        f"`{found['command']}`."
    )


def _against_peers(rows: dict[str, dict[str, Any]]) -> str:
    """Beside the fastest and the leanest peer, in words; empty where none was measured."""
    peers = [name for name in rows if name in PEER_NAMES]
    if not peers:
        return ""
    fastest = min(peers, key=lambda name: rows[name]["ratio"])
    leanest = min(peers, key=lambda name: rows[name]["memory"])
    apart = [rows[name]["differs"] for name in peers if rows[name]["differs"] is not None]
    curves = f"The loss curves differ by at most {max(apart):.1e}. " if apart else ""
    return (
        f"Mule makes **{rows[fastest]['ratio']:.1f} times** the chats a second of the fastest peer "
        f"({WAYS[fastest].title}) in the first epoch and **{rows[fastest]['later_ratio']:.1f} times** "
        f"later, in **{rows['mule']['memory'] / rows[leanest]['memory']:.0%}** of the memory of the "
        f"leanest ({WAYS[leanest].title}). {curves}"
    )


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    names, numbers = split(rest) if command in ("run", "smoke") else (rest, {})
    if command == "one":
        print(json.dumps(mule_figures(TuneJob(**json.loads(rest[0])))))
    elif command == "start":
        _write_adapter(replace(TuneJob(**json.loads(rest[0])), quantized=False))
    elif command == "smoke":
        smoke(names)
    elif command == "run":
        run(names, **numbers)
    else:
        {"setup": setup, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
