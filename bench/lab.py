"""The speed of the architectures that `mule lab` compares, each beside what it must not fall behind.

    python bench/lab.py run                     # everything, about half an hour on two cores
    python bench/lab.py run training rounds=5   # a part: training, ssd, moe, kv
    python bench/lab.py smoke                   # all of it at tiny sizes; keeps nothing
    python bench/lab.py report                  # the section of docs/performance.md

*training*: models of equal active parameters, whole compiled updates in a process each; every variant
takes turns with the dense model, and so do their shares of the matmul peak. *ssd* and *moe*: an
algorithm beside the plain one (bench/lab_ssd.py, bench/lab_moe.py). *kv*: what the cache gains at
1,024 tokens of the 125M shape, beside what memory and the forward pass predict. `run` writes
bench/results/lab.json after each part.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from linear_run import ROOT, environment
from train_timing import split

from mule import fsio, machine
from mule.commands import bench, bench_kv, docs
from mule.config.lab import BudgetSection, VariantSection
from mule.errors import UserError
from mule.models import cost
from mule.models.solve import Solved, solve_all
from mule.plan.shape import model_settings

RESULTS = ROOT / "bench" / "results" / "lab.json"
PAGE = docs.settings.DOCS / docs.PERFORMANCE_PAGE
COMMAND = "python bench/lab.py run"

DENSE = "mha"
VARIANTS = {
    DENSE: VariantSection(),
    "gqa": VariantSection(attention="gqa"),
    "mqa": VariantSection(attention="mqa"),
    "moe": VariantSection(attention="gqa", num_experts=8),
    "moe-capacity": VariantSection(
        attention="gqa", num_experts=8, capacity_factor=1.0, overflow="drop"
    ),
    "mamba2": VariantSection(mixer="mamba2"),
    "hybrid": VariantSection(mixer="hybrid", attention="gqa"),
}
KV = bench_kv.Asked("125m", attention=("mha", "gqa"), minutes=4)
TRAINING_TARGET, KV_TARGET = 0.8, 0.8  # of the dense model's share of the peak; of the prediction
_WARM_UP, _UPDATES = 3, 2  # updates before the first round, and in each turn of a round


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    active_params: str = "10m"
    vocab_size: int = 4096
    row_length: int = 512
    step_rows: int = 8
    compile: bool = True
    threads: str = "auto"
    rounds: int = 3
    kv: bench_kv.Asked = KV
    quick: bool = False  # the algorithms at tiny sizes


TINY = Plan(
    active_params="6m",
    vocab_size=128,
    row_length=32,
    step_rows=2,
    compile=False,
    threads="1",
    rounds=1,
    kv=bench_kv.Asked("2m", ("gqa",), (32,), repetitions=1, new_tokens=4, vocab_size=128),
    quick=True,
)


def run(names: list[str], plan: Plan) -> None:
    """Measure the parts; what is finished is kept."""
    for name in names or list(PARTS):
        if name not in PARTS:
            raise UserError(f"there is no part called `{name}`", f"some of {', '.join(PARTS)}")
        keep(name, PARTS[name](plan))
        report()


def keep(part: str, found: dict[str, Any]) -> None:
    """Write one part of the results, with the machine it was measured on."""
    kept = fsio.read_json(RESULTS) if RESULTS.is_file() else {"bench": "lab"}
    fsio.write_json(RESULTS, {**kept, part: stamped(found)})


def stamped(found: dict[str, Any]) -> dict[str, Any]:
    import torch

    stamp = {"command": COMMAND, "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    return {**stamp, **found, "machine": machine.describe()}


def smoke() -> dict[str, Any]:
    """All parts at tiny sizes; the figures mean nothing."""
    found = {name: stamped(measure(TINY)) for name, measure in PARTS.items()}
    print(section_of(found))
    return found


# ---------------------------------------------------------------- training


def training(plan: Plan) -> dict[str, Any]:
    """Tokens a second and share of the peak of every variant, in turns with the dense model."""
    solved = solve_all(
        BudgetSection(active_params=plan.active_params),
        VARIANTS,
        vocab_size=plan.vocab_size,
        max_seq_length=plan.row_length,
    )
    rounds: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mule-lab-")))
        workers = {}
        for name, one in solved.items():
            workers[name] = stack.enter_context(_worker(words_of(name, one, plan), cache))
            print(f"training: {name}: {workers[name].facts}", flush=True)
        facts = {name: worker.facts for name, worker in workers.items()}
        for _ in range(plan.rounds):
            rounds.append(_round(workers))
            print(f"training: {json.dumps(rounds[-1])}", flush=True)
    return judged(facts, rounds) | {
        "active_params": plan.active_params,
        "vocab_size": plan.vocab_size,
        "row_length": plan.row_length,
        "rounds": plan.rounds,
        "updates_a_turn": _UPDATES,
        "compile": plan.compile,
    }


def judged(facts: dict[str, dict[str, Any]], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; a variant is compared with the dense model's turn just before."""
    peak = max(one["peak_flops"] for one in rounds)
    variants = {}
    for name, known in facts.items():
        turns = [one["turns"][name] for one in rounds]
        shares = [turn["tokens_per_second"] * known["flops_per_token"] / peak for turn in turns]
        beside = [turn["dense_tokens_per_second"] for turn in turns]
        dense_flops = facts[DENSE]["flops_per_token"]
        ratios = [
            share * peak / (rate * dense_flops) for share, rate in zip(shares, beside, strict=True)
        ]
        variants[name] = known | {
            "tokens_per_second": statistics.median(t["tokens_per_second"] for t in turns),
            "share_of_peak": statistics.median(shares),
            "beside_dense": statistics.median(ratios),
        }
    return {"peak_flops": peak, "variants": variants, "target": TRAINING_TARGET}


def words_of(name: str, solved: Solved, plan: Plan) -> list[str]:
    """The variant as settings of a recipe."""
    found = model_settings(solved.config, VARIANTS[name].routing())
    shape = [f"{key}={json.dumps(value).strip(chr(34))}" for key, value in found.items()]
    return [
        *shape,
        f"data.max_seq_length={plan.row_length}",
        f"train.step_rows={plan.step_rows}",
        f"train.micro_batch_rows={plan.step_rows}",
        f"train.compile={json.dumps(plan.compile)}",
        f"train.threads={plan.threads}",
        "train.steps=1000",
    ]


@dataclass
class Worker:
    """A process that holds one model, and makes updates when told to."""

    facts: dict[str, Any]
    orders: IO[str]
    answers: IO[str]

    def tokens_per_second(self) -> float:
        """Of one turn."""
        print(_UPDATES, file=self.orders, flush=True)
        return float(self.answers.readline())


@contextlib.contextmanager
def _worker(words: list[str], cache: Path) -> Iterator[Worker]:
    command = [sys.executable, str(Path(__file__).resolve()), "worker", json.dumps(words)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(cache),
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        facts = process.stdout.readline()
        if not facts:
            raise UserError(
                f"a process that trains ended with {process.wait()}; it said why above",
                "measure less: python bench/lab.py run ssd moe kv",
            )
        yield Worker(json.loads(facts), process.stdin, process.stdout)
        process.stdin.close()


def _round(workers: dict[str, Worker]) -> dict[str, Any]:
    """Every variant once, each right after the dense model."""
    dense, turns = workers[DENSE], {}
    threads, precision = dense.facts["threads"], dense.facts["precision"]
    peaks = [machine.matmul_peak(precision, "cpu", threads, fresh=True)]
    for name, worker in workers.items():
        beside = dense.tokens_per_second()
        own = worker.tokens_per_second()
        turns[name] = {"dense_tokens_per_second": beside, "tokens_per_second": own}
    peaks.append(machine.matmul_peak(precision, "cpu", threads, fresh=True))
    return {"peak_flops": max(peaks), "turns": turns}


def work(words: list[str]) -> None:
    """Compile, warm up, say so; then as many updates as each line asks for."""
    from mule.config.load import load_recipe

    wanted = load_recipe(None, words, complete=False).recipe  # an error comes before the imports

    import torch

    from mule.plan.shape import new_model_config
    from mule.train.assemble import loss_scaler, model_and_optimizer
    from mule.train.meter import peak_memory_bytes
    from mule.train.step import train_step

    torch.manual_seed(0)
    resolved = bench._resolved(wanted)
    recipe = resolved.recipe
    config = new_model_config(recipe, 1)
    model, optimizer = model_and_optimizer(recipe, config, None)
    scaler = loss_scaler(resolved)
    length = recipe.data.max_seq_length

    def update() -> float:
        started_at = time.perf_counter()
        batches = bench._batches(resolved, config.vocab_size)
        train_step(model, optimizer, batches, lr=1e-4, max_grad_norm=1.0, scaler=scaler)
        return time.perf_counter() - started_at

    first = [update() for _ in range(_WARM_UP)]
    facts = {
        "active_params": cost.active_params(config),
        "total_params": cost.total_params(config),
        "num_layers": config.num_layers,
        "flops_per_token": cost.train_flops_per_token(config, length),
        "first_update_s": first[0],
        "precision": recipe.train.precision,
        "threads": int(recipe.train.threads),
        "peak_memory_bytes": peak_memory_bytes(),
    }
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        times = [update() for _ in range(int(line))]
        print(resolved.step_rows * length * len(times) / sum(times), flush=True)


# ---------------------------------------------------------------- the other parts


def ssd(plan: Plan) -> dict[str, Any]:
    """The chunked form of Mamba-2 beside a scan, token by token."""
    import lab_ssd

    return {"rows": lab_ssd.rows(quick=plan.quick)}


def moe(plan: Plan) -> dict[str, Any]:
    """Experts without dropping beside a loop over them."""
    import lab_moe

    return {"rows": lab_moe.rows(quick=plan.quick)}


def kv(plan: Plan) -> dict[str, Any]:
    """The gain of the cache beside its prediction."""
    asked = plan.kv
    words = [asked.model, f"attention={','.join(asked.attention)}"]
    for name in ("context", "batch"):
        words.append(f"{name}={','.join(str(number) for number in getattr(asked, name))}")
    for name in ("repetitions", "new_tokens", "minutes", "vocab_size"):
        words.append(f"{name}={getattr(asked, name)}")
    found = {
        precision: bench_kv.compare([*words, f"precision={precision}"])
        for precision in ("bf16", "fp32")
    }
    return {"target": KV_TARGET, "precisions": found}


PARTS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "training": training,
    "ssd": ssd,
    "moe": moe,
    "kv": kv,
}


# ---------------------------------------------------------------- the page


def report() -> None:
    """Write the section into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, section(), "lab"))


def section(results: Path = RESULTS) -> str:
    """The text of docs/performance.md."""
    return section_of(fsio.read_json(results) if results.is_file() else {})


def section_of(found: dict[str, Any]) -> str:
    """The parts that were measured, in words and tables."""
    texts = {"training": training_text, "ssd": algorithm_text, "moe": algorithm_text, "kv": kv_text}
    written = [text(found[name]) for name, text in texts.items() if name in found]
    return "\n".join(written) or f"Not measured yet: `{COMMAND}`.\n"


def training_text(found: dict[str, Any]) -> str:
    """A row for each variant."""
    lines = [
        "| variant | active / all parameters | tokens/s | useful GFLOP a token | share of peak "
        "| beside dense | first update |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in found["variants"].items():
        verdict = "" if one["beside_dense"] >= found["target"] else " (**missed**)"
        lines.append(
            f"| {name} | {one['active_params'] / 1e6:.2f} / {one['total_params'] / 1e6:.2f} M "
            f"| {one['tokens_per_second']:,.0f} | {one['flops_per_token'] / 1e9:.3f} "
            f"| {one['share_of_peak']:.1%} | {one['beside_dense']:.0%}{verdict} "
            f"| {one['first_update_s']:.0f} s |"
        )
    dense = found["variants"][DENSE]
    return "\n".join(lines) + (
        f"\n\nTraining at {found['active_params']} active parameters, a vocabulary of "
        f"{found['vocab_size']:,}, rows of {found['row_length']:,} tokens, {dense['precision']}, "
        f"{'compiled' if found['compile'] else 'not compiled'}; wanted: {found['target']:.0%} of the "
        f"dense model's share of the peak ({found['peak_flops'] / 1e9:,.0f} GFLOP/s). Rounds: "
        f"{found['rounds']} of {found['updates_a_turn']} updates, each variant right after the dense "
        f"model; medians. {where(found)}\n"
    )


def algorithm_text(found: dict[str, Any]) -> str:
    """A line for each comparison."""
    lines = []
    for row in found["rows"]:
        wanted = ""
        if row["target"] is not None:
            verdict = "met" if row["times"] >= row["target"] else "**missed**"
            wanted = f"; wanted: {row['target']:g} ({verdict})"
        note = f" {row['note']}" if row["note"] else ""
        lines.append(
            f"- {row['what']}: {1e3 * row['ours_s']:.3g} ms, {row['other']} "
            f"{1e3 * row['other_s']:.3g} ms: **{row['times']:.1f} times** as fast{wanted}.{note}"
        )
    return "\n".join([*lines, f"- {where(found)}"]) + "\n"


def kv_text(found: dict[str, Any]) -> str:
    """A line for each model and precision."""
    lines = []
    for precision, measured in found["precisions"].items():
        for row in measured["rows"]:
            place = f"- KV cache, {measured['model']} {row['attention']}, {precision}, "
            place += f"{row['context']:,} tokens, batch {row['batch']}: "
            if row["gain"] is None:
                lines.append(f"{place}the time did not allow a token without it.")
                continue
            verdict = "met" if row["share_of_prediction"] >= found["target"] else "**missed**"
            texts = "the same text" if row["same_text"] else "**another text**"
            lines.append(
                f"{place}{row['tokens_per_second']:.3g} tokens/s with it, "
                f"{row['uncached_tokens_per_second']:.3g} without: **{row['gain']:.1f} times**, "
                f"{row['share_of_prediction']:.0%} of the {row['predicted_gain']:.1f} predicted; "
                f"wanted: {found['target']:.0%} ({verdict}); {texts}."
            )
    return "\n".join([*lines, f"- {where(found)}"]) + "\n"


def where(found: dict[str, Any]) -> str:
    """The machine, the date and the command."""
    held = found["machine"]
    return f"{held['cpu']}, {held['cores']} cores, {found['date']}; `{found['command']}`."


def plan_of(words: list[str]) -> tuple[list[str], Plan]:
    """The parts to measure and how much, from the words after `run`."""
    names, numbers = split(words)
    if unknown := numbers.keys() - {"rounds"}:
        raise UserError(f"`{min(unknown)}` says nothing here", "rounds=N")
    return names, replace(Plan(), **numbers)


def main(words: list[str]) -> None:
    command, *rest = words or ["run"]
    if command == "worker":
        work(json.loads(rest[0]))
    elif command == "run":
        run(*plan_of(rest))
    else:
        {"smoke": smoke, "report": report}[command]()


if __name__ == "__main__":
    main(sys.argv[1:])
