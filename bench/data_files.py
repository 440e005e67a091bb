"""Every file of the development data, checked, previewed and prepared; and the parts of docs/data.md
that are real output.

    python bench/data_files.py run      # a few minutes; bench/results/data-files.json
    python bench/data_files.py report   # docs/data.md from what was measured

A tokenizer of 16,384 tokens is trained on a part of the data and used for all of it. Files are named
relative to the data folder; the novels of a folder share a row.
"""

from __future__ import annotations

import io
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from mule import fsio, machine
from mule.errors import MuleError

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "bench" / "results" / "data-files.json"
PAGE = ROOT / "docs" / "data.md"
VOCAB_SIZE, ROW_LENGTH = 16_384, 1024
SEEDS = (
    *("alpaca/alpaca_en_demo.json", "gsm8k/main/train-00000-of-00001.parquet"),
    *("dolly/databricks-dolly-3k.jsonl", "oasst/oasst1-en-validation.messages.jsonl"),
)
_NOT_DATA = re.compile(r"README|LICENSE|SHA256SUMS|DATASET_CARD")


def run() -> None:
    """Check, preview and prepare every file, and keep what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = _train_tokenizer(folder)
        files = [file for file in sorted(SHARED.rglob("*")) if file.is_file()]
        rows = [_one(file, tokenizer, folder) for file in files if not _NOT_DATA.search(file.name)]
        results = {
            "bench": "data-files",
            "command": "python bench/data_files.py run",
            "date": time.strftime("%Y-%m-%d"),
            "vocab_size": VOCAB_SIZE,
            "row_length": ROW_LENGTH,
            "files": rows,
            "check": _shown_check(tokenizer),
            "preview": _shown_preview(tokenizer),
            "mix": _shown_mix(folder),
            "contract": _contract(),
            "machine": machine.describe(),
        }
    fsio.write_json(RESULTS, results)
    report()


def report() -> None:
    """Write the parts of the page."""
    results = fsio.read_json(RESULTS)
    page = PAGE.read_text(encoding="utf-8")
    for name, text in {
        "check": f"```\n$ mule data check hawaiian-pizza\n{results['check']}\n```",
        "preview": "Without colours, as in a pipe (in a terminal the learned tokens are coloured):\n\n"
        f"```\n$ mule data preview glaive_toolcall_en_demo.json --n 1\n{results['preview']}\n```",
        "mix": f"```\n{results['mix']}\n```",
        "contract": _contract_table(results["contract"]),
        "files": _files_table(results),
    }.items():
        page = _replaced(page, name, text)
    fsio.write_text(PAGE, page)


def _replaced(page: str, name: str, text: str) -> str:
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"


# ---------------------------------------------------------------- every file


def _train_tokenizer(folder: Path) -> str:
    from mule.data.sources import Conversation, read
    from mule.tokenizer import Tokenizer

    texts: list[str] = []
    for item in read([SHARED / name for name in (*SEEDS, "tinystories", "books-fr")]):
        parts = (
            [m.content for m in item.messages] if isinstance(item, Conversation) else [item.text]
        )
        texts += [part[:100_000] for part in parts]
    Tokenizer.train(texts, VOCAB_SIZE).save(folder / "tokenizer")
    return str(folder / "tokenizer")


def _one(file: Path, tokenizer: str, folder: Path) -> dict[str, Any]:
    from mule.commands import data_check, data_prepare, data_preview

    name = str(file.relative_to(SHARED))
    print(name, flush=True)
    words = [str(file), "data.valid_share=0", f"data.max_seq_length={ROW_LENGTH}"]
    checked = data_check.run(words, tokenizer=tokenizer)
    problems = Counter(problem["severity"] for problem in checked["problems"])
    row = {
        "file": name,
        "bytes": file.stat().st_size,
        "format": checked["format"],
        "rows": checked["rows"],
        "ok": checked["ok"],
        "problems": dict(problems),
        "codes": sorted({problem["code"] for problem in checked["problems"]}),
        "trained_token_share": checked["trained_token_share"],
    }
    chosen = [*words, f"data.format={checked['format']}"]
    row["preview"] = _outcome(lambda: data_preview.run(chosen, tokenizer=tokenizer))
    row["prepare"] = _outcome(
        lambda: data_prepare.run(chosen, tokenizer=tokenizer, root=folder / "runs")
    )
    return row


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures, or what was said against it."""
    try:
        result = work()
    except MuleError as error:
        return {"refused": error.message.replace(f"{SHARED}/", "")}
    figures = ("rows", "examples", "tokens", "targets", "fill", "dropped")
    kept = {name: result[name] for name in figures if name in result}
    if isinstance(shown := kept.get("examples"), list):
        kept["examples"] = len(shown)
    return kept


def _files_table(results: dict[str, Any]) -> str:
    head = "| file | format | items | check | rows of 1,024 tokens | filled | too long |"
    lines = [head, "|---|---|--:|---|--:|--:|--:|"]
    novels: dict[str, list[dict[str, Any]]] = {}
    for row in results["files"]:
        folder = row["file"].split("/")[0]
        if folder.startswith("books-"):
            novels.setdefault(folder, []).append(row)
        else:
            lines.append(_files_row(row))
    lines += [_files_row(_summed(folder, rows)) for folder, rows in novels.items()]
    text = (
        f"{len(results['files'])} files, {results['date']}, `{results['command']}`. *Check*: fit to "
        "train, or what must be mended first. Each file stands alone here, so that leaks between "
        "train and validation files do not show."
    )
    return "\n".join([text, "", *lines])


def _summed(folder: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    problems: Counter[str] = Counter()
    for row in rows:
        problems.update(row["problems"])
    prepared = {
        name: sum(row["prepare"][name] for row in rows) for name in ("rows", "tokens", "dropped")
    }
    fill = sum(row["prepare"]["fill"] * row["prepare"]["rows"] for row in rows) / prepared["rows"]
    return {
        "file": f"{folder}/ ({len(rows)} files)",
        "format": ", ".join(sorted({row["format"] for row in rows})),
        "rows": sum(row["rows"] for row in rows),
        "ok": all(row["ok"] for row in rows),
        "problems": dict(problems),
        "codes": sorted({code for row in rows for code in row["codes"]}),
        "prepare": {**prepared, "fill": fill},
    }


def _files_row(row: dict[str, Any]) -> str:
    problems = row["problems"]
    found = ", ".join(f"{n} {kind}{'s' * (n > 1)}" for kind, n in sorted(problems.items()))
    verdict = ("fit" if row["ok"] else "**fix first**") + (f": {found}" if found else "")
    prepared = row["prepare"]
    if "refused" in prepared:
        figures = "read and checked only | | "
    else:
        figures = f"{prepared['rows']:,} | {prepared['fill']:.1%} | {prepared['dropped']:,} "
    return f"| `{row['file']}` | {row['format']} | {row['rows']:,} | {verdict} | {figures}|"


# ---------------------------------------------------------------- real output


def _printed(show: Callable[[Console], None]) -> str:
    file = io.StringIO()
    show(Console(file=file, width=110, color_system=None, force_terminal=False))
    return file.getvalue().rstrip().replace(f"{SHARED}/", "")


def _shown_check(tokenizer: str) -> str:
    from mule.cli.render_check import print_check
    from mule.commands import data_check

    result = data_check.run([str(SHARED / "hawaiian-pizza")], tokenizer=tokenizer)
    result["tokenizer"] = "the one given"
    return _printed(lambda console: print_check(console, result))


def _shown_preview(tokenizer: str) -> str:
    from mule.cli.render_data import print_preview
    from mule.commands import data_preview

    words = [str(SHARED / "sharegpt" / "glaive_toolcall_en_demo.json")]
    result = data_preview.run(words, tokenizer=tokenizer, n=1)
    result["tokenizer"] = "the one given"
    return _printed(lambda console: print_preview(console, result))


def _shown_mix(folder: Path) -> str:
    from mule.cli.render_mix import print_mix
    from mule.commands import data_mix
    from mule.data.sources import ReadOptions

    result = data_mix.mix(
        [str(SHARED / name) for name in SEEDS],
        out=folder / "mixed",
        caps={},
        weights={},
        repeats={},
        max_examples=80_000,
        valid_share=0.05,
        seed=0,
        near=0.8,
        decontaminate=[str(SHARED / "gsm8k" / "test.jsonl")],
        options=ReadOptions(),
    )
    return _printed(lambda console: print_mix(console, result)).replace(str(folder), "")


def _contract() -> list[list[str]]:
    sys.path.insert(0, str(ROOT))
    from tests.parity.test_label_contract import matrix

    return [list(row) for row in matrix()]


def _contract_table(matrix: list[list[str]]) -> str:
    styles = list(dict.fromkeys(style for style, _, _ in matrix))
    faults = list(dict.fromkeys(fault for _, fault, _ in matrix))
    outcomes = {(style, fault): outcome for style, fault, outcome in matrix}
    lines = [f"| planted fault | {' | '.join(styles)} |", "|---|" + ":-:|" * len(styles)]
    for fault in faults:
        cells = ["missed" if outcomes[s, fault] == "missed" else "caught" for s in styles]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    caught = sum(outcome != "missed" for _, _, outcome in matrix)
    return "\n".join([*lines, "", f"{caught} of {len(matrix)} caught."])


if __name__ == "__main__":
    {"run": run, "report": report}[sys.argv[1] if len(sys.argv) > 1 else "run"]()
