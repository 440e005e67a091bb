"""From a recipe to the parts of a run: tokenizer, data, model, optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mule import fsio, machine, progress
from mule.adapters.identity import base_identity
from mule.adapters.start import Start, begun_with
from mule.adapters.trunk import num_frozen_blocks
from mule.config.load import identity_fingerprint, load_recipe
from mule.config.schema import Recipe, TrainSection
from mule.data.loader import Loader, ValidSet
from mule.data.prepare import read_options
from mule.data.recipe_rows import prepared_rows, with_share
from mule.data.shards import Shards
from mule.data.sources import Document, read
from mule.errors import ConfigError, UserError
from mule.models import cost
from mule.models.config import ModelConfig
from mule.models.decoder import Decoder
from mule.models.folder import read_config
from mule.models.hub import fetch_model, hub_repo
from mule.models.own_model import OwnModel
from mule.plan.micro_batch import fastest
from mule.plan.mlx import one_chat_a_row
from mule.plan.resolve import Facts, Resolved, resolve
from mule.plan.shape import new_model_config
from mule.plan.sharding import SHARDED
from mule.run import Run
from mule.tokenizer import Tokenizer
from mule.train.base import pinned_base
from mule.train.chat_base import introduce
from mule.train.compiler import set_up_compiler
from mule.train.distributed import ALONE, Group, stable_number
from mule.train.float8 import use_float8
from mule.train.goal import check_goal_has_rows
from mule.train.model import Maker, make_model
from mule.train.optim import Optimizer
from mule.train.precision import DTYPES, check_fits_fp16, set_up_torch
from mule.train.probe import measured_rates
from mule.train.scaler import LossScaler
from mule.train.stopping import check_patience_has_rows
from mule.train.trunk import room_for_trunk, with_trunk_cache


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
    asked_revision: str | None = None  # of a hub model: what was pinned, such as main
    warm_start: dict[str, Any] = field(default_factory=dict)  # the adapter that was begun with

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a share of the model, so that all must compute together."""
        return self.recipe.train.sharding in SHARDED

    @property
    def flops_per_token(self) -> float | None:
        """Of one trained token; None of a module of the user's, whose cost nobody knows."""
        if isinstance(self.model, OwnModel):
            return None
        length = self.train.shards.row_length
        return cost.recipe_flops_per_token(self.config, self.recipe.adapter, length)

    @property
    def draws_numbers(self) -> bool:
        """Whether a pass in training may draw random numbers."""
        dropout = self.recipe.adapter.lora.dropout or self.recipe.train.dropout
        return bool(dropout) or isinstance(self.model, OwnModel)


def assemble(recipe: Recipe, run: Run, group: Group = ALONE, maker: Maker | None = None) -> Parts:
    """Build every part of the run, resumed or not alike; its model is what a `maker` makes, if any."""
    recipe, base_dir, asked_revision = pinned_base(recipe, run, group)
    tokenizer = group.after_first(lambda: _kept_tokenizer(recipe, run, base_dir))
    recipe = one_chat_a_row(_with_share(recipe, group))
    train_shards, valid_shards = group.after_first(
        lambda: prepared_rows(recipe.data, recipe.train.seed, tokenizer, run.folder.parent)
    )
    given = maker(recipe) if maker else None
    config = given.config if given else _config(recipe, base_dir, tokenizer)
    _check_fit(recipe, config, tokenizer)
    check_patience_has_rows(recipe, validates=valid_shards is not None)
    check_goal_has_rows(recipe, validates=valid_shards is not None)
    if base_dir and train_shards.kind == "chat":
        introduce(recipe, base_dir, tokenizer, train_shards.parts[0].tokens)
    facts = Facts(
        **group.from_first(lambda: asdict(machine_facts(train_shards, recipe.train, group)))
    )
    room: dict[str, Any] = group.from_first(
        lambda: room_for_trunk(recipe, valid_shards, run, group)
    )
    facts = replace(facts, **room)
    decided = group.from_first(lambda: _decided_before(recipe, run))
    resolved = resolve(_with_train(recipe, decided), config, facts)
    settings = resolved.recipe
    for text, level in resolved.told(facts, validates=valid_shards is not None):
        progress.note(text, level)
    identity = identity_fingerprint(settings)
    _check_group(group, resolved.step_rows, (identity, train_shards.folder.name))
    kept_start = run.folder / "start"
    model, optimizer = model_and_optimizer(
        settings, config, base_dir, group, kept_start=kept_start, given=given
    )
    train = Loader(train_shards, resolved.step_rows, settings.train.seed)
    valid, base = None, _base(settings, base_dir)
    if valid_shards:
        rows_at_once = int(settings.train.micro_batch_rows)
        valid = ValidSet(valid_shards, rows_at_once, settings.evaluate.max_rows)
    resolved = with_trunk_cache(resolved, model, (train, valid), base[1], run, group)
    resolved = _with_fastest_micro_batch(resolved, model, optimizer, train, group)
    if valid:
        valid.micro_batch_rows = int(resolved.recipe.train.micro_batch_rows)
    return Parts(
        resolved=resolved,
        identity=identity,
        tokenizer=tokenizer,
        config=config,
        model=model,
        optimizer=optimizer,
        train=train,
        valid=valid,
        base=base,
        matmul_peak_flops=facts.matmul_peak_flops * _num_peaks(settings.train.device, group),
        group=group,
        scaler=loss_scaler(resolved),
        asked_revision=asked_revision,
        warm_start=group.from_first(lambda: begun_with(kept_start)),
    )


def _config(recipe: Recipe, base_dir: Path | None, tokenizer: Tokenizer) -> ModelConfig:
    if base_dir is not None:
        return read_config(base_dir)
    return new_model_config(recipe, tokenizer.vocab_size)


def _with_share(recipe: Recipe, group: Group) -> Recipe:
    """The recipe with the share that is held out for validation, decided by the first process."""
    share = group.from_first(lambda: with_share(recipe.data).valid_share)
    if share == recipe.data.valid_share:
        return recipe
    data = recipe.data.model_copy(update={"valid_share": share})
    return recipe.model_copy(update={"data": data})


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
    named = recipe.tokenizer.path
    if named and not Path(named).exists() and (repo := hub_repo(named)):
        return Tokenizer.load(fetch_model(named, repo, weights=False))
    given = named or base_dir
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


def machine_facts(shards: Shards, train: TrainSection, group: Group = ALONE) -> Facts:
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
        num_chats=shards.num_items if shards.kind == "chat" else 0,
        num_processes=group.world_size,
        processes_per_machine=group.local_size,
    )


def model_and_optimizer(
    recipe: Recipe,
    config: ModelConfig,
    base_dir: Path | None,
    group: Group = ALONE,
    *,
    kept_start: Path | None = None,
    given: Decoder | None = None,
) -> tuple[Decoder, Optimizer]:
    """What `train_step` works on, as the resolved recipe wants it; compiled when it says so.

    `kept_start` is where the run keeps what its adapter begins with, `given` a model made already.
    """
    set_up_torch(int(recipe.train.threads))
    model = make_model(recipe, config, Start(base_dir, kept_start), group, given)
    if recipe.train.precision == "fp16":
        check_fits_fp16(model)
    elif recipe.train.precision == "fp8":
        use_float8(model)
    if recipe.train.compile:
        set_up_compiler()
        model.compile_regions()
    if recipe.adapter.engine == "mlx":
        return model, Optimizer(model, recipe.optim)
    dtype, compiled = DTYPES[recipe.train.precision], bool(recipe.train.compile)
    if recipe.train.sharding in SHARDED:
        from mule.train.sharded import ShardedOptimizer, shard

        hybrid = recipe.train.sharding == "hybrid"
        shard(model, dtype, recipe.train.device, group, hybrid=hybrid)
        return model, ShardedOptimizer(model, recipe.optim, compiled=compiled)
    model = model.to(recipe.train.device)
    if isinstance(model, OwnModel):
        model.compute_in(dtype)
        dtype = torch.float32
    else:
        model.model.num_frozen = num_frozen_blocks(model)
    return model, Optimizer(model, recipe.optim, dtype=dtype, compiled=compiled)


def loss_scaler(resolved: Resolved) -> LossScaler | None:
    """What keeps small gradients in fp16; the other formats need nothing."""
    if resolved.recipe.train.precision != "fp16":
        return None
    return LossScaler(resolved.step_rows * resolved.recipe.data.max_seq_length)


def _base(recipe: Recipe, base_dir: Path | None) -> tuple[Path, dict[str, str | None]]:
    if base_dir is None:
        return Path(), {}
    return base_dir, base_identity(base_dir) if recipe.adapter.kind != "none" else {}
