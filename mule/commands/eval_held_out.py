"""The held-out rows of `mule eval`: found once, and the same for every model that can read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import progress
from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.data.shards import Shards
    from mule.evaluate.comparison import Compared
    from mule.evaluate.held_out import RowLosses
    from mule.evaluate.loss import HeldOutLoss
    from mule.evaluate.subject import Subject
    from mule.tokenizer import Tokenizer


@contextlib.contextmanager
def shared_rows(
    subjects: Sequence[Subject], data: Sequence[str] | None, where: str
) -> Iterator[HeldOut | None]:
    """The rows, until the block ends; None where none are asked for, or `any` has found none.

    They are made by the tokenizer of the first model that has one and, without `data`, a run.
    """
    import tempfile

    if where == "none":
        yield None
        return
    owner = _owner(subjects, data)
    if owner is None:
        if where != "any":
            raise _no_rows(subjects[-1].name, data)
        progress.note(
            "no held-out rows: none of the models is of a run here; --data FILE gives some"
        )
        yield None
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield HeldOut(subjects, owner, data, Path(scratch))


class HeldOut:
    """The rows for each tokenizer among the models, and what was measured on them."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        owner: Source,
        data: Sequence[str] | None,
        scratch: Path,
    ) -> None:
        from mule.tokenizer import Tokenizer

        self._data, self._scratch, self._owner = data, scratch, owner
        self._length = _shortest_context(subjects)
        self.tokenizer = Tokenizer.load(owner.tokenizer_dir)
        self.shards = self._prepared(self.tokenizer)
        self._found: dict[str, RowLosses] = {}
        self._shares_rows: dict[str, bool] = {}

    def measure(self, subject: Subject, max_rows: int | None) -> None:
        """The loss of one model; with a vocabulary of its own, on rows of its own."""
        from mule.evaluate.held_out import row_losses
        from mule.tokenizer import Tokenizer

        shards, tokenizer, same = self.shards, self.tokenizer, True
        if subject.source.gguf_file is None:
            own = Tokenizer.load(subject.source.tokenizer_dir)
            same = own.vocabulary_fingerprint() == tokenizer.vocabulary_fingerprint()
            if not same:
                shards, tokenizer = self._prepared(own), own
        self._found[subject.name] = row_losses(subject, shards, tokenizer, max_rows)
        self._shares_rows[subject.name] = same

    def figures(self, named: str) -> dict[str, Any]:
        """Those of one model, and a row of each in `held_out`."""
        found = self._found[named]
        one = self._row(named)
        del one["model"], one["same_rows"]
        one["rows"] = len(found.by_row.counts)
        one["sources"] = _table("source", found.by_label.by_source(found.labels))
        one["categories"] = _table("category", found.by_label.by_category(found.labels))
        return one | {"held_out": [self._row(name) for name in self._found]}

    def compared(self) -> list[Compared]:
        """Each model against the first, where both were measured on the same rows."""
        from mule.evaluate.comparison import paired

        first, *others = self._found
        one = self._found[first].by_row
        return [
            paired(
                "held-out",
                "loss",
                (first, name),
                (one.nll, self._found[name].by_row.nll),
                one.counts,
            )
            for name in others
            if self._shares_rows[first]
            and self._shares_rows[name]
            and list(one.counts) == list(self._found[name].by_row.counts)
        ]

    def _row(self, name: str) -> dict[str, Any]:
        found = self._found[name]
        return {
            "model": name,
            "loss": found.by_row.loss,
            "perplexity": found.by_row.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "num_targets": found.by_row.num_targets,
            "same_rows": self._shares_rows[name],
        }

    def _prepared(self, tokenizer: Tokenizer) -> Shards:
        from mule.data.prepare import RowSettings, prepare
        from mule.data.sources.options import ReadOptions

        if self._data is None:
            return _run_rows(self._owner, tokenizer)
        settings = RowSettings(ReadOptions(), self._length)
        return prepare(list(self._data), tokenizer, settings, out_dir=self._scratch, valid=True)


def _owner(subjects: Sequence[Subject], data: Sequence[str] | None) -> Source | None:
    """The model whose rows and tokenizer are taken; of a run's rows the last one has the say."""
    from mule.commands.lineage import lineage_of

    own = [subject.source for subject in subjects if subject.source.gguf_file is None]
    if data is not None:
        return next(iter(own), None)
    return next((source for source in reversed(own) if "run" in lineage_of(source)), None)


def _no_rows(name: str, data: Sequence[str] | None) -> UserError:
    if data is not None:
        return UserError(
            f"{name}: a GGUF file, whose tokenizer cannot mark the answers of your data",
            "name the run or folder it was written from too: mule eval RUN FILE.gguf --data FILE",
        )
    return UserError(
        f"{name} comes from no run, so it has no validation rows",
        "name the data: mule eval MODEL --data FILE; or a task: --task general",
    )


def _shortest_context(subjects: Sequence[Subject]) -> int:
    from mule.evaluate.subject import CONTEXT_TOKENS
    from mule.models.folder import read_config

    folders = [subject.source.model_dir for subject in subjects]
    lengths = [read_config(f).max_position_embeddings for f in folders if f is not None]
    return min([CONTEXT_TOKENS, *lengths])


def _run_rows(source: Source, tokenizer: Tokenizer) -> Shards:
    """The validation rows of the run that a model came from."""
    from mule.commands.lineage import lineage_of
    from mule.config.load import load_recipe
    from mule.data.recipe_rows import prepared_rows

    folder = Path(lineage_of(source)["run"])
    recipe = load_recipe(folder / "resolved.yaml", []).recipe
    _, held_out = prepared_rows(recipe.data, recipe.train.seed, tokenizer, folder.parent)
    if held_out is None:
        raise UserError(
            f"{source.name} was trained without validation rows",
            "name the data: mule eval MODEL --data FILE; or a task: --task general",
        )
    return held_out


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
