"""The tables of exports other than GGUF files of a model, and of what goes to the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render, tables
from mule.figures import in_bytes

if TYPE_CHECKING:
    from rich.console import Console


def show_adapter(console: Console, result: dict[str, Any]) -> None:
    """The files, what llama.cpp gave with them, and the commands for Ollama."""
    columns = ["file", "size", "weights", "rank", "seconds"]
    rows = [
        [
            file["file"],
            in_bytes(file["size_bytes"]),
            file["num_weights"],
            ", ".join(map(str, file["ranks"])),
            f"{file['seconds']:.1f}",
        ]
        for file in result["files"]
    ]
    render.print_table(console, f"Written to {result['folder']}", columns, rows)
    if checks := [file["check"] for file in result["files"] if "check" in file]:
        _show_checks(console, checks)
    for line in result["notes"]:
        render.print_line(console, line)
    for line in result["ollama"]:
        render.print_line(console, f"  {line}")


def show_hf(console: Console, result: dict[str, Any]) -> None:
    """What was written, and how it was proven."""
    size, files = in_bytes(result["size_bytes"]), len(result["files"])
    render.print_line(
        console, f"Written to {result['folder']}: {size} of {result['dtype']} in {files} files"
    )
    render.print_line(console, result["verdict"])


def show_verify(console: Console, result: dict[str, Any]) -> None:
    """Of models a row for each file; of adapters with the file of the base that each ran on."""
    if "adapters" not in result:
        tables.show_verify(console, result)
        return
    _show_checks(console, result["adapters"])
    for line in result["notes"]:
        render.print_line(console, line)


def _show_checks(console: Console, checks: list[dict[str, Any]]) -> None:
    columns = ["", "greatest logit difference", "KL in nats", "same best token"]
    for check in checks:
        rows = [
            _distance("with the adapter, against torch", check["with_adapter"]),
            _distance("without, against the base in torch", check["without"]),
            _distance("what the adapter changes", check["effect"]),
        ]
        title = f"\n{check['file']} on {check['base_file']}, in llama.cpp"
        render.print_table(console, title, columns, rows)
        render.print_line(console, check["verdict"])
        for line in check["notes"]:
            render.print_line(console, line)


def _distance(what: str, found: dict[str, float]) -> list[str]:
    return [
        what,
        f"{found['max_logit_difference']:.1e}",
        f"{found['kl_mean']:.1e}",
        f"{found['top1']:.1%}",
    ]


def show_push_plan(console: Console, told: dict[str, Any]) -> None:
    """What would be uploaded where, and what that replaces."""
    kind = "private" if told["private"] else "public"
    state = f"a new {kind} repository" if told["is_new"] else f"which exists and is {kind}"
    rows = [[file["file"], in_bytes(file["size_bytes"]), file["change"]] for file in told["files"]]
    title = f"To {told['page']}, {state}"
    render.print_table(console, title, ["file", "size", "change"], rows)
    if told["left_out"]:
        render.print_line(console, f"not uploaded: {', '.join(told['left_out'])}")


def show_push(console: Console, result: dict[str, Any]) -> None:
    """Where it is now."""
    changed = [file for file in result["files"] if file["change"] != "same"]
    if not changed:
        render.print_line(console, f"{result['page']} has these files already")
        return
    size = in_bytes(sum(file["size_bytes"] for file in changed))
    render.print_line(console, f"Uploaded {len(changed)} files, {size}, to {result['page']}")
    render.print_line(console, f"commit {result['commit']}")
