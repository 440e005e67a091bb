"""What a data verb is given: a recipe or data itself, settings, and the tokenizer to read it with."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mule.errors import DataError, ModelError, UserError
from mule.run import RUNS

if TYPE_CHECKING:
    from mule.config.schema import DataSection, Recipe
    from mule.data.sources import Item, Notice
    from mule.data.sources.options import ReadOptions
    from mule.tokenizer import Tokenizer

THROW_AWAY = "a throw-away tokenizer"
_OVERRIDE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*=")
_RECIPE_SUFFIXES = (".yaml", ".yml")
_THROW_AWAY_SIZE = 8192
_SAMPLE_CHARS = 2_000_000  # about a second of training
_MAX_SAMPLED_FILES = 64


@dataclass(frozen=True)
class Words:
    """The words after a data verb, sorted."""

    recipe_file: Path | None
    paths: list[str]
    overrides: list[str]


@dataclass(frozen=True)
class Inputs:
    """What a data verb works on.

    `paths` are the files to train on and `valid` those to validate on, if files are named for it;
    `recipe` is one of defaults and settings when data was given and not a recipe.
    """

    paths: list[Path]
    valid: list[Path]
    data: DataSection
    recipe: Recipe
    tokenizer: Tokenizer
    tokenizer_origin: str


def open_inputs(
    words: list[str], tokenizer: str | None = None, *, throw_away: bool = True
) -> Inputs:
    """Find the data and the tokenizer that `words` and `--tokenizer` name.

    Data without any tokenizer is read with one trained on its beginning, kept in memory only;
    with `throw_away` False that is a UserError.
    """
    from mule.data.prepare import valid_files
    from mule.data.sources import expand

    given = sort_words(words)
    recipe = recipe_of(given)
    data = recipe.data
    paths = expand(data.train)
    valid = expand(data.valid) if data.valid else valid_files(data.train)
    found, origin = _tokenizer(given, recipe, tokenizer, paths if throw_away else [])
    return Inputs(paths, valid, data, recipe, found, origin)


def sort_words(words: Sequence[str]) -> Words:
    """A recipe, data paths and `key=value` settings, in any order.

    Raises UserError for more than one recipe, or a recipe beside data.
    """
    from mule.config.presets import preset_file

    recipes: list[str] = []
    paths: list[str] = []
    overrides: list[str] = []
    for word in words:
        exists = Path(word).exists()
        if not exists and _OVERRIDE.match(word):
            overrides.append(word)
        elif word.endswith(_RECIPE_SUFFIXES) or (not exists and preset_file(word)):
            recipes.append(word)
        else:
            paths.append(word)
    if len(recipes) > 1:
        raise UserError(f"{' and '.join(recipes)}: two recipes", "give one recipe at a time")
    if recipes and paths:
        raise UserError(
            f"{recipes[0]} is a recipe and {paths[0]} is data: a recipe names its own data",
            f"leave out one of them, or replace its data: data.train={paths[0]}",
        )
    return Words(Path(recipes[0]) if recipes else None, paths, overrides)


def recipe_of(given: Words) -> Recipe:
    """The recipe, or one of defaults and settings whose data.train are the paths."""
    from mule.config.load import load_recipe

    if given.recipe_file:
        return load_recipe(given.recipe_file, given.overrides).recipe
    recipe = load_recipe(None, given.overrides, complete=False).recipe
    if given.paths and recipe.data.train:
        raise UserError(f"data.train is given beside {given.paths[0]}", "leave out one of the two")
    if not given.paths and not recipe.data.train:
        raise UserError("no data is given", "name files or folders, or a recipe: mule data --help")
    train = given.paths or recipe.data.train
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})


def data_paths(words: Sequence[str]) -> tuple[list[str], ReadOptions]:
    """Data paths and how to read them, for the verbs that take no recipe."""
    given = sort_words(words)
    if given.recipe_file:
        raise UserError(
            f"{given.recipe_file} is a recipe; this verb takes data",
            "name files or folders, and settings such as data.format=alpaca",
        )
    data = recipe_of(given).data
    return data.train, read_options(data)


def read_options(data: DataSection) -> ReadOptions:
    """How the files of a data section are to be read."""
    from mule.data.prepare import read_options as options_of

    return options_of(data)


# ---------------------------------------------------------------- the tokenizer


def load_tokenizer(name: str, runs: Path = RUNS) -> Tokenizer:
    """The tokenizer of a run, a model folder, a tokenizer.json or a model of the hub."""
    from mule.models.hub import fetch_model, hub_repo
    from mule.tokenizer import Tokenizer

    if name.endswith(".gguf"):
        raise ModelError(
            f"{name}: the tokenizer of a GGUF file is not read here",
            "name the run or the model folder the file was made from",
        )
    for path in (Path(name), runs / name):
        if (path / "tokenizer" / "tokenizer.json").is_file():  # a run
            return Tokenizer.load(path / "tokenizer")
        if path.exists():
            return Tokenizer.load(path)
    if repo := hub_repo(name):
        return Tokenizer.load(fetch_model(name, repo, weights=False))
    known = ", ".join(sorted(file.parent.name for file in runs.glob("*/recipe.yaml")))
    raise ModelError(
        f"{name}: no tokenizer.json, run or model folder of this name",
        f"runs here: {known}" if known else "give a path to a folder with tokenizer.json in it",
    )


def _tokenizer(
    given: Words, recipe: Recipe, name: str | None, paths: list[Path]
) -> tuple[Tokenizer, str]:
    """The tokenizer and its origin; of no origin at all, one trained on `paths`."""
    if name is not None:
        return load_tokenizer(name), f"the tokenizer of {name}"
    own, base = recipe.tokenizer, recipe.model.path
    if given.recipe_file or own.path or base or own.vocab_size:
        return _recipe_tokenizer(recipe)
    if not paths:
        words = shlex.join([*given.paths, *given.overrides])
        raise UserError(
            "no tokenizer: what is prepared must be tokenized as the model that trains on it does",
            f"mule data prepare {words} --tokenizer MODEL_FOLDER; or, for a new model, train one "
            f"on this data: mule data prepare {words} tokenizer.vocab_size=16384",
        )
    return throw_away_tokenizer(paths, read_options(recipe.data))


def _recipe_tokenizer(recipe: Recipe) -> tuple[Tokenizer, str]:
    from mule.train.assemble import find_tokenizer
    from mule.train.base import base_folder

    found = find_tokenizer(recipe, base_folder(recipe, weights=False))
    if recipe.tokenizer.path:
        return found, f"tokenizer.path = {recipe.tokenizer.path}"
    if recipe.model.path:
        return found, f"the tokenizer of {recipe.model.path}"
    return found, f"trained on data.train, tokenizer.vocab_size = {recipe.tokenizer.vocab_size:,}"


def throw_away_tokenizer(paths: list[Path], options: ReadOptions) -> tuple[Tokenizer, str]:
    """A small tokenizer of the data's own, good enough to look at it."""
    from mule import progress
    from mule.tokenizer import Tokenizer

    with progress.task("Training a throw-away tokenizer"), progress.using(progress.Silence()):
        tokenizer = Tokenizer.train(_sample(paths, options), _THROW_AWAY_SIZE)
    origin = (
        f"{THROW_AWAY} of {tokenizer.vocab_size:,} tokens in ChatML, trained on the beginning of "
        "this data, so counts are estimates; for real ones add --tokenizer MODEL_FOLDER"
    )
    return tokenizer, origin


def _sample(paths: list[Path], options: ReadOptions) -> Iterator[str]:
    """The beginning of the data, from each file alike; rows that cannot be read are passed over."""
    from mule.data.sources import scan

    files = paths[:: -(-len(paths) // _MAX_SAMPLED_FILES)]
    for file in files:
        left = _SAMPLE_CHARS // len(files)
        for item in scan(file, options):
            for text in _texts(item):
                yield text[:left]
                left = max(0, left - len(text))
            if left == 0:
                break


def _texts(item: Item | DataError | Notice) -> list[str]:
    from mule.data.sources import Conversation, Document, Preference

    if isinstance(item, Document):
        return [item.text]
    if isinstance(item, Conversation):
        return [message.content for message in item.messages]
    if isinstance(item, Preference):
        return [m.content for part in (item.prompt, item.chosen, item.rejected) for m in part]
    return []
