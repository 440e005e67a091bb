"""`mule eval`: loss, perplexity and bits per byte on held-out data."""

from __future__ import annotations

import math
from typing import Any


def run(
    source: str, *, data: list[str] | None = None, max_rows: int | None = None
) -> dict[str, Any]:
    """Measure `source` on `data`, or on the validation rows of the run it came from."""
    import tempfile
    from pathlib import Path

    from mule.adapters.source import find_source, load_source
    from mule.commands.lineage import lineage_of
    from mule.config.load import load_recipe
    from mule.config.schema import DataSection
    from mule.data.loader import ValidSet
    from mule.data.prepare import prepare_pair
    from mule.errors import UserError
    from mule.evaluate.loss import held_out_loss

    found = find_source(source)
    model, tokenizer = load_source(found)
    with tempfile.TemporaryDirectory() as scratch:
        if data is not None:
            section = DataSection(
                train=data, valid=data, max_seq_length=model.config.max_position_embeddings
            )
            seed = 0
        else:
            folder = lineage_of(found).get("run")
            if folder is None:
                raise UserError(
                    f"{source} does not come from a run, so it has no validation rows",
                    "name the data: mule eval MODEL --data FILE",
                )
            recipe = load_recipe(Path(folder) / "resolved.yaml", []).recipe
            section, seed = recipe.data, recipe.train.seed
        _, shards = prepare_pair(section, tokenizer, seed=seed, root=Path(scratch))
        if shards is None:
            raise UserError(
                f"{source} was trained without validation rows", "name some: --data FILE"
            )
        rows = min(max_rows or shards.num_rows, shards.num_rows)
        valid = ValidSet(shards, 4, rows)
        found_loss = held_out_loss(model, valid)
        num_bytes = sum(
            len(tokenizer.decode(batch.targets[batch.targets >= 0].tolist()).encode())
            for batch in valid
        )
    bits = found_loss.loss * found_loss.num_targets / math.log(2)
    return {
        "model": source,
        "loss": found_loss.loss,
        "perplexity": found_loss.perplexity,
        "bits_per_byte": bits / max(num_bytes, 1),
        "num_targets": found_loss.num_targets,
        "rows": rows,
    }
