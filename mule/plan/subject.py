"""What a recipe trains, without torch or a download: a model's shape, a tokenizer to count with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mule import fsio
from mule.config.presets import MODELS, catalogue_file
from mule.config.schema import Recipe
from mule.errors import ConfigError, MuleError, UserError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.families import family
from mule.plan.shape import new_model_config

if TYPE_CHECKING:
    from mule.tokenizer import Tokenizer

_HUB_BYTES = 2  # a weight on the hub, in bf16


@dataclass(frozen=True)
class Base:
    """What model.path names: its shape, and its folder where it is on this disk.

    `download_bytes` are still to be fetched.
    """

    config: ModelConfig
    folder: Path | None
    origin: str
    download_bytes: int = 0


@dataclass(frozen=True)
class Words:
    """A tokenizer to count with; `is_own` says that the run has this very one."""

    tokenizer: Tokenizer
    is_own: bool
    origin: str
    is_to_be_trained: bool = False


def base_model(recipe: Recipe) -> Base | None:
    """The model to start from; None for a new one.

    Raises UserError that says what is missing of a hub model that was not fetched and is unknown here.
    """
    path = recipe.model.path
    if path is None:
        if recipe.adapter.kind != "none":
            raise ConfigError(
                [f"adapter.kind = {recipe.adapter.kind} needs a model to adapt"],
                "set model.path to a run or a model folder",
            )
        return None
    from mule.models.hub import hub_repo

    repo = hub_repo(path, recipe.model.revision)
    if repo is None:
        return _local(path)
    folder = repo.cached()
    if folder is not None and (folder / "config.json").is_file():
        return Base(_read(folder), folder, f"{repo.name} in the hub's cache")
    known = published_shape(repo.name)
    if known is None:
        raise UserError(
            f"{repo.name} was not fetched yet, and its shape does not come with Mule: its "
            "config.json and tokenizer are missing",
            f"fetch them (a few MB): hf download {repo.name} config.json tokenizer.json "
            "tokenizer_config.json; or name a folder that holds them: model.path=FOLDER",
        )
    size = _HUB_BYTES * cost.total_params(known)
    return Base(known, None, f"{repo.name} as published; not fetched yet", size)


def words_of(recipe: Recipe, base: Base | None, run: Path) -> Words | None:
    """The tokenizer of the run; one trained on a sample where it will be trained; None without one.

    `run` is the folder that the run will have, or has.
    """
    from mule.tokenizer import Tokenizer

    named = recipe.tokenizer.path
    kept = run / "tokenizer"
    if (kept / "tokenizer.json").is_file():
        return Words(Tokenizer.load(kept), True, f"that of {run}")
    if named is not None and Path(named).exists():
        return Words(Tokenizer.load(named), True, named)
    if named is None and base is not None and base.folder is not None:
        return Words(Tokenizer.load(base.folder), True, "the model's own")
    if recipe.tokenizer.vocab_size is None:
        return None
    from mule.plan.data_rows import sample_texts

    trained = Tokenizer.train(sample_texts(recipe.data), recipe.tokenizer.vocab_size)
    told = "trained on a sample of the texts, as the run will train one on all of them"
    return Words(trained, False, told, is_to_be_trained=True)


def model_config(recipe: Recipe, base: Base | None, words: Words | None) -> ModelConfig:
    """The shape that is trained."""
    if base is not None:
        return base.config
    size = words.tokenizer.vocab_size if words else None
    if words and words.is_to_be_trained:
        size = recipe.tokenizer.vocab_size
    if size is None and (size := recipe.model.vocab_size) is None:
        raise ConfigError(
            [
                "a new model needs a tokenizer: neither tokenizer.path nor tokenizer.vocab_size is "
                "set"
            ],
            "set tokenizer.vocab_size (for example 16384) to train one on data.train",
        )
    return new_model_config(recipe, size)


def smaller_models(config: ModelConfig) -> list[tuple[str, ModelConfig]]:
    """(hub id, shape) of the published models below this one's size, the largest first."""
    found = [(name, shape) for name, shape in _catalogue().items() if _below(shape, config)]
    return sorted(found, key=lambda item: -cost.total_params(item[1]))


def _below(shape: ModelConfig, config: ModelConfig) -> bool:
    return cost.total_params(shape) < 0.9 * cost.total_params(config)


def _local(path: str) -> Base:
    from mule.adapters.source import find_source

    source = find_source(path, weights=False)
    if source.model_dir is None or source.adapter_dir is not None:
        raise ConfigError(
            [f"model.path = {path} is an adapter or a GGUF file, not a model"],
            f"merge it first: mule merge {path}",
        )
    return Base(_read(source.model_dir), source.model_dir, str(source.model_dir))


def _read(folder: Path) -> ModelConfig:
    from mule.models.loadable import read_config

    return read_config(folder)


def published_shape(name: str) -> ModelConfig | None:
    """The shape of a hub model among those that come with Mule."""
    wanted = name.lower()
    return next((c for known, c in _catalogue().items() if known.lower() == wanted), None)


def _catalogue() -> dict[str, ModelConfig]:
    """Hub id -> shape, of recipes/models.json."""
    file = catalogue_file(MODELS)
    if file is None:
        return {}
    known = fsio.read_json(file)
    found = {}
    for entry in known.values():
        raw = known[entry["same_as"]] if "same_as" in entry else entry
        try:
            found[raw["model"]] = family(raw["config"]["model_type"]).from_hf(raw["config"])
        except MuleError:
            continue
    return found
