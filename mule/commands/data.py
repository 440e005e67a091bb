"""`mule data`: the rows of a recipe, and what of them is learned."""

from __future__ import annotations

from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.run import RUNS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mule.config.schema import Recipe
    from mule.data.shards import Shards
    from mule.data.sources import Conversation, Document
    from mule.tokenizer import Tokenizer

_DOCUMENT_CHARS = 600  # shown of a document: enough to see how it is read


def prepare(recipe_file: Path | None, overrides: list[str], *, root: Path = RUNS) -> dict[str, Any]:
    """Make the rows of a recipe where `mule train` looks for them; their figures."""
    from mule.train.assemble import prepared_rows

    recipe, tokenizer = _open(recipe_file, overrides)
    train, valid = prepared_rows(recipe, tokenizer, root)
    return {
        "kind": train.kind,
        "vocab_size": tokenizer.vocab_size,
        **_figures(train),
        "valid": _figures(valid) if valid else {},
        "next": _command("train", recipe_file, overrides),
    }


def preview(recipe_file: Path | None, overrides: list[str], *, rows: int = 3) -> dict[str, Any]:
    """The first examples of a recipe's data as the model reads them.

    Each is a list of pieces, text that is trained or not; together they are the whole sequence.
    Raises DataError for an example that training would refuse.
    """
    from mule.data.sources import Document, read

    recipe, tokenizer = _open(recipe_file, overrides)
    data = recipe.data
    examples: list[dict[str, Any]] = []
    for item in islice(read(data.train, data.format), rows):
        if isinstance(item, Document):
            examples.append(_document(tokenizer, item))
        else:
            examples += _conversation(tokenizer, item, data.max_seq_length)
    return {
        "vocab_size": tokenizer.vocab_size,
        "max_seq_length": data.max_seq_length,
        "too_long": data.too_long,
        "examples": examples,
        "next": _command("data prepare", recipe_file, overrides),
    }


def _open(recipe_file: Path | None, overrides: list[str]) -> tuple[Recipe, Tokenizer]:
    from mule.config.load import load_recipe
    from mule.train.assemble import base_folder, find_tokenizer

    recipe = load_recipe(recipe_file, overrides).recipe
    return recipe, find_tokenizer(recipe, base_folder(recipe))


def _figures(shards: Shards) -> dict[str, Any]:
    """What `mule data prepare` says of one part; `fill` is the share of positions with a token."""
    return {
        "rows": shards.num_rows,
        "row_length": shards.row_length,
        "examples": shards.num_examples,
        "tokens": shards.num_tokens,
        "targets": shards.num_targets,
        "fill": shards.fill,
        "dropped": shards.index["num_dropped"],
        "truncated": shards.index["num_truncated"],
        "folder": str(shards.folder),
    }


def _conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_seq_length: int
) -> Iterator[dict[str, Any]]:
    """Its examples: one, unless the chat template rewrites earlier turns."""
    from mule.data.chat import render_examples
    from mule.data.contract import check_example

    for example in render_examples(tokenizer, [conversation])[0]:
        check_example(tokenizer, conversation, example)
        yield {
            "file": conversation.file,
            "line": conversation.line,
            "tokens": len(example.ids),
            "trained": int(example.trained.sum()),
            "fits": len(example.ids) - 1 <= max_seq_length,  # the last token is no input
            "cut": False,
            "pieces": _pieces(tokenizer, example.ids.tolist(), example.trained.tolist()),
        }


def _document(tokenizer: Tokenizer, document: Document) -> dict[str, Any]:
    """The beginning of a document: every token but the first is trained."""
    text = document.text[:_DOCUMENT_CHARS]
    cut = len(text) < len(document.text)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = start + tokenizer.encode(text) + ([] if cut else [tokenizer.document_end_id])
    trained = [position > 0 for position in range(len(ids))]
    return {
        "file": document.file,
        "line": document.line,
        "tokens": len(ids),
        "trained": sum(trained),
        "fits": True,  # a document is cut into rows, whatever its length
        "cut": cut,
        "pieces": _pieces(tokenizer, ids, trained),
    }


def _pieces(
    tokenizer: Tokenizer, ids: Sequence[int], trained: Sequence[bool]
) -> list[dict[str, Any]]:
    """Neighbouring tokens that are all trained, or all not, as one text."""
    runs = groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
    return [
        {"text": tokenizer.decode([token_id for token_id, _ in run]), "trained": flag}
        for flag, run in runs
    ]


def _command(verb: str, recipe_file: Path | None, overrides: list[str]) -> str:
    """`mule VERB RECIPE key=value...`, quoted for a shell."""
    import shlex

    words = [*([str(recipe_file)] if recipe_file else []), *overrides]
    return shlex.join(["mule", *verb.split(), *words])
