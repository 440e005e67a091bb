"""The model of a run whose variant is a module of the user's: made new, or with trained weights.

Only the process of such a run comes here, and the campaign that started it was told of the file on the
command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mule.errors import MuleError, UserError
from mule.lab.inspect_build import build, load_class, own_files
from mule.lab.inspect_subject import Refused, Subject, one_line
from mule.lab.own_module import OwnModule
from mule.models.folder import weight_files
from mule.models.own_model import ModuleSource, OwnModel, planned_as
from mule.train.checkpoint import copy_into
from mule.train.model import Maker


def maker_of(own: OwnModule) -> Maker:
    """Makes the module with first weights of its own, drawn from the seed of the run."""
    return lambda recipe: _made(own, recipe.train.seed)


def trained(own: OwnModule, folder: Path, *, dtype: torch.dtype, device: str) -> OwnModel:
    """The module with the weights of a checkpoint, computing in `dtype`, for evaluation."""
    model = _made(own, seed=0)
    model.check_same(folder)
    weights = {name: one.detach() for name, one in model.named_parameters()}
    copy_into(weights | model.kept_buffers(), *weight_files(folder))
    model.compute_in(dtype)
    model.to(device)
    return model.eval()


@contextlib.contextmanager
def explained(own: OwnModule) -> Iterator[None]:
    """Turn an error that comes through the user's code into a UserError that names their line."""
    try:
        yield
    except MuleError:
        raise
    except Refused as refused:
        raise UserError(f"{own.told}: {refused.found}", refused.change) from refused
    except Exception as error:
        place = _subject(own, nn.Module()).place_of(error)
        if place is None:
            raise
        raise UserError(
            f"{place}: {type(error).__name__}: {one_line(error)}",
            f"mend this line; mule lab check {own.told} says what else there is",
        ) from error


def _made(own: OwnModule, seed: int) -> OwnModel:
    file = Path(own.file).resolve()
    loaded, make = load_class(file, own.name)
    source = ModuleSource(own.file, own.name, own.settings, own_files(file))
    if changed := source.differing(own.files):
        raise UserError(
            f"{', '.join(changed)} changed since the campaign began with {own.told}",
            "bring the old one back, or begin another campaign with the new one: name=ANOTHER",
        )
    torch.manual_seed(seed)
    module = build(loaded, make, own.settings)
    subject = _subject(own, module)
    planned = planned_as(module, own.vocab_size, own.max_seq_length)
    return OwnModel(module, lambda called, ids: subject.logits(ids, called), planned, source)


def _subject(own: OwnModule, module: nn.Module) -> Subject:
    """How the module is called, and which lines are the user's."""
    file = Path(own.file).resolve()
    return Subject(file, own.name, own.settings, module, own.vocab_size, keywords=own.keywords)
