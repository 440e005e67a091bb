"""From a recipe to the parts of a run: tokenizer, data, model, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mule import fsio, machine, progress
from mule.adapters.identity import base_identity
from mule.adapters.lora import add_lora
from mule.adapters.source import find_source
from mule.config.load import identity_fingerprint, load_recipe
from mule.config.schema import Recipe, TrainSection
from mule.data.loader import Loader, ValidSet
from mule.data.prepare import prepared_rows, read_options
from mule.data.shards import Shards
from mule.data.sources import Document, read
from mule.errors import ConfigError, UserError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder, empty_decoder
from mule.models.folder import load_weights, read_config
from mule.plan.micro_batch import fastest
from mule.plan.resolve import Facts, Resolved, new_model_config, resolve
from mule.plan.sharding import SHARDED
from mule.run import Run
from mule.tokenizer import Tokenizer
from mule.train.compiler import set_up_compiler
from mule.train.distributed import ALONE, Group, stable_number
from mule.train.float8 import use_float8
from mule.train.optim import Optimizer
from mule.train.precision import DTYPES, check_fits_fp16, set_up_torch
from mule.train.probe import measured_rates
from mule.train.scaler import LossScaler


@dataclass
class Parts:
    """What `fit` needs. `base` is the model an adapter is trained on, with its identity."""

    resolved: Resolved
    identity: str
    tokenizer: Tokenizer
    config: ModelConfig
    model: Decoder
    optimizer: Optimizer
    train: Loader
    valid: ValidSet | None
    base: tuple[Path, dict[str, str | None]]
    matmul_peak_flops: float  # of all processes together
    group: Group = ALONE
    scaler: LossScaler | None = None  # in fp16

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the model, so that all must compute together."""
        return self.recipe.train.sharding in SHARDED


def assemble(recipe: Recipe, run: Run, group: Group = ALONE) -> Parts:
    """Build every part of the run; nothing of it depends on whether the run is resumed."""
    base_dir = base_folder(recipe)
    tokenizer = group.after_first(lambda: _kept_tokenizer(recipe, run, base_dir))
    train_shards, valid_shards = group.after_first(
        lambda: prepared_rows(recipe.data, recipe.train.seed, tokenizer, run.folder.parent)
    )
    config = read_config(base_dir) if base_dir else new_model_config(recipe, tokenizer.vocab_size)
    _check_fit(recipe, config, tokenizer)
    facts = Facts(**group.from_first(lambda: asdict(_facts(train_shards, recipe.train, group))))
    decided = group.from_first(lambda: _decided_before(recipe, run))
    resolved = resolve(_with_train(recipe, decided), config, facts)
    settings = resolved.recipe
    identity = identity_fingerprint(settings)
    _check_group(group, resolved.step_rows, (identity, train_shards.folder.name))
    model, optimizer = model_and_optimizer(settings, config, base_dir, group)
    train = Loader(train_shards, resolved.step_rows, settings.train.seed)
    resolved = _with_fastest_micro_batch(resolved, model, optimizer, train, group)
    micro_rows = int(resolved.recipe.train.micro_batch_rows)
    return Parts(
        resolved=resolved,
        identity=identity,
        tokenizer=tokenizer,
        config=config,
        model=model,
        optimizer=optimizer,
        train=train,
        valid=ValidSet(valid_shards, micro_rows, settings.evaluate.max_rows)
        if valid_shards
        else None,
        base=_base(settings, base_dir),
        matmul_peak_flops=facts.matmul_peak_flops * _num_peaks(settings.train.device, group),
        group=group,
        scaler=loss_scaler(resolved),
    )


def _decided_before(recipe: Recipe, run: Run) -> dict[str, Any]:
    """What the run's first attempt decided by memory and by timing, where the recipe leaves it open.

    Memory and speed differ from start to start; a resumed run computes what it computed before.
    """
    file = run.folder / "resolved.yaml"
    if not file.is_file():
        return {}
    before = load_recipe(file, []).recipe.train
    keys = ("micro_batch_rows", "activation_checkpointing")
    return {key: getattr(before, key) for key in keys if getattr(recipe.train, key) == "auto"}


def _with_train(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    train = recipe.train.model_copy(update=values)
    return recipe.model_copy(update={"train": train})


def _with_fastest_micro_batch(
    resolved: Resolved, model: Decoder, optimizer: Optimizer, loader: Loader, group: Group
) -> Resolved:
    """Time the sizes worth timing, in the first process for all; the resolved recipe with the best."""
    if not resolved.candidates:
        return resolved
    rates = group.from_first(lambda: measured_rates(model, optimizer, loader, resolved.candidates))
    if not rates:
        return resolved
    rows, reason = fastest(rates)
    progress.note(f"train.micro_batch_rows: {rows}; {reason}")
    return resolved.with_micro_batch(rows, reason)


def base_folder(recipe: Recipe) -> Path | None:
    """The folder of model.path; None for a new model. Raises ConfigError for an adapter there."""
    if recipe.model.path is None:
        if recipe.adapter.kind != "none":
            raise ConfigError(
                [f"adapter.kind = {recipe.adapter.kind} needs a model to adapt"],
                "set model.path to a run or a model folder",
            )
        return None
    source = find_source(recipe.model.path)
    if source.model_dir is None or source.adapter_dir is not None:
        raise ConfigError(
            [f"model.path = {recipe.model.path} is an adapter or a GGUF file, not a model"],
            f"merge it first: mule merge {recipe.model.path}",
        )
    return source.model_dir


def _kept_tokenizer(recipe: Recipe, run: Run, base_dir: Path | None) -> Tokenizer:
    """The tokenizer of the run: kept in its folder, so that a resume finds the same one."""
    kept = run.folder / "tokenizer"
    if (kept / "tokenizer.json").is_file():
        return Tokenizer.load(kept)
    tokenizer = find_tokenizer(recipe, base_dir)
    with fsio.atomic_folder(kept) as folder:
        tokenizer.save(folder)
    return tokenizer


def find_tokenizer(recipe: Recipe, base_dir: Path | None) -> Tokenizer:
    """The tokenizer a recipe names, else the base model's, else one trained on data.train."""
    given = recipe.tokenizer.path or base_dir
    if given is not None:
        return Tokenizer.load(given)
    if recipe.tokenizer.vocab_size is None:
        raise ConfigError(
            [
                "a new model needs a tokenizer: neither tokenizer.path nor tokenizer.vocab_size is set"
            ],
            "set tokenizer.vocab_size (for example 16384) to train one on data.train",
        )
    return Tokenizer.train(_texts(recipe), recipe.tokenizer.vocab_size)


def _texts(recipe: Recipe) -> Iterator[str]:
    """Everything in data.train, as texts for the tokenizer to learn from."""
    for item in read(recipe.data.train, read_options(recipe.data)):
        if isinstance(item, Document):
            yield item.text
        else:
            yield from (message.content for message in item.messages)


def _check_fit(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            [
                f"the tokenizer has {tokenizer.vocab_size} tokens, "
                f"the model {config.vocab_size} embedding rows"
            ],
            "use the tokenizer that belongs to the model: remove tokenizer.path",
        )
    if recipe.data.max_seq_length > config.max_position_embeddings:
        raise ConfigError(
            [
                f"data.max_seq_length = {recipe.data.max_seq_length} exceeds the model's context "
                f"of {config.max_position_embeddings} tokens"
            ],
            f"set data.max_seq_length to {config.max_position_embeddings} or less",
        )


def _check_group(group: Group, step_rows: int, same: tuple[str, str]) -> None:
    if step_rows < group.world_size:
        raise UserError(
            f"an update of {step_rows} rows cannot be shared by {group.world_size} processes",
            f"start at most {step_rows}, or raise train.step_rows",
        )
    group.agree(
        "recipe, data and tokenizer",
        lambda: stable_number(*same),
        "every machine must see the same files: put recipe, data and runs on a shared disk",
    )


def _num_peaks(device: str, group: Group) -> int:
    """How often the measured peak is there: a GPU for each process, or the cores of a machine."""
    return group.world_size if device == "cuda" else group.num_machines


def _facts(shards: Shards, train: TrainSection, group: Group) -> Facts:
    """Of this machine and the data; what processes share is divided among them."""
    cuda = torch.cuda.is_available()
    mps = torch.backends.mps.is_available() and group.is_alone
    device = train.device
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    capability: tuple[int, int] = torch.cuda.get_device_capability() if cuda else (0, 0)
    fast_bf16, cuda_bf16 = machine.has_fast_bf16(), capability >= (8, 0)
    dtype: str = train.precision
    if dtype == "auto":
        fast = {"cpu": fast_bf16, "cuda": cuda_bf16}.get(device, True)
        dtype = "bf16" if fast else "fp16" if device == "cuda" else "fp32"
    present = {"cuda": cuda, "mps": mps}.get(device, True)  # an absent one is refused by resolve
    peak = machine.matmul_peak(dtype, device if present else "cpu", machine.physical_cores())
    return Facts(
        num_rows=shards.num_rows,
        row_length=shards.row_length,
        targets_per_row=shards.num_targets / shards.num_rows,
        examples_per_row=shards.num_examples / shards.num_rows,
        cpu_cores=max(1, machine.physical_cores() // group.local_size),
        fast_bf16=fast_bf16,
        cpp_compiler=machine.has_cpp_compiler(),
        available_bytes=torch.cuda.mem_get_info()[0]
        if device == "cuda" and cuda
        else machine.available_bytes() // group.local_size,
        matmul_peak_flops=peak,
        cuda=cuda,
        mps=mps,
        cuda_bf16=cuda_bf16,
        float8=capability >= (8, 9),
        isolated=shards.isolated,
        num_processes=group.world_size,
        processes_per_machine=group.local_size,
    )


def model_and_optimizer(
    recipe: Recipe, config: ModelConfig, base_dir: Path | None, group: Group = ALONE
) -> tuple[Decoder, Optimizer]:
    """What `train_step` works on, as the resolved recipe wants it; compiled when it says so."""
    set_up_torch(int(recipe.train.threads))
    model = _model(recipe, config, base_dir)
    if recipe.train.precision == "fp16":
        check_fits_fp16(model)
    elif recipe.train.precision == "fp8":
        use_float8(model)
    if recipe.train.compile:
        set_up_compiler()
        model.compile_regions()
    dtype, compiled = DTYPES[recipe.train.precision], bool(recipe.train.compile)
    if recipe.train.sharding in SHARDED:
        from mule.train.sharded import ShardedOptimizer, shard

        hybrid = recipe.train.sharding == "hybrid"
        shard(model, dtype, recipe.train.device, group, hybrid=hybrid)
        return model, ShardedOptimizer(model, recipe.optim, compiled=compiled)
    model = model.to(recipe.train.device)
    return model, Optimizer(model, recipe.optim, dtype=dtype, compiled=compiled)


def loss_scaler(resolved: Resolved) -> LossScaler | None:
    """What keeps small gradients in fp16; the other formats need nothing."""
    if resolved.recipe.train.precision != "fp16":
        return None
    return LossScaler(resolved.step_rows * resolved.recipe.data.max_seq_length)


def _model(recipe: Recipe, config: ModelConfig, base_dir: Path | None) -> Decoder:
    train, lora = recipe.train, recipe.adapter.kind == "lora"
    # Weights to be trained start in fp32, as masters; frozen ones need the working precision only.
    model = empty_decoder(config, DTYPES[train.precision] if lora else torch.float32)
    if base_dir is None:
        model.init_weights(train.seed)
    else:
        load_weights(model, base_dir)
    if lora:
        add_lora(model, recipe.adapter.lora, seed=train.seed)
    assert train.activation_checkpointing != "auto"
    model.set_training(dropout=train.dropout, recompute=train.activation_checkpointing)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    progress.note(
        f"model: {config.family}, {cost.total_params(config):,} weights, {trained:,} trained"
    )
    return model.train()


def _base(recipe: Recipe, base_dir: Path | None) -> tuple[Path, dict[str, str | None]]:
    if base_dir is None:
        return Path(), {}
    return base_dir, base_identity(base_dir) if recipe.adapter.kind == "lora" else {}
