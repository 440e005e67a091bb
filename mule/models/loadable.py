"""Whether a model can be loaded, told from its file names and config.json, before any weight."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio
from mule.errors import ModelError
from mule.models.config import ModelConfig
from mule.models.families import family
from mule.models.pickled import PICKLE_SUFFIXES, convert_command

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODULE = "module.json"  # in place of config.json, where a campaign trained a module of the user's
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FOREIGN = {".h5": "TensorFlow", ".msgpack": "Flax", ".onnx": "ONNX", ".npz": "old MLX"}
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitnet": "BitNet",
    "fp8": "FP8",
    "mxfp4": "MXFP4",
}


@dataclass(frozen=True)
class Holdings:
    """What a model's folder or repository holds.

    `place` is what the user calls it, `bases` the models that its card or config says it was made
    from, `page` where more is told.
    """

    place: str
    names: Collection[str]
    bases: Sequence[str] = ()
    page: str = ""

    def with_suffix(self, *suffixes: str) -> list[str]:
        return sorted(name for name in self.names if Path(name).suffix.lower() in suffixes)

    def way_out(self) -> str:
        """The hint for weights that were quantised."""
        if self.bases:
            return f"use the model it was made from: {' or '.join(self.bases)}"
        told = f"; {self.page} should name it" if self.page else "; its README should name it"
        return f"use the unquantised model it was made from{told}"


def read_config(folder: Path | str) -> ModelConfig:
    """The model's shape from config.json; ModelError when it is missing or asks for the unknown."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        if (Path(folder) / MODULE).is_file():
            raise _of_your_own(Path(folder))
        raise ModelError(
            f"{folder}: not a model folder (no config.json)",
            "give a folder with config.json, tokenizer.json and model.safetensors",
        )
    raw = fsio.read_json(file)
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise ModelError(f"{file}: no model_type", "download the model again")
    if quantization(raw):
        check_config(holdings_of(folder), raw)
    return family(raw["model_type"]).from_hf(raw)


def _of_your_own(folder: Path) -> ModelError:
    module = fsio.read_json(folder / MODULE)
    return ModelError(
        f"{folder}: the weights of a module of your own, {module['file']}:{module['name']}, which Mule "
        "trains in a campaign and knows nothing else about",
        "use them in your own code: load_state_dict(weights, strict=False), with the weights that "
        f"safetensors.torch.load_file('{folder / WEIGHTS}') gives",
    )


def check_loadable(holdings: Holdings, raw: Mapping[str, Any] | None) -> None:
    """Raises ModelError with the way out, unless the files and config.json (`raw`) will do."""
    if raw is None:
        raise _without_config(holdings)
    check_config(holdings, raw)
    if WEIGHTS not in holdings.names and INDEX not in holdings.names:
        raise without_weights(holdings)
    check_tokenizer(holdings)


def check_config(holdings: Holdings, raw: Mapping[str, Any]) -> None:
    """Raises ModelError for quantised weights, an unknown model_type and an unknown feature of it."""
    if method := quantization(raw):
        named = raw.get("_name_or_path")
        if not holdings.bases and isinstance(named, str) and _HUB_NAME.fullmatch(named):
            bases = [named] if named != holdings.place.partition("@")[0] else []
            holdings = Holdings(holdings.place, holdings.names, bases, holdings.page)
        raise ModelError(
            f"{holdings.place}: its weights are quantised ({method}), so they cannot be trained, "
            "exported or merged into",
            f"{holdings.way_out()}; adapter.kind=qlora keeps it in 4 bits here",
        )
    if "model_type" not in raw:
        raise ModelError(
            f"{holdings.place}: its config.json names no model_type",
            "use a model in transformers' layout",
        )
    try:
        family(raw["model_type"]).from_hf(dict(raw))
    except ModelError as error:
        raise ModelError(f"{holdings.place}: {error.message}", error.hint) from None


def quantization(raw: Mapping[str, Any]) -> str | None:
    """By which method a config.json says that the weights are quantised."""
    settings = raw.get("quantization_config") or raw.get("compression_config")
    if isinstance(settings, Mapping):
        method = settings.get("quant_method")
        if method is None and any(key.startswith("load_in_") for key in settings):
            method = "bitsandbytes"  # as its early versions wrote it
        if method is not None:
            return _METHODS.get(str(method), str(method))
    return "MLX" if isinstance(raw.get("quantization") or settings, Mapping) else None


def check_tokenizer(holdings: Holdings) -> None:
    """Raises ModelError unless there is a tokenizer that Mule reads."""
    if any(all(name in holdings.names for name in files) for files in TOKENIZERS):
        return
    kind = "only a SentencePiece one (tokenizer.model)" if _has_spm(holdings) else "none"
    raise ModelError(
        f"{holdings.place}: of tokenizers it has {kind}; Mule reads tokenizer.json",
        "write one with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER), "
        "into a folder with the model's other files",
    )


def without_weights(holdings: Holdings) -> ModelError:
    """The error for a model whose weights are not in model.safetensors or its shards."""
    if holdings.with_suffix(".gguf"):
        return _only_gguf(holdings)
    pickles = holdings.with_suffix(*PICKLE_SUFFIXES)
    if pickles:
        return _only_pickled(holdings, pickles)
    for suffix, program in _FOREIGN.items():
        if found := holdings.with_suffix(suffix):
            return ModelError(
                f"{holdings.place}: its weights are for {program} ({found[0]})",
                "use a model with model.safetensors",
            )
    return ModelError(
        f"{holdings.place}: no {WEIGHTS} and no {INDEX}", "use a model with safetensors weights"
    )


def _only_pickled(holdings: Holdings, pickles: list[str]) -> ModelError:
    message = (
        f"{holdings.place}: its weights are pickle files ({pickles[0]}), "
        "which can run code when read"
    )
    sharded = len([name for name in pickles if name.startswith("pytorch_model")]) > 1
    if not holdings.page:
        convert = convert_command(Path(holdings.place) / pickles[0])
        return ModelError(message, f"convert it, in a process that runs nothing of it: {convert}")
    name = holdings.place.partition("@")[0]
    folder = Path(name.rpartition("/")[2])
    if sharded:
        return ModelError(
            message,
            f"look for one with safetensors at {holdings.page}/discussions (the hub's bot offers "
            "converted ones as pull requests: model.revision=refs/pr/NUMBER)",
        )
    return ModelError(
        message,
        f"fetch and convert it, in a process that runs nothing of it: hf download {name} "
        f"--local-dir {folder}, then {convert_command(folder / pickles[0])}",
    )


def _without_config(holdings: Holdings) -> ModelError:
    if holdings.with_suffix(".gguf"):
        return _only_gguf(holdings)
    if "model_index.json" in holdings.names:
        return ModelError(f"{holdings.place}: an image model (diffusers)", "name a language model")
    return ModelError(
        f"{holdings.place}: not a model in transformers' layout (no config.json)",
        "name a model with config.json, tokenizer.json and model.safetensors",
    )


def _only_gguf(holdings: Holdings) -> ModelError:
    files = holdings.with_suffix(".gguf")
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return ModelError(
        f"{holdings.place}: holds GGUF files only ({files[0]}{more}), made for llama.cpp: they can "
        "be run, not trained",
        f"to train, {holdings.way_out()}; to run one, fetch the file: mule chat {Path(files[0]).name}",
    )


def _has_spm(holdings: Holdings) -> bool:
    return "tokenizer.model" in holdings.names


def holdings_of(folder: Path | str) -> Holdings:
    """What a folder here holds, and what its README says that it was made from."""
    from huggingface_hub import metadata_load

    folder = Path(folder)
    names = [file.name for file in folder.iterdir() if file.is_file()]
    card: Any = None
    with contextlib.suppress(Exception):  # whatever is wrong with a README, it is only a hint
        card = metadata_load(folder / "README.md")
    bases = (card.get("base_model") if isinstance(card, dict) else None) or []
    found = [bases] if isinstance(bases, str) else bases
    return Holdings(str(folder), names, [name for name in found if isinstance(name, str)])
