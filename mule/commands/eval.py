"""`mule eval`: loss, perplexity and bits per byte on held-out data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.data.shards import Shards
    from mule.evaluate.loss import HeldOutLoss
    from mule.tokenizer import Tokenizer


_MAX_ROW_TOKENS = 2048  # a hub model's whole context would not fit in memory


def run(
    source: str,
    *,
    data: list[str] | None = None,
    max_rows: int | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Measure `source` on `data`, or on the validation rows of the run it came from."""
    import tempfile

    from mule.adapters.source import find_source, load_source
    from mule.data.loader import ValidSet
    from mule.data.prepare import RowSettings, prepare
    from mule.data.sources.options import ReadOptions
    from mule.evaluate.loss import counted, held_out_loss

    found = find_source(source, base=base)
    model, tokenizer = load_source(found)
    with tempfile.TemporaryDirectory() as scratch:
        if data is not None:
            length = min(model.config.max_position_embeddings, _MAX_ROW_TOKENS)
            settings = RowSettings(ReadOptions(), length)
            shards = prepare(data, tokenizer, settings, out_dir=scratch, valid=True)
        else:
            shards = _run_rows(found, tokenizer)
        rows = min(max_rows or shards.num_rows, shards.num_rows)
        valid = ValidSet(shards, 4, rows)
        with progress.task("Evaluating", total=rows, unit="rows") as bar:
            found_loss = held_out_loss(model, counted(valid, bar), len(valid.labels))
        num_bytes = sum(
            len(tokenizer.decode(batch.targets[batch.targets >= 0].tolist()).encode())
            for batch, _ in valid
        )
    bits = found_loss.loss * found_loss.num_targets / math.log(2)
    return {
        "model": source,
        "loss": found_loss.loss,
        "perplexity": found_loss.perplexity,
        "bits_per_byte": bits / max(num_bytes, 1),
        "num_targets": found_loss.num_targets,
        "rows": rows,
        "sources": _table("source", found_loss.by_source(valid.labels)),
        "categories": _table("category", found_loss.by_category(valid.labels)),
    }


def _table(what: str, parts: dict[str, HeldOutLoss]) -> list[dict[str, Any]]:
    return [
        {
            what: name,
            "loss": part.loss,
            "perplexity": part.perplexity,
            "num_targets": part.num_targets,
        }
        for name, part in parts.items()
    ]


def _run_rows(source: Source, tokenizer: Tokenizer) -> Shards:
    """The validation rows of the run that a model came from."""
    from mule.commands.lineage import lineage_of
    from mule.config.load import load_recipe
    from mule.data.recipe_rows import prepared_rows

    hint = "name the data: mule eval MODEL --data FILE"
    folder = lineage_of(source).get("run")
    if folder is None:
        raise UserError(f"{source.name} comes from no run, so it has no validation rows", hint)
    recipe = load_recipe(Path(folder) / "resolved.yaml", []).recipe
    _, held_out = prepared_rows(recipe.data, recipe.train.seed, tokenizer, Path(folder).parent)
    if held_out is None:
        raise UserError(f"{source.name} was trained without validation rows", hint)
    return held_out
