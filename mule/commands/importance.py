"""`mule export --imatrix`: which texts an importance matrix is computed on, or which file has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.export.imatrix_file import ImportanceMatrix

OWN_ROWS = "own"  # --imatrix without a file
_FEWEST_TEXTS = 8
_FILE_HINT = "give texts or chats of the kind it will see: --imatrix FILE.jsonl"


def importance_for(
    given: str, model_dir: Path, lineage: dict[str, Any], probe: dict[str, Any] | None
) -> ImportanceMatrix:
    """The matrix of the model in `model_dir`, on the rows that `given` names.

    `given` is OWN_ROWS, a file of texts or chats, or a matrix that was written before.
    """
    from mule.export.imatrix import importance_of
    from mule.export.imatrix_file import read_imatrix

    if given.endswith(".gguf"):
        return read_imatrix(Path(given))
    if given != OWN_ROWS:
        texts, chats = _texts_of(Path(given), model_dir)
        return importance_of(model_dir, texts, Path(given).name, special=chats)
    texts, what = _own_texts(model_dir, lineage, probe)
    chats = bool(probe and probe.get("rendered"))
    return importance_of(model_dir, texts, f"{what} of {Path(lineage['run']).name}", special=chats)


def _texts_of(file: Path, model_dir: Path) -> tuple[list[str], bool]:
    """The texts of a data file, chats as they are trained; and whether it has chats."""
    from mule.data.probe import as_trained
    from mule.data.sources import Document, read
    from mule.tokenizer import Tokenizer

    if not file.is_file():
        raise UserError(f"--imatrix {file}: no such file", _FILE_HINT)
    tokenizer = Tokenizer.load(model_dir)
    items = list(read([file]))
    texts = [as_trained(item, tokenizer) for item in items]
    return texts, not all(isinstance(item, Document) for item in items)


def _own_texts(
    model_dir: Path, lineage: dict[str, Any], probe: dict[str, Any] | None
) -> tuple[list[str], str]:
    """Held-out rows of the run, none that `mule verify` compares on; training rows if too few."""
    from mule import progress
    from mule.config.load import load_recipe
    from mule.data.probe import further_texts
    from mule.tokenizer import Tokenizer

    file = Path(lineage.get("run", "")) / "resolved.yaml"
    if not file.is_file():
        raise UserError(
            f"{model_dir} comes from no run that is here, so it has no held-out rows", _FILE_HINT
        )
    recipe = load_recipe(file, []).recipe
    tokenizer, known = Tokenizer.load(model_dir), set(probe["texts"] if probe else ())
    data, seed = recipe.data, recipe.train.seed
    try:
        texts = further_texts(data, seed, tokenizer, known, trained=False)
    except UserError as error:
        raise UserError(
            f"the data of {file.parent} cannot be read: {error.message}", _FILE_HINT
        ) from None
    if len(texts) >= _FEWEST_TEXTS:
        return texts, "held-out rows"
    progress.note(
        f"beside the rows that `mule verify` compares on, {len(texts)} are held out: the importance "
        "matrix is computed on training rows"
    )
    return further_texts(data, seed, tokenizer, known, trained=True), "training rows"
