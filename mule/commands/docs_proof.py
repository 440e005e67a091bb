"""The table of README.md: what Mule proves and how well, a line for each thing that was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from mule import fsio
from mule.commands.docs_accuracy import is_whole
from mule.commands.docs_table import table
from mule.french import Language, Speaker, speaker
from mule.message import Message

BLOCK = "proof"  # of the marks in the page
PAGES: dict[str, Language] = {"README.md": "en", "README.fr.md": "fr"}  # beside docs/
_CATALOGUE = "commands"  # the part of Mule that holds the French
_MULE = "mule"
_HALF = 0.5  # of a run, where its forecast is judged
Found = dict[str, Any]


def proof_markdown(results: Path, language: Language = "en") -> str:
    """The table; what has no result yet has no line."""
    say = speaker(language, _CATALOGUE)
    rows = []
    for name, claim, page, figures in _CLAIMS:
        file = results / f"{name}.json"
        if file.is_file() and is_whole(found := fsio.read_json(file)):
            rows.append((say(claim), say(figures(found)), _link(page, say)))
    return table([say(column) for column in ("claim", "measured", "where")], rows)


def _link(page: str, say: Speaker) -> str:
    return f"[{say(_TITLES[page])}]({page})"


# ---------------------------------------------------------------- a function for each result


def _verify(found: Found) -> Message:
    faults, good = found["faults"], found["good"]
    named, passed = sum(row["named"] for row in faults), sum(row["ok"] for row in good)
    return Message(
        "{:,} of {:,} files with a planted fault named, {:,} of {:,} good exports passed",
        *(named, len(faults), passed, len(good)),
    )


def _reliability(found: Found) -> Message:
    trials = sum(figure["trials"] for figure in found.values())
    held = trials - sum(len(figure["failures"]) for figure in found.values())
    killed = found["F1"]
    return Message(
        "{:,} of {:,} runs killed at a random moment ended with the same bits; all promises of the page "
        "(disk, power, memory, NaN, signals...) held in {:,} of {:,} trials",
        *(killed["trials"] - len(killed["failures"]), killed["trials"], held, trials),
    )


def _doctor(found: Found) -> Message:
    recall, healthy = found["held-out"]["recall"], found["held-out"]["healthy"]
    return Message(
        "{:,} of {:,} planted faults found, {:,} of {:,} healthy runs warned of, on runs kept from "
        "those who wrote the rules",
        *(recall["found"], recall["runs"], healthy["false_alarms"], healthy["runs"]),
    )


def _plan(found: Found) -> Message:
    figures = found["summary"]["held out"]
    return Message(
        "memory off by {:.1%} and time by {:.1%} (medians) in {:,} runs that its constants were not "
        "fitted on",
        *(figures["memory"]["median_error"], figures["time"]["median_error"], figures["runs"]),
    )


def _forecast(found: Found) -> Message:
    (row,) = (
        row
        for row in found["rows"]
        if (row["figure"], row["share"], row["kind"]) == ("val_loss", _HALF, "all")
    )
    return Message(
        "at half of a run the 80% interval held the last validation loss in {:.0%} of {:,} runs, its "
        "middle off by {:.3f} nats (median)",
        *(row["covered"], row["num_runs"], row["median_error"]),
    )


def _load(found: Found) -> Message:
    equal, loads = found["equality"], found["load"]
    requests, errors = (sum(load[name] for load in loads) for name in ("requests", "errors"))
    return Message(
        "{:,} of {:,} answers given to 64 clients at once are those given alone; {:,} errors in {:,} "
        "requests, hostile ones among them",
        *(equal["equal"], equal["compared"], errors, requests),
    )


def _pretraining(found: Found) -> Message:
    rounds = [shape["rounds"] for shape in found["shapes"].values()]
    return Message(
        "{:.2f} to {:.2f} times the speed of the fastest of them, in {:.0%} to {:.0%} of the memory "
        "of the leanest",
        *_beside(rounds, "tokens_per_second"),
    )


def _fine_tuning(found: Found) -> Message:
    rounds = [work["rounds"] for work in found["workloads"].values()]
    return Message(
        "{:.2f} to {:.2f} times its speed in the first epoch, in {:.0%} to {:.0%} of its memory",
        *_beside(rounds, "chats_per_second"),
    )


def _beside(jobs: Iterable[list[Mapping[str, Any]]], speed: str) -> tuple[float, ...]:
    """Speed beside the fastest peer and memory beside the leanest, from the least to the most."""
    speeds, memories = [], []
    for rounds in jobs:
        peers = [name for name in rounds[0] if not name.startswith(_MULE) and name != "peaks"]
        figures = {
            name: (
                median(each[name][speed] for each in rounds),
                median(each[name]["peak_bytes"] for each in rounds),
            )
            for name in (_MULE, *peers)
        }
        speeds.append(figures[_MULE][0] / max(figures[name][0] for name in peers))
        memories.append(figures[_MULE][1] / min(figures[name][1] for name in peers))
    return min(speeds), max(speeds), min(memories), max(memories)


def _near_duplicates(found: Found) -> Message:
    return Message(
        "{:.1%} of {:,} planted pairs found among {:,} texts, and {:.1%} of what was found is right",
        *(found["recall"], found["planted_pairs_at_threshold"], found["texts"]),
        found["precision"],
    )


_TITLES = {
    "docs/verify.md": "verify",
    "RELIABILITY.md": "reliability",
    "docs/accuracy.md": "accuracy",
    "docs/serve.md": "serve",
    "docs/performance.md": "performance",
    "docs/data.md": "data",
}
# The result's file, what is claimed, the page that shows it whole, the figures of it.
_CLAIMS: tuple[tuple[str, str, str, Callable[[Found], Message]], ...] = (
    ("verify", "An exported file is the model", "docs/verify.md", _verify),
    ("reliability", "A killed run goes on as if nothing had been", "RELIABILITY.md", _reliability),
    ("doctor", "A sick run is recognised", "docs/accuracy.md", _doctor),
    ("plan", "What a run takes is known before", "docs/accuracy.md", _plan),
    ("forecast", "Where a run ends is told on the way", "docs/accuracy.md", _forecast),
    ("load", "A served answer is the model's own", "docs/serve.md", _load),
    (
        *("peers-train", "Pretraining beside plain PyTorch, HF Trainer and LitGPT, two cores"),
        *("docs/performance.md", _pretraining),
    ),
    ("finetune", "Fine-tuning beside TRL, two cores", "docs/performance.md", _fine_tuning),
    ("near_duplicates", "Near-duplicates in data are found", "docs/data.md", _near_duplicates),
)
