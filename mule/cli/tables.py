"""The tables of the verbs whose results are more than a list of figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mule.cli import render
from mule.figures import duration, in_bytes, short

if TYPE_CHECKING:
    from rich.console import Console


def show_demo(console: Console, result: dict[str, Any]) -> None:
    """What each stage gained, then France at every stage."""
    columns = ["stage", "seen wordings", "unseen", "in persona", "size", "perplexity", "seconds"]
    rows = [
        [
            stage["stage"],
            _share(stage["exact_match"]),
            _share(stage["exact_match_unseen"]),
            _share(stage["persona"]),
            in_bytes(stage["size_bytes"]) if "size_bytes" in stage else "",
            f"{stage['ppl']:.3f} (model {stage['ppl_reference']:.3f})" if "ppl" in stage else "",
            f"{stage['seconds']:.0f}",
        ]
        for stage in result["stages"]
    ]
    render.print_table(console, "Capitals answered right, stage by stage", columns, rows)
    render.print_line(console, "\nWhat is the capital of France?")
    for stage in result["stages"]:
        render.print_line(console, f"  {stage['stage']:<12}  {stage['france']}")
    for stage in result["stages"]:
        if "different_answers" in stage:
            render.print_line(console, f"\n{stage['stage']}: {_agreement(stage)}")
    render.print_line(console, f"\nfile  {result['file']}")


def _agreement(stage: dict[str, Any]) -> str:
    count = stage["different_answers"]
    if not count:
        return "every answer is the adapter's, token for token"
    return (
        f"{count} answers differ from the adapter's, where its two best logits are at most "
        f"{stage['widest_margin']:.1e} apart"
    )


def show_export(console: Console, result: dict[str, Any]) -> None:
    """A row for each file, what had to be done otherwise, and the commands for other programs."""
    columns = ["file", "size", "bits a weight", "tokenizer", "seconds"]
    rows = [
        [
            file["file"],
            in_bytes(file["size_bytes"]),
            f"{file['bits_per_weight']:.2f}",
            file["pre_tokenizer"],
            f"{file['seconds']:.1f}",
        ]
        for file in _with_master(result)
    ]
    render.print_table(console, f"Written to {result['folder']}", columns, rows)
    for file in result["files"]:
        for line in file["notes"]:
            render.print_line(console, f"{file['file']}: {line}")
    for line in result.get("notes", ()):
        render.print_line(console, line)
    if matrix := result.get("imatrix"):
        render.print_line(
            console, f"{matrix['file']}: importance of columns on {matrix['dataset']}"
        )
    for line in [*result.get("ollama", ()), *result.get("docker", ())]:
        render.print_line(console, f"  {line}")


def _with_master(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The files, and the kept master they were made from."""
    files: list[dict[str, Any]] = result["files"]
    master: dict[str, Any] | None = result.get("master")
    return files if master is None or master in files else [master, *files]


def show_merge(console: Console, result: dict[str, Any]) -> None:
    """What was written, and how far it is from the adapter on its base."""
    proof, dtype = result["proof"], result["dtype"]
    found = {
        f"merged, as written ({dtype})": proof["against_adapter"],
        "the base alone": proof["base_against_adapter"],
    }
    for name, distance in (result["quantized"] or {}).items():
        found[f"merged onto the {name} base, fp32"] = distance
    rows = [
        [what, _small(d["max_logit_difference"]), _small(d["kl_mean"]), _share(d["top1"], 1)]
        for what, d in found.items()
    ]
    trained = (
        "the adapter on its base in 4 bits" if result["quantized"] else "the adapter on its base"
    )
    columns = [f"against {trained}", "greatest logit difference", "KL in nats", "same best token"]
    render.print_table(console, f"Merged into {result['folder']}", columns, rows)
    render.print_line(
        console,
        f"\n{result['num_layers']} matrices changed, {in_bytes(result['size_bytes'])}; the merge in "
        f"fp32 changes a logit by at most {_small(proof['arithmetic'])}, rounding to {dtype} by "
        f"{_small(proof['rounding'])}; {proof['probe_tokens']} positions",
    )


def show_verify(console: Console, result: dict[str, Any]) -> None:
    """A row for each file, then its verdict, and every check where one failed."""
    columns = [
        *("file", "size", "bits", "weights", "same ids", "KL mean", "KL p99", "top-1"),
        *("perplexity", "same answers", "stops", "tokens/s", ""),
    ]
    rows = [
        [
            file["file"].rsplit("/", 1)[-1],
            in_bytes(file["size_bytes"]),
            f"{file['bits_per_weight']:.2f}",
            _proven(file, "weights"),
            _word(file["tokens_equal"]),
            _small(file["kl_mean"]),
            _small(file["kl_p99"]),
            _share(file["top1"], digits=2),
            _perplexity(file),
            f"{file['num_greedy_equal']}/{file['num_prompts']}",
            _word(file["stops"]),
            _speed(file),
            "ok" if file["ok"] else "FAILED",
        ]
        for file in result["files"]
    ]
    by = " and ".join(sorted({file["runtime"] for file in result["files"]}))
    render.print_table(console, f"In {by}, beside {result['against']}", columns, rows)
    for file in result["files"]:
        render.print_line(console, f"\n{file['file']}\n  {file['verdict']}")
        told = file["checks"] if not file["ok"] else []
        unchecked = [check for check in file["checks"] if check["ok"] is None]
        for check in told or unchecked:
            mark = {True: "ok", False: "FAILED", None: "not checked"}[check["ok"]]
            render.print_line(console, f"  {check['name']:<14}{mark:<13}{check['detail']}")
        shown = [file["verdict"], *(check["detail"] for check in told)]
        more = [f for f in file["failures"] if not any(f.endswith(text) for text in shown)]
        for line in [*more, *file["notes"]]:
            render.print_line(console, f"  {line}")


def _proven(file: dict[str, Any], name: str) -> str:
    found = [check["ok"] for check in file["checks"] if check["name"] == name]
    return _word(found[0]) if found else "-"


def _perplexity(file: dict[str, Any]) -> str:
    if file["ppl"] is None:
        return "-"
    return f"{file['ppl']:.3f} ({file['ppl_change']:+.2%})"


def _speed(file: dict[str, Any]) -> str:
    """Of the file and, behind it, of the model."""
    if file["tokens_per_second"] is None:
        return "-"
    own = file["reference_tokens_per_second"]
    return short(file["tokens_per_second"]) + (f" ({short(own)})" if own else "")


def _share(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _word(value: bool | None) -> str:
    return {True: "yes", False: "NO", None: "-"}[value]


def show_to_gguf(console: Console, result: dict[str, Any]) -> None:
    """A row for each stage, the answers before and after, and the commands for other programs."""
    rows = [
        [stage["stage"], stage["result"], _stage_figures(stage), f"{stage['seconds']:.1f}"]
        for stage in result["stages"]
    ]
    columns = ["stage", "result", "figures", "seconds"]
    render.print_table(console, f"{result['run']}, step by step", columns, rows)
    for answer in result["answers"]:
        render.print_line(console, f"\n> {answer['prompt']}")
        if answer["base"] is not None:
            render.print_line(console, f"  base   {_indented(answer['base'])}")
        render.print_line(console, f"  tuned  {_indented(answer['tuned'])}")
    render.print_line(console, "")
    for line in result.get("notes", ()):
        render.print_line(console, line)
    for line in [*result["ollama"], *result["docker"]]:
        render.print_line(console, f"  {line}")


def _stage_figures(stage: dict[str, Any]) -> str:
    told = []
    if "val_loss" in stage and stage["val_loss"] is not None:
        told.append(f"validation loss {stage['val_loss']:.4g}")
    if "max_logit_difference" in stage:
        told.append(f"logits differ by at most {_small(stage['max_logit_difference'])}")
    if "size_bytes" in stage:
        told.append(in_bytes(stage["size_bytes"]))
    if "kl_mean" in stage:
        told.append(f"KL {_small(stage['kl_mean'])}, same top token {_share(stage['top1'], 1)}")
    return ", ".join(told)


def _indented(answer: str) -> str:
    return answer.replace("\n", "\n         ") or "(nothing)"


def show_recipes(console: Console, result: dict[str, Any]) -> None:
    """What each model takes; below, the other recipes."""
    if result["catalogue"]:
        columns = ["recipe", "model", "parameters", "task", "download", "memory", "Q4_K_M", "time"]
        rows = [
            [
                row["name"],
                row["model"],
                short(row["parameters"]),
                row["task"],
                in_bytes(row["download_bytes"]),
                in_bytes(row["memory_bytes"]) + (f" x {row['gpus']}" if row["gpus"] > 1 else ""),
                in_bytes(row["q4_k_m_bytes"]),
                row["time"],
            ]
            for row in result["catalogue"]
        ]
        render.print_table(console, "Fine-tuning on your chats", columns, rows)
        render.print_line(console, f"\n{result['basis']}\n")
    if result["recipes"]:
        rows = [[row["name"], row["about"]] for row in result["recipes"]]
        render.print_table(console, "Other recipes", ["recipe", "what it does"], rows)


def show_runs(console: Console, result: dict[str, Any]) -> None:
    """A row for each run, the one written last first."""
    if not result["runs"]:
        render.print_line(console, f"no runs in {result['root']}")
        return
    columns = [
        "run",
        "state",
        "stage",
        "updates",
        "left",
        "loss",
        "val_loss",
        "tokens/s",
        "changed_at",
    ]
    rows = [
        [
            run["run"],
            run["state"],
            run["stage"],
            f"{run['steps']:,}" + (f"/{run['num_steps']:,}" if run["num_steps"] else ""),
            "" if run["left_s"] is None else duration(run["left_s"]),
            run["loss"],
            run["val_loss"],
            short(run["tokens_per_second"]) if run["tokens_per_second"] else "-",
            run["updated_at"],
        ]
        for run in result["runs"]
    ]
    render.print_table(console, "", columns, rows)
