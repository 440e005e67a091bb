"""`mule convert`: a PyTorch checkpoint of one's own becomes a model folder, proven equal."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio, progress
from mule.errors import ConfigError, ModelError, UserError

if TYPE_CHECKING:
    from mule.models.config import ModelConfig
    from mule.models.foreign import Foreign
    from mule.models.pickled import Unpickled
    from mule.tokenizer import Tokenizer

_UNSEEN = ("rope_theta", "max_position_embeddings")  # no tensor has these dimensions
_NOT_OF_A_SIZE = {"vocab_size", "family", "tie_embeddings"}  # a named size does not say them


@dataclass(frozen=True)
class Shape:
    """Where the model's shape comes from: config.json, another model or recipe, or settings."""

    config: Path | None = None
    like: str | None = None
    settings: tuple[str, ...] = ()


def run(
    file: Path,
    out: Path,
    *,
    key: str | None = None,
    shape: Shape | None = None,
    tokenizer: Path | None = None,
    dtype: str = "auto",
) -> dict[str, Any]:
    """Convert `file` into the model folder `out`; the report with what was compared.

    Nothing is written unless every weight read back from the folder equals the file's.
    """
    from mule.models.foreign import fit, read_names
    from mule.models.pickled import unpickle

    shape = shape or Shape()
    _check(file, out, shape)
    words = _load_tokenizer(tokenizer)
    fsio.require_space(out.parent, 3 * file.stat().st_size, "a conversion")
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress.task("Converting", total=4, unit="stages") as bar,
        tempfile.TemporaryDirectory(prefix=".partial-convert-", dir=out.parent) as temporary,
    ):
        found = unpickle(file, Path(temporary) / "tensors.safetensors", key)
        bar.advance()
        try:
            foreign = read_names(found)
            config, told = _shape(file, shape, foreign)
            parts = fit(foreign, config)
        except ModelError as error:
            raise ModelError(f"{file}: {error.message}", error.hint) from None
        if words is not None and words.vocab_size > config.vocab_size:
            raise UserError(
                f"{tokenizer}: {words.vocab_size:,} tokens, the model has {config.vocab_size:,}",
                "give the tokenizer that the model was trained with",
            )
        report = _write(out, _Model(found, parts, config, words), dtype, bar)
    left_out = found.left_out | dict.fromkeys(foreign.not_needed, "not a weight")
    return (
        {"folder": str(out), "state_dict": found.key or "(top level)", "shape_from": told}
        | report
        | {"tokenizer": str(tokenizer) if tokenizer else None, "left_out": left_out}
        | {"next": _next(out, words)}
    )


@dataclass(frozen=True)
class _Model:
    found: Unpickled
    parts: dict[str, Any]
    config: ModelConfig
    tokenizer: Tokenizer | None


def _check(file: Path, out: Path, shape: Shape) -> None:
    if not file.is_file():
        raise UserError(f"{file}: no such file", "give a checkpoint, such as model.pt")
    if file.suffix == ".safetensors":
        raise UserError(
            f"{file}: already safetensors; nothing has to be converted",
            "put it as model.safetensors into a folder with its config.json",
        )
    if out.exists() and not (out / fsio.MANIFEST).exists():
        raise UserError(f"{out} exists and is not a folder of Mule's", "choose another --out")
    if shape.config and (shape.like or shape.settings):
        raise UserError(
            f"--config {shape.config} says the whole shape; --like and settings cannot take effect",
            "give one of them",
        )


def _load_tokenizer(folder: Path | None) -> Tokenizer | None:
    if folder is None:
        return None
    from mule.tokenizer import Tokenizer

    return Tokenizer.load(folder)


def _write(out: Path, model: _Model, dtype: str, bar: progress.Task) -> dict[str, Any]:
    from mule.models import conversion, cost
    from mule.models.folder import save_model
    from mule.train.checkpoint import token_ids

    if dtype == "auto":
        chosen = conversion.narrowest_dtype(model.found, model.parts)
    elif dtype in conversion.DTYPES:
        chosen = conversion.DTYPES[dtype]
    else:
        raise UserError(
            f"--dtype {dtype}: no such type", f"choose auto, {', '.join(conversion.DTYPES)}"
        )
    with fsio.atomic_folder(out) as folder:
        extra = token_ids(model.tokenizer) if model.tokenizer else None
        weights = conversion.converted(model.found, model.parts, chosen)
        bar.advance()
        save_model(weights, model.config, folder, extra=extra)
        if model.tokenizer is not None:
            model.tokenizer.save(folder)
        weights.clear()
        bar.advance()
        proof = conversion.proven(folder, model.found, model.parts, chosen)
        bar.advance()
    return {
        "family": model.config.family,
        "parameters": cost.total_params(model.config),
        "dtype": str(chosen).removeprefix("torch."),
        "weights": len(model.parts),
        **proof.as_dict(),
    }


def _next(out: Path, tokenizer: Tokenizer | None) -> str:
    if tokenizer is not None:
        return f"mule {'chat' if tokenizer.chat_template else 'export'} {out}"
    progress.note(
        f"{out} has no tokenizer, so it cannot chat or be exported; convert again with "
        "--tokenizer FOLDER, the tokenizer the model was trained with",
        "warning",
    )
    return f"mule train RECIPE model.path={out} tokenizer.path=FOLDER"


# ---------------------------------------------------------------- the shape


def _shape(file: Path, shape: Shape, foreign: Foreign) -> tuple[ModelConfig, str]:
    """The config, and where it came from."""
    from mule.config.load import load_recipe

    if shape.config is not None:
        return _read_config(shape.config), str(shape.config)
    beside = file.parent / "config.json"
    if shape.like is None and not shape.settings and beside.is_file():
        return _read_config(beside), str(beside)
    if shape.like is not None and Path(shape.like).is_dir():
        return _like_folder(shape.like, shape.settings), shape.like
    recipe = load_recipe(shape.like, list(shape.settings), complete=False).recipe
    given = {name: getattr(recipe.model, name) for name in recipe.model.given()}
    if "max_seq_length" in recipe.data.given():
        given.setdefault("max_position_embeddings", recipe.data.max_seq_length)
    config = _from_settings(given, foreign)
    like = [shape.like] if shape.like else []
    unseen = [name for name in _UNSEEN if name not in given]
    taken = ", ".join(f"model.{name}={getattr(config, name)}" for name in unseen)
    if taken:
        progress.note(
            f"weights do not tell these, and usual values were taken: {taken}, and a norm_eps of "
            f"{config.norm_eps}; give what the model was trained with, or its config: --config FILE",
            "warning",
        )
    return config, " and ".join(["the tensors", *like, *shape.settings])


def _like_folder(like: str, settings: tuple[str, ...]) -> ModelConfig:
    from mule.adapters.source import find_source
    from mule.models.folder import read_config

    if settings:
        raise ConfigError(
            [f"{settings[0]} cannot take effect: --like {like} says the whole shape"],
            "give one of them",
        )
    folder = find_source(like).model_dir
    assert folder is not None  # a folder is never a GGUF file
    return read_config(folder)


def _from_settings(given: dict[str, Any], foreign: Foreign) -> ModelConfig:
    """The config from settings of the recipe's model section; what they leave out, the tensors say.

    A named size is not filled up, so that a model of another size is seen to be one.
    """
    from mule.config.load import load_recipe
    from mule.models.foreign import inferred, inferred_heads, query_rows
    from mule.plan.shape import new_model_config

    if "path" in given:
        raise ConfigError(
            [f"model.path = {given['path']} says nothing of this checkpoint"],
            f"to take its shape: --like {given['path']}",
        )
    known = inferred(foreign)
    if "size" in given:
        known = {name: known[name] for name in _NOT_OF_A_SIZE & known.keys()}
    known |= given
    if "size" not in given:
        known = inferred_heads(foreign, known) | known
    if "size" not in given and "num_heads" not in known:
        raise ModelError(
            "the tensors do not tell how many attention heads there are",
            f"add model.num_heads=N or model.head_dim=N (their product is {query_rows(foreign)}); "
            "or give the model's config.json: --config FILE",
        )
    words = [f"model.{name}={json.dumps(value)}" for name, value in known.items()]
    recipe = load_recipe(None, words, complete=False).recipe
    return new_model_config(recipe, recipe.model.vocab_size or 1)


def _read_config(file: Path) -> ModelConfig:
    """The config in a config.json, whatever quantisation it speaks of: that is undone here."""
    from mule.models.families import family

    raw = fsio.read_json(file)
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ModelError(
            f"{file}: no model_type, so not the config.json of a model",
            "give the right one: --config FILE; or the shape, as --like FOLDER or model.num_heads=8",
        )
    raw.pop("quantization_config", None)
    return family(raw["model_type"]).from_hf(raw)
