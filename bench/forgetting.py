"""What a tuned model forgets when it is taught more: the ways to add knowledge, side by side.

    python bench/forgetting.py run      # 50 minutes on two cores; bench/results/forgetting.json
    python bench/forgetting.py smoke    # at a size that shows only that it runs; keeps nothing
    python bench/forgetting.py report   # the table of docs/adding-knowledge.md

The knowledge is the demo's atlas, its countries dealt into three hands. A small base model reads
and answers about the first. An adapter is then taught the second: the *old* knowledge. The third is
the *new* one, which each way adds to it. Validation asks about the same facts in words that were
never trained, a file for the old countries and one for the new.

Every way takes the same rate, rank and number of epochs of its data, but for `short`, which is
`merge-warm` with as many updates as `warm` makes. The base is the same for all seeds, which decide
the adapter's start and the order of the rows.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mule import fsio, machine
from mule.commands import docs
from mule.data.atlas import COUNTRIES, Country, Sizes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "forgetting.json"
PAGE = docs.settings.DOCS / "adding-knowledge.md"
SEEDS = (0, 1, 2)
_NOTHING_YET = "Not measured yet: `python bench/forgetting.py run`.\n"


@dataclass(frozen=True)
class Way:
    """A way to add knowledge: what it trains on, and whether it begins with the old adapter."""

    title: str
    data: tuple[str, ...]
    warm: bool
    same_updates_as: str | None = None


WAYS = {
    "afresh": Way("merge the data, start afresh", ("old", "new"), warm=False),
    "warm": Way("warm start, new data only", ("new",), warm=True),
    "merge-warm": Way("merge the data, warm start", ("old", "new"), warm=True),
    "short": Way("the same, as many updates as with new data only", ("old", "new"), True, "warm"),
}


def _wordings() -> dict[str, int]:
    return dict.fromkeys(("currency", "continent", "river", "neighbours", "country"), 4) | {
        "capital": 8
    }


@dataclass(frozen=True)
class Scale:
    """How much is trained; the defaults are those of the table."""

    model: str = "5m"
    vocab_size: int = 2048
    num_countries: int = len(COUNTRIES)
    pretrain_bytes: int = 300_000
    pretrain_steps: int = 300
    sft_steps: int = 300
    epochs: int = 12
    adapter_rate: float = 5e-3
    row_length: int = 256
    valid_rows: int = 300
    threads: int | None = None  # as many as there are
    wordings: dict[str, int] = field(default_factory=_wordings)  # per fact


TINY = Scale(
    model="1m",
    vocab_size=400,
    num_countries=6,
    pretrain_bytes=20_000,
    pretrain_steps=2,
    sft_steps=2,
    epochs=1,
    row_length=128,
    valid_rows=12,
    threads=1,
    wordings=dict.fromkeys(_wordings(), 1),
)


def run() -> None:
    """Measure every way with every seed; a finished seed is kept at once."""
    scale = Scale()
    with tempfile.TemporaryDirectory(prefix="mule-forgetting-") as name:
        bench = Bench(Path(name), scale)
        bench.prepare()
        found: dict[str, Any] = {}
        for seed in SEEDS:
            found[str(seed)] = bench.measure(seed)
            fsio.write_json(RESULTS, described(scale, bench.num_rows, found))
            report()


def smoke() -> dict[str, Any]:
    """Every way once at a tiny size; the figures mean nothing."""
    with tempfile.TemporaryDirectory(prefix="mule-forgetting-") as name:
        bench = Bench(Path(name), TINY)
        bench.prepare()
        return described(TINY, bench.num_rows, {"0": bench.measure(0)})


def report() -> None:
    """Write the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    fsio.write_text(PAGE, docs.with_generated(page, table(), "forgetting"))


# ---------------------------------------------------------------- measuring


class Bench:
    """A folder with the base, the data of each hand, and a run for each way and seed."""

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.runs = folder / "runs"
        self.num_rows: dict[str, int] = {}

    def prepare(self) -> None:
        """Write the data, and train the base on its own countries."""
        dealt = COUNTRIES[: self.scale.num_countries]
        for place, hand in enumerate(("base", "old", "new")):
            self._write(hand, dealt[place::3])
        scale = self.scale
        text = [f"model.size={scale.model}", f"tokenizer.vocab_size={scale.vocab_size}"]
        self._train("text", "base.txt", scale.pretrain_steps, 3e-3, text)
        chats = [f"model.path={self.runs / 'text'}", "adapter.kind=none"]
        self._train("base", "base.jsonl", scale.sft_steps, 2e-3, chats)

    def measure(self, seed: int) -> dict[str, Any]:
        """The losses of the tuned model before, and of every way after."""
        before = self._adapt(f"old-{seed}", ("old",), seed)
        found: dict[str, Any] = {"before": before}
        for name, way in WAYS.items():
            warm = self.runs / f"old-{seed}" if way.warm else None
            steps = found[way.same_updates_as]["updates"] if way.same_updates_as else None
            found[name] = self._adapt(f"{name}-{seed}", way.data, seed, warm=warm, steps=steps)
            print(f"seed {seed}, {name}: {json.dumps(found[name])}", flush=True)
        return found

    def _write(self, hand: str, countries: tuple[Country, ...]) -> None:
        """A hand's chats to train on and to validate with; for the base also its text."""
        from mule.data.atlas import chats, corpus
        from mule.data.atlas.plan import make_plan
        from mule.data.atlas.voice import Plain

        is_base = hand == "base"
        more: dict[str, Any] = {} if is_base else {"sums": 0, "dialogues": 0, "talk_variants": 0}
        sizes = Sizes(
            wordings=self.scale.wordings,
            pretrain_bytes=self.scale.pretrain_bytes,
            valid_rows=self.scale.valid_rows,
            **more,
        )
        plan = make_plan(0, countries, sizes)
        rows = {"": chats.sft_rows(plan), ".valid": chats.valid_rows(plan, Plain())}
        for name, found in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in found)
            fsio.write_text(self.folder / f"{hand}{name}.jsonl", lines)
        self.num_rows[hand] = len(rows[""])
        if is_base:
            fsio.write_text(self.folder / "base.txt", corpus.pretrain_text(plan))

    def _adapt(
        self,
        name: str,
        data: tuple[str, ...],
        seed: int,
        *,
        warm: Path | None = None,
        steps: int | None = None,
    ) -> dict[str, Any]:
        """Train an adapter, and measure it on the old and on the new countries."""
        words = [
            f"model.path={self.runs / 'base'}",
            "adapter.kind=lora",
            "adapter.lora.r=16",
            "adapter.lora.alpha=32",
            f"train.seed={seed}",
        ]
        if warm is not None:
            words.append(f"adapter.warm_start={warm}")
        files = ",".join(str(self.folder / f"{hand}.jsonl") for hand in data)
        summary = self._train(name, files, steps, self.scale.adapter_rate, words)
        return {
            "updates": summary["steps"],
            "seconds": summary["tokens"] / summary["tokens_per_second"],
            "old_loss": self._loss(name, "old"),
            "new_loss": self._loss(name, "new"),
        }

    def _train(
        self, name: str, files: str, steps: int | None, rate: float, words: list[str]
    ) -> dict[str, Any]:
        """`mule train` in the folder of runs; without `steps`, the epochs of the scale."""
        from mule.commands import train

        if "/" not in files:
            files = str(self.folder / files)
        length = f"train.steps={steps}" if steps else f"train.epochs={self.scale.epochs}"
        settings = [
            f"data.train=[{files}]",
            "data.valid_share=0",
            f"data.max_seq_length={self.scale.row_length}",
            length,
            "train.step_rows=8",
            "train.micro_batch_rows=8",
            "train.compile=false",
            f"optim.learning_rate={rate}",
            "checkpoint.every_steps=1000000",
        ]
        if self.scale.threads:
            settings.append(f"train.threads={self.scale.threads}")
        return train.run(None, [*settings, *words], name=name, root=self.runs)

    def _loss(self, name: str, hand: str) -> float:
        from mule.commands import eval as evaluation

        held_out = [str(self.folder / f"{hand}.valid.jsonl")]
        return evaluation.run([str(self.runs / name)], data=held_out, with_base=False)["loss"]


# ---------------------------------------------------------------- the table


def described(scale: Scale, num_rows: dict[str, int], found: dict[str, Any]) -> dict[str, Any]:
    """What is kept; no path of this machine."""
    import torch

    return {
        "bench": "forgetting",
        "command": "python bench/forgetting.py run",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "scale": asdict(scale),
        "rows": num_rows,
        "seeds": found,
        "machine": machine.describe(),
    }


def table(results: Path = RESULTS) -> str:
    """The table of docs/adding-knowledge.md, and what it was measured on."""
    if not results.is_file():
        return _NOTHING_YET
    found = fsio.read_json(results)
    head = (
        "| | updates | seconds | old validation loss | change | new validation loss | change |\n"
        "|---|--:|--:|--:|--:|--:|--:|"
    )
    titles = {"before": "before: the tuned model"}
    titles |= {name: way.title for name, way in WAYS.items()}
    lines = [_line(title, name, found["seeds"]) for name, title in titles.items()]
    return "\n".join([head, *lines, "", _note(found)]) + "\n"


def _line(title: str, name: str, seeds: dict[str, Any]) -> str:
    """A row: means over the seeds, changes with their range."""
    rows = [seed[name] for seed in seeds.values()]
    cells = [f"{rows[0]['updates']:,}", f"{statistics.mean(row['seconds'] for row in rows):.0f}"]
    for loss in ("old_loss", "new_loss"):
        cells.append(f"{statistics.mean(row[loss] for row in rows):.3f}")
        changes = [seed[name][loss] - seed["before"][loss] for seed in seeds.values()]
        told = f"{statistics.mean(changes):+.3f} ({min(changes):+.3f} to {max(changes):+.3f})"
        cells.append("" if name == "before" else told)
    return f"| {title} | {' | '.join(cells)} |"


def _note(found: dict[str, Any]) -> str:
    scale, rows = found["scale"], found["rows"]
    return (
        f"Means over {len(found['seeds'])} seeds, and the range of the changes. "
        f"Model `{scale['model']}`, "
        f"LoRA rank 16 on all linear layers, {rows['old']:,} old and {rows['new']:,} new chats, "
        f"{scale['epochs']} epochs at {scale['adapter_rate']:g}. Seconds are those of the updates. "
        f"{found['machine']['cpu']}, "
        f"{found['date']}, torch {found['torch']}; `{found['command']}`."
    )


if __name__ == "__main__":
    commands = {"run": run, "smoke": smoke, "report": report}
    commands[(sys.argv[1:] or ["run"])[0]]()
