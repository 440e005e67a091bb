"""What the runs of a campaign share, made once: held-out files, tokenizer, rows, decisions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio, progress
from mule.config.campaign import Campaign
from mule.config.dump import with_values
from mule.config.schema import Recipe
from mule.data.hold_out import decide_split, sides
from mule.data.labels import files_by_source
from mule.data.prepare import RowSettings, prepare, read_options, tell_overlap
from mule.data.recipe_rows import prepared_rows
from mule.data.shards import Shards
from mule.data.sources import read
from mule.data.sources.items import Document
from mule.errors import CheckFailed, DataError
from mule.lab.campaign import Folder
from mule.plan.resolve import Resolved, resolve
from mule.tokenizer import Tokenizer
from mule.train.assemble import find_tokenizer, machine_facts

_PARTS = ("train", "valid", "test")
_SPLIT_SEED = 0  # what is held out does not depend on the seeds of the runs
_LENGTHS = ("steps", "epochs", "tokens", "step_rows", "step_tokens", "step_examples")
_OF_MACHINE = ("device", "threads", "precision", "compile", "activation_checkpointing")


@dataclass(frozen=True)
class Shared:
    """The rows that all runs read, and the recipe's sections with them in place."""

    recipe: Recipe
    test_files: list[str]
    tokenizer: Tokenizer
    train: Shards
    valid: Shards
    test: Shards

    def facts(self) -> dict[str, Any]:
        """As campaign.json has them; the folders' names are sums of their content."""
        parts = {name: getattr(self, name) for name in _PARTS}
        return {
            "tokenizer": self.tokenizer.fingerprint(),
            "vocab_size": self.tokenizer.vocab_size,
            "data": {
                name: {
                    "folder": shards.folder.name,
                    "tokens": shards.num_tokens,
                    "rows": shards.num_rows,
                    "documents": shards.num_examples,
                }
                for name, shards in parts.items()
            },
        }


def prepare_shared(campaign: Campaign, folder: Folder) -> Shared:
    """Held-out files, the tokenizer and the rows of a campaign, found again where they were made.

    Raises CheckFailed where the data has not the tokens that the campaign expects.
    """
    recipe, test_files = _with_files(campaign, folder)
    tokenizer = _tokenizer(recipe, folder)
    train, valid = prepared_rows(recipe.data, 0, tokenizer, folder.runs)
    assert valid is not None, "the campaign names its validation files"
    settings = RowSettings.of(recipe.data)
    test = prepare(test_files, tokenizer, settings, out_dir=folder.runs / ".prepared", valid=True)
    tell_overlap(train, test, "test")
    shared = Shared(recipe, test_files, tokenizer, train, valid, test)
    _check_tokens(campaign, shared)
    return shared


def decide(shared: Shared, baseline: Recipe, *, machine: bool) -> dict[str, Any]:
    """What every run's recipe is given, by dotted key, so that "auto" cannot differ between runs.

    It is what the baseline's recipe resolves to; with `machine` what follows from this machine too
    (precision, device, threads): where runs are made elsewhere, or share it among several
    processes, each run finds that itself.
    """
    from mule.plan.shape import new_model_config

    config = new_model_config(baseline, shared.tokenizer.vocab_size)
    resolved: Resolved = resolve(baseline, config, machine_facts(shared.train, baseline.train))
    train, optim = resolved.recipe.train, resolved.recipe.optim
    pinned: dict[str, Any] = {f"train.{key}": None for key in _LENGTHS}
    pinned |= {
        "train.steps": resolved.num_steps,
        "train.step_rows": resolved.step_rows,
        "train.micro_batch_rows": train.micro_batch_rows,
        "optim.learning_rate": optim.learning_rate,
        "optim.warmup_steps": optim.warmup_steps,
        "evaluate.every_steps": resolved.recipe.evaluate.every_steps,
        "checkpoint.every_steps": resolved.recipe.checkpoint.every_steps,
    }
    if machine:
        pinned |= {f"train.{key}": getattr(train, key) for key in _OF_MACHINE}
    return pinned


# ---------------------------------------------------------------- data


def _with_files(campaign: Campaign, folder: Folder) -> tuple[Recipe, list[str]]:
    """The shared sections with files in place of shares, and the files of the test set."""
    shared, held_out = campaign.shared, campaign.plan.data
    if held_out.test:
        return shared, held_out.test
    parts = _split(campaign, folder)
    values = {
        "data.train": [str(parts["train"])],
        "data.valid": [str(parts["valid"])],
        "data.format": "text_rows",
    }
    of_the_sources = ("data.valid_share", "data.wikitext", "data.columns")
    return with_values(shared, values, without=of_the_sources), [str(parts["test"])]


def _split(campaign: Campaign, folder: Folder) -> dict[str, Path]:
    """Folders of one file a source: what is trained on, and the shares that are kept apart.

    Of each source in data.train whole documents are kept apart while they fit, and the tail of the
    next; the choice is one of the content alone.
    """
    data, shares = campaign.shared.data, campaign.plan.data
    root = folder.path / "data"
    asked = [data.model_dump(mode="json"), shares.test_share]
    sums = {str(f): fsio.sha256_file(f) for f in files_by_source(data.train)}
    key = fsio.sha256_json([asked, sums])
    made = root / "made.json"
    if not (made.is_file() and fsio.read_json(made).get("key") == key):
        with fsio.atomic_folder(root) as work:
            _write_split(campaign, work)
            fsio.write_json(work / "made.json", {"key": key, "files": sums})
    return {part: root / part for part in _PARTS}


def _write_split(campaign: Campaign, work: Path) -> None:
    data, options = campaign.shared.data, read_options(campaign.shared.data)
    sources: dict[str, list[Path]] = {}
    for file, source in files_by_source(data.train).items():
        sources.setdefault(source, []).append(file)
    assert not isinstance(data.valid_share, str)
    shares = {"valid": float(data.valid_share), "test": campaign.plan.data.test_share}
    for part in _PARTS:
        (work / part).mkdir(parents=True)
    with progress.task("Keeping test and validation apart", total=len(sources)) as bar:
        for source, files in sources.items():
            rest = [item for item in read(files, options)]
            for item in rest:
                if not isinstance(item, Document):
                    raise DataError(
                        item.file,
                        item.line,
                        "a chat; shares of chats cannot be kept apart in a campaign",
                        "give data.valid and data.test as files: mule data split makes them",
                    )
            for part, share in shares.items():
                split = decide_split(lambda rest=rest: rest, share, _SPLIT_SEED)
                cut = list(sides(rest, split))
                _write_rows(work / part / f"{source}.jsonl", [d for side, d in cut if side])
                rest = [d for side, d in cut if not side]
            _write_rows(work / "train" / f"{source}.jsonl", rest)
            bar.advance(1)


def _write_rows(file: Path, documents: list[Any]) -> None:
    """One document a row."""
    rows, text = [], ""
    for document in documents:
        text += document.text
        if document.ends:
            rows.append(json.dumps({"text": text}, ensure_ascii=False))
            text = ""
    fsio.write_text(file, "".join(f"{row}\n" for row in rows))


def _tokenizer(recipe: Recipe, folder: Folder) -> Tokenizer:
    """The campaign's tokenizer, kept in its folder."""
    if (folder.tokenizer / "tokenizer.json").is_file():
        return Tokenizer.load(folder.tokenizer)
    tokenizer = find_tokenizer(recipe, None)
    with fsio.atomic_folder(folder.tokenizer) as work:
        tokenizer.save(work)
    return tokenizer


def _check_tokens(campaign: Campaign, shared: Shared) -> None:
    for part in _PARTS:
        expected = getattr(campaign.plan.expect_tokens, part)
        found = _text_tokens(getattr(shared, part), shared.tokenizer)
        if expected is not None and found != expected:
            raise CheckFailed(
                f"data.{part} has {found:,} tokens, and expect_tokens.{part} says {expected:,}",
                "look for other files, another tokenizer, or data.wikitext=clean where the text is "
                f"meant as published; or take expect_tokens.{part} out of the campaign",
            )


def _text_tokens(shards: Shards, tokenizer: Tokenizer) -> int:
    """Tokens as others count them: without the marks that documents get here."""
    marks = 1 + (tokenizer.bos_id is not None)
    return shards.num_tokens - (marks * shards.num_examples if shards.kind == "text" else 0)
