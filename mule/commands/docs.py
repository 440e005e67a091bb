"""The generated pages of docs/: `python -m mule.commands.docs` (make docs) writes all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio
from mule.commands import (
    docs_accuracy,
    docs_cli,
    docs_doctor,
    docs_proof,
    docs_serve,
    docs_ui,
    docs_verify,
)
from mule.commands.catalogue import catalogue_markdown, write_catalogue
from mule.commands.docs_table import table
from mule.config import docs as settings
from mule.config.schema import ModelSection, Recipe
from mule.data.sources import FORMATS
from mule.errors import UserError
from mule.models import cost
from mule.models.config import SIZES, ModelConfig
from mule.plan.shape import new_model_config

SIZES_PAGE, PERFORMANCE_PAGE, DATA_PAGE = "sizes.md", "performance.md", "data.md"
CHOOSE_PAGE = "choose-a-model.md"
RESULTS = settings.DOCS.parent / "bench" / "results"
_SMALL, _LARGE, _ROW_LENGTH = 4_096, 32_768, 1024
_MARKS = ("<!-- {}: begin -->", "<!-- {}: end -->")

_SIZES_TEXT = f"""\
# Named sizes

<!-- Generated from mule/models/config.py by `make docs`; edit that file. -->

`model.size: 25m` in a recipe gives a new model its shape. Dimensions given beside it replace its
own, so `model.num_layers: 8` makes a shallower one. Figures are for the default family (`qwen3`,
with the head tied to the embedding).

- The embedding is a large part of a small model, so its vocabulary matters: all parameters are
  given at a vocabulary of {_SMALL:,} and of {_LARGE:,} tokens. From 25m up the name counts them
  at {_LARGE:,}, below at {_SMALL:,}. *Body* is everything but the embedding.
- *FLOPs a token* is the useful work of training on one token (forward and backward) at a
  vocabulary of {_LARGE:,} in rows of {_ROW_LENGTH:,} tokens: 6 for each parameter of a matrix
  product (the head counts), and 6 x layers x row length x heads x head width for causal attention.
- *KV cache* is the memory one token of context takes when the model is used, in 16 bits.

"""
_SIZES_COLUMNS = (
    *("size", "made for", "layers", "width", "heads / KV heads", "feed-forward", "body"),
    *(f"all, at {_SMALL:,}", f"all, at {_LARGE:,}", "FLOPs a token", "KV cache a token"),
)

_PERFORMANCE_TEXT = """\
## Training speed

`mule bench train` (or `make bench`) measures whole updates of the size `25m` on random tokens: a
vocabulary of 32,768, rows of 1,024 tokens, about 8,192 tokens an update, in the precision and the
micro-batch that `mule train` would choose on the machine, compiled. An update is all that a run
does between two rows of its log: making the batch, forward, backward, gradient norm, clipping and
AdamW with fp32 master weights. Other settings are given as for `mule train`:
`mule bench train model.size=10m train.compile=false`.

- At least 5 updates warm up, more until three in a row differ by at most 5%. Then at least 10
  updates, and at least 20 seconds of them, are timed together.
- **Useful FLOPs** a token = 6 x (parameters of matrix products, the head counted) + 6 x layers x
  row length x heads x head width. The last term is causal attention, half of the full square. What
  is computed twice or thrown away does not count.
- **Peak** is the best rate of a square matrix product of 1024, 2048 or 4096 in the same precision
  with the same threads, measured in the same run, before and after the updates; the larger figure
  counts, since other work can only lower it.
- **Share of peak** = tokens a second x useful FLOPs a token / peak.
- Memory is the most the whole process held.

"""
_TRAIN_COLUMNS = (
    *("model", "machine", "arithmetic", "measured", "threads", "tokens/s", "useful GFLOP/s"),
    *("peak GFLOP/s", "share of peak", "memory"),
)
_MAX_KEY_SETS = 3  # shown of a format
_NOTHING_YET = "Nothing is recorded yet: `make bench`, then `make docs`.\n"


def sizes_markdown() -> str:
    """docs/sizes.md: one row for each named size."""
    return _SIZES_TEXT + table(_SIZES_COLUMNS, [_size_row(name) for name in SIZES], num_words=2)


def performance_markdown(results: Path = RESULTS) -> str:
    """The generated part of docs/performance.md: the method, and a row for each result kept."""
    found = [fsio.read_json(file) for file in sorted(results.glob("train*.json"))]
    if not found:
        return _PERFORMANCE_TEXT + _NOTHING_YET
    rows = [_bench_row(result) for result in found]
    return _PERFORMANCE_TEXT + table(_TRAIN_COLUMNS, rows, num_words=4)


def formats_markdown() -> str:
    """The formats of data files, for docs/data.md."""
    rows = []
    for name, known in FORMATS.items():
        groups = [", ".join(f"`{key}`" for key in group) for group in known.keys]
        if more := groups[_MAX_KEY_SETS:]:
            groups = [*groups[:_MAX_KEY_SETS], f"{len(more)} sets more"]
        keys = " or ".join(groups) or "(files of text)"
        rows.append((f"`{name}`", known.kind, keys, known.purpose.replace("|", r"\|")))
    return table(("format", "makes", "found by its keys", "what it is"), rows, num_words=4)


def near_markdown(results: Path = RESULTS) -> str:
    """The near-duplicate search as measured, for docs/data.md."""
    file = results / "near_duplicates.json"
    if not file.is_file():
        return _NOTHING_YET
    found = fsio.read_json(file)
    return (
        f"Near-duplicates: {found['texts']:,} texts ({found['bytes'] / 1e6:.0f} MB) in "
        f"{found['seconds']:.1f} s on {found['machine']['cores']} cores, "
        f"{found['peak_memory_bytes'] / 1e6:.0f} MB at most; of "
        f"{found['planted_pairs_at_threshold']:,} planted pairs with a Jaccard index of "
        f"{found['threshold']:g} or more {found['recall']:.2%} were found, and "
        f"{found['precision']:.2%} of what was found is right (`{found['command']}`, {found['date']}).\n"
    )


def with_generated(page: str, generated: str, name: str = "generated") -> str:
    """`page` with the text between its two marks replaced; UserError when it has none."""
    begin_mark, end_mark = (mark.format(name) for mark in _MARKS)
    before, begin, rest = page.partition(begin_mark)
    _, end, after = rest.partition(end_mark)
    if not begin or not end:
        raise UserError(
            "a page of docs/ has lost the marks of its generated part",
            f"put {begin_mark} and {end_mark} back, each on its own line",
        )
    return f"{before}{begin}\n\n{generated}\n{end}{after}"


def generated_pages(folder: Path = settings.DOCS, results: Path = RESULTS) -> dict[str, str]:
    """Every page with a generated part, and its text as it must be."""
    names = (PERFORMANCE_PAGE, DATA_PAGE, CHOOSE_PAGE)
    names += (docs_serve.PAGE, docs_verify.PAGE, docs_ui.PAGE)
    page, data, choose, serve, proof, ui = (
        (folder / name).read_text(encoding="utf-8") for name in names
    )
    data = with_generated(data, formats_markdown(), "formats")
    proof = with_generated(proof, docs_verify.limits_markdown(), "limits")
    return {
        SIZES_PAGE: sizes_markdown(),
        PERFORMANCE_PAGE: with_generated(page, performance_markdown(results)),
        DATA_PAGE: with_generated(data, near_markdown(results), "near"),
        CHOOSE_PAGE: with_generated(choose, catalogue_markdown(), "catalogue"),
        docs_serve.PAGE: with_generated(serve, docs_serve.load_markdown(results), "load"),
        docs_verify.PAGE: with_generated(proof, docs_verify.verify_markdown(results), "faults"),
        docs_doctor.PAGE: docs_doctor.rules_markdown(),
        docs_accuracy.PAGE: docs_accuracy.accuracy_markdown(results),
        docs_ui.PAGE: with_generated(ui, docs_ui.speed_markdown(results), docs_ui.BLOCK),
        docs_cli.PAGE: docs_cli.cli_markdown(),
        **_front_pages(folder, results),
    }


def _front_pages(folder: Path, results: Path) -> dict[str, str]:
    """README in each language, beside `folder`, with the table of what is proven."""
    found = {}
    for name, language in docs_proof.PAGES.items():
        page = (folder.parent / name).read_text(encoding="utf-8")
        proof = docs_proof.proof_markdown(results, language)
        found[f"../{name}"] = with_generated(page, proof, docs_proof.BLOCK)
    return found


def write(folder: Path = settings.DOCS, results: Path = RESULTS) -> None:
    """Write every generated page."""
    settings.write(folder)
    write_catalogue()
    for name, text in generated_pages(folder, results).items():
        fsio.write_text(folder / name, text)


# ---------------------------------------------------------------- rows


def _size_row(name: str) -> tuple[Any, ...]:
    small, large = _config(name, _SMALL), _config(name, _LARGE)
    return (
        f"`{name}`",
        SIZES[name].purpose,
        large.num_layers,
        f"{large.hidden_size:,}",
        f"{large.num_heads} / {large.num_kv_heads}",
        f"{large.intermediate_size:,}",
        _millions(cost.total_params(large) - cost.embedding_params(large)),
        _millions(cost.total_params(small)),
        _millions(cost.total_params(large)),
        f"{cost.train_flops_per_token(large, _ROW_LENGTH) / 1e6:,.0f} M",
        f"{cost.kv_bytes_per_token(large) / 1024:g} KiB",
    )


def _config(name: str, vocab_size: int) -> ModelConfig:
    return new_model_config(Recipe(model=ModelSection(size=name)), vocab_size)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _bench_row(result: dict[str, Any]) -> tuple[Any, ...]:
    used, machine = result["settings"], result["machine"]
    compiled = "compiled" if used["compile"] else "not compiled"
    peak = max(result["peak_flops_before"], result["peak_flops_after"])
    return (
        result["model"]["name"],
        machine["gpu"] or machine["cpu"],
        f"{used['precision']}, {compiled}",
        f"{result['date']}, torch {result['torch']}: `{result['command']}`",
        used["threads"],
        f"{result['tokens_per_second']:,.0f}",
        f"{result['flops_per_second'] / 1e9:,.0f}",
        f"{peak / 1e9:,.0f}",
        f"**{result['share_of_peak']:.1%}**",
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
    )


if __name__ == "__main__":
    write()
