"""What a user can name as a model: a run, a folder, an adapter, a GGUF file.

torch is imported where weights are looked at: to find a GGUF file takes none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mule.adapters.chosen import chosen_checkpoint
from mule.errors import ModelError
from mule.hub.repo import address_of
from mule.models.hub import fetch_model, hub_repo
from mule.models.loadable import MODULE, check_loadable, holdings_of
from mule.models.pickled import PICKLE_SUFFIXES, convert_command
from mule.run import Run

if TYPE_CHECKING:
    import torch

    from mule.models.decoder import Decoder
    from mule.tokenizer import Tokenizer

RUNS = Path("runs")
_MODEL = ("config.json", "adapter_config.json", "recipe.yaml")  # one of them is in a model's folder


@dataclass(frozen=True)
class Source:
    """A named model: its folder, the adapter on it, or a GGUF file instead of both."""

    name: str
    model_dir: Path | None = None
    adapter_dir: Path | None = None
    gguf_file: Path | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer lies; an adapter of Mule's carries its own copy."""
        adapter, model = self.adapter_dir, self.model_dir
        folder = adapter if adapter and (adapter / "tokenizer.json").is_file() else model
        if folder is None:
            raise ModelError(f"{self.name}: a GGUF file has no tokenizer folder", "name its run")
        return folder


def find_source(
    text: str,
    *,
    base: str | None = None,
    runs: Path = RUNS,
    revision: str | None = None,
    weights: bool = True,
) -> Source:
    """Find what `text` names; `base` overrides where an adapter's base is looked for.

    What is not here, and reads as ORG/NAME, is fetched from the hub at `revision`; without
    `weights` only its tokenizer and small files.
    Raises ModelError with the near names when nothing fits.
    """
    path = Path(text)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{path}: no such file", "mule export writes GGUF files; see --help")
        return Source(path.stem, gguf_file=path)
    if path.suffix in PICKLE_SUFFIXES and path.is_file():
        raise ModelError(
            f"{path}: a pickle file, which can run code when read",
            f"convert it, in a process that runs nothing of it: {convert_command(path)}",
        )
    folder = _folder_of(path, text, runs) or _from_hub(text, revision, weights=weights)
    if folder is None:
        raise _nothing(text, runs)
    name = _name_of(folder)
    if not (folder / "adapter_config.json").is_file():
        return Source(name, model_dir=folder)
    from mule.adapters.identity import check_base, recorded_base

    base = base or recorded_base(folder)
    if base is None:
        raise ModelError(
            f"{folder}: an adapter that does not say where its base model is",
            "name the base: --base FOLDER",
        )
    places = (Path(base), runs / base)
    is_here = any((place / file).is_file() for place in places for file in _MODEL)
    if not is_here and hub_repo(base) is None:
        raise ModelError(
            f"{folder}: its base model {base} is not there",
            "bring it back, or name where it is now: --base FOLDER",
        )
    found = find_source(base, runs=runs)  # by its path, the name of a run, or a hub id
    if found.model_dir is None or found.adapter_dir is not None:
        raise ModelError(
            f"{base}: an adapter itself, so no base for the adapter {folder}",
            f"put it into its own base first: mule merge {base}; then give --base that folder",
        )
    check_base(folder, found.model_dir)
    return Source(name, model_dir=found.model_dir, adapter_dir=folder)


def load_source(
    source: Source, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The decoder, with its adapter attached, and its tokenizer; QLoRA's on the base in 4 bits.

    In float32 where no `dtype` is given.
    """
    import torch

    from mule.adapters.identity import recorded_quantization
    from mule.adapters.lora import load_lora
    from mule.adapters.nf4 import QUANTIZED
    from mule.adapters.qlora import load_quantized
    from mule.models.folder import load_model, read_config
    from mule.tokenizer import Tokenizer

    dtype = dtype or torch.float32
    if source.model_dir is None:
        raise ModelError(f"{source.name}: a GGUF file runs in llama.cpp, not here", "use mule chat")
    quantized = recorded_quantization(source.adapter_dir) if source.adapter_dir else None
    if quantized:  # what the adapter was trained on
        config, double = read_config(source.model_dir), quantized == QUANTIZED[True]
        model = load_quantized(source.model_dir, config, dtype, double_quant=double).to(device)
    else:
        model = load_model(source.model_dir, dtype=dtype, device=device)
    if source.adapter_dir is not None:
        load_lora(model, source.adapter_dir)
        model.to(dtype)
    return model.eval(), Tokenizer.load(source.tokenizer_dir)


def _folder_of(path: Path, text: str, runs: Path) -> Path | None:
    """The folder of a model, adapter or run's checkpoint here; None when there is none."""
    for candidate in (path, runs / text):
        if (candidate / "recipe.yaml").is_file():
            checkpoint = chosen_checkpoint(Run.open(candidate))
            if checkpoint is None:
                raise ModelError(
                    f"{candidate}: the run has no checkpoint yet",
                    f"train it first: mule train {candidate}/recipe.yaml --resume",
                )
            return checkpoint
        if any(
            (candidate / name).is_file() for name in ("config.json", "adapter_config.json", MODULE)
        ):
            return candidate
    if path.is_dir() and any(path.glob("*.gguf")):
        check_loadable(holdings_of(path), None)
    return None


def _from_hub(text: str, revision: str | None, *, weights: bool) -> Path | None:
    repo = hub_repo(text, revision)
    return fetch_model(text, repo, weights=weights) if repo else None


def _name_of(folder: Path) -> str:
    """What a model is called: after its folder, its run, or its repository on the hub."""
    if folder.name.startswith("checkpoint-"):
        return folder.parent.name
    address = address_of(folder)
    return address[0].rpartition("/")[2] if address else folder.name


def _nothing(text: str, runs: Path) -> ModelError:
    known = sorted(p.parent.name for p in runs.glob("*/recipe.yaml"))
    hint = f"runs here: {', '.join(known)}" if known else "give a path, or train one: mule demo"
    if hub_repo(f"hf://{text}"):
        hint += f"; a model of the hub: hf://{text}"
    return ModelError(f"{text}: no run, model folder, adapter or GGUF file of this name", hint)
