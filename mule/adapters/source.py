"""What a user can name as a model: a run, a folder, an adapter, a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mule.adapters.identity import check_base, recorded_base
from mule.adapters.lora import load_lora
from mule.errors import ModelError
from mule.models.decoder import Decoder
from mule.models.folder import load_model
from mule.models.pickled import PICKLE_SUFFIXES, convert_command
from mule.run import Run
from mule.tokenizer import Tokenizer

RUNS = Path("runs")


@dataclass(frozen=True)
class Source:
    """A named model: its folder, the adapter on it, or a GGUF file instead of both."""

    name: str
    model_dir: Path | None = None
    adapter_dir: Path | None = None
    gguf_file: Path | None = None

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer lies; an adapter carries its own copy."""
        folder = self.adapter_dir or self.model_dir
        if folder is None:
            raise ModelError(f"{self.name}: a GGUF file has no tokenizer folder", "name its run")
        return folder


def find_source(text: str, *, base: str | None = None, runs: Path = RUNS) -> Source:
    """Find what `text` names; `base` overrides where an adapter's base is looked for.

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
    folder = _folder_of(path, text, runs)
    name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
    if not (folder / "adapter_config.json").is_file():
        return Source(name, model_dir=folder)
    base = base or recorded_base(folder)
    if base is None:
        raise ModelError(
            f"{folder}: an adapter that does not say where its base model is",
            "name the base: --base FOLDER",
        )
    if not (Path(base) / "config.json").is_file() and not (runs / base / "recipe.yaml").is_file():
        raise ModelError(
            f"{folder}: its base model {base} is not there",
            "bring it back, or name where it is now: --base FOLDER",
        )
    base_dir = find_source(base, runs=runs).model_dir
    assert base_dir is not None
    check_base(folder, base_dir)
    return Source(name, model_dir=base_dir, adapter_dir=folder)


def load_source(
    source: Source, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """The decoder, with its adapter attached, and its tokenizer."""
    if source.model_dir is None:
        raise ModelError(f"{source.name}: a GGUF file runs in llama.cpp, not here", "use mule chat")
    model = load_model(source.model_dir, dtype=dtype, device=device)
    if source.adapter_dir is not None:
        load_lora(model, source.adapter_dir)
        model.to(dtype)
    return model.eval(), Tokenizer.load(source.tokenizer_dir)


def _folder_of(path: Path, text: str, runs: Path) -> Path:
    for candidate in (path, runs / text):
        if (candidate / "recipe.yaml").is_file():
            run = Run.open(candidate)
            latest = run.latest_checkpoint()
            if latest is None:
                raise ModelError(
                    f"{candidate}: the run has no checkpoint yet",
                    f"train it first: mule train {candidate}/recipe.yaml --resume",
                )
            return latest[1]
        if any((candidate / name).is_file() for name in ("config.json", "adapter_config.json")):
            return candidate
    known = sorted(p.parent.name for p in runs.glob("*/recipe.yaml"))
    raise ModelError(
        f"{text}: no run, model folder, adapter or GGUF file of this name",
        f"runs here: {', '.join(known)}" if known else "give a path, or train one: mule demo",
    )
