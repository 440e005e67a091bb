"""Building a user's module from key=value settings: its arguments, or those of its config."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import nn

from mule import fsio
from mule.config.hints import near
from mule.lab.inspect_subject import Refused, is_own

_CONFIG_NAMES = frozenset({"config", "cfg", "conf", "args", "params", "hparams", "model_args"})
# What an argument of such a name may be in a small trial; the first that fits counts.
_TRIAL: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("vocab", "n_token", "num_token"), 256),
    (("layer", "depth", "n_block", "num_block"), 2),
    (("kv_head", "key_value_head", "query_group", "kv_group"), 2),
    (("head_dim", "head_size", "d_head"), 16),
    (("n_head", "num_head", "heads", "nhead"), 4),
    (("top_k", "topk", "per_tok", "active_exp", "n_act"), 2),
    (("expert",), 4),
    (("inter", "ff", "mlp", "hidden_mult", "inner"), 128),
    (("block_size", "context", "seq", "max_len", "position", "ctx"), 128),
    (("embd", "emb_dim", "d_model", "hidden", "dim", "width", "n_state"), 64),
    (("drop",), 0.0),
    (("bias", "tie", "qk_norm"), False),
    (("theta", "base"), 10000.0),
    (("eps",), 1e-5),
)


def load_class(file: Path, name: str) -> tuple[ModuleType, Callable[..., nn.Module]]:
    """Run the user's file, and the class (or function that makes a module) of that name in it."""
    sys.path.insert(0, str(file.parent))
    module_name = f"_module_of_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if _is_module_class(value, module)]
        raise Refused(
            f"no class is called {name} in {file.name}",
            f"name one of its modules: {', '.join(names) or 'it has none'}",
        )
    return module, found


def own_files(file: Path) -> dict[str, str]:
    """SHA-256 of the user's file and of what it imported from beside it, by the paths from there."""
    others = {"__main__", "mule", *sys.stdlib_module_names}
    found = {file}
    for name, module in list(sys.modules.items()):
        place = getattr(module, "__file__", None) or ""
        if name.partition(".")[0] not in others and place.endswith(".py") and is_own(file, place):
            found.add(Path(place))
    return {str(one.relative_to(file.parent)): fsio.sha256_file(one) for one in sorted(found)}


def _is_module_class(value: object, module: ModuleType) -> bool:
    ours = isinstance(value, type) and issubclass(value, nn.Module)
    return ours and value.__module__ == module.__name__


# Arguments that say no more than a campaign does; of these names alone, so that none is guessed.
_VOCABULARY = ("vocab_size", "n_vocab", "num_vocab", "vocabulary_size")
_CONTEXT = (
    *("block_size", "context_length", "ctx_len", "n_ctx", "context_size", "max_context"),
    *("max_seq_len", "max_seq_length", "max_sequence_length", "seq_len", "seq_length"),
    *("sequence_length", "max_len", "max_length", "max_position_embeddings", "n_positions"),
)


def filled(
    module: ModuleType,
    make: Callable[..., nn.Module],
    settings: dict[str, Any],
    fits: dict[str, int],
) -> dict[str, Any]:
    """The settings with those of `fits` (vocab_size, max_seq_length) that are taken and not typed."""
    known = accepted(module, make, settings)
    found = dict.fromkeys(_VOCABULARY, fits["vocab_size"])
    found |= dict.fromkeys(_CONTEXT, fits["max_seq_length"])
    return settings | {k: v for k, v in found.items() if k in known and k not in settings}


def accepted(
    module: ModuleType, make: Callable[..., nn.Module], settings: dict[str, Any]
) -> list[str]:
    """The names of all settings that the class, or its config, takes."""
    names: list[str] = []
    for name, parameter in _parameters(make).items():
        holder = _config_of(module, make, parameter, settings.get(name))
        names += [name] if holder is None else holder.names
    return names


@dataclass
class _Given:
    """The settings typed, and those of them that have found their place."""

    settings: dict[str, Any]
    used: set[str] = dataclasses.field(default_factory=set)

    def take(self, names: Iterable[str]) -> dict[str, Any]:
        chosen = {name: self.settings[name] for name in names if name in self.settings}
        self.used |= chosen.keys()
        return chosen


def build(
    module: ModuleType, make: Callable[..., nn.Module], settings: dict[str, Any]
) -> nn.Module:
    """The module of these settings. Raises Refused where some are missing, or fit nowhere."""
    given = _Given(settings)
    parameters = _parameters(make)
    arguments = given.take(parameters)
    known = set(parameters)
    missing: list[str] = []
    for name, parameter in parameters.items():
        holder = _config_of(module, make, parameter, settings.get(name))
        if holder is None:
            if parameter.default is inspect.Parameter.empty and name not in arguments:
                missing.append(name)
            continue
        known |= set(holder.names)
        typed = given.take(holder.names)
        if typed or parameter.default is inspect.Parameter.empty or name in settings:
            lacking = [key for key in holder.required if key not in typed]
            if lacking:
                missing += lacking
            else:
                arguments[name] = holder.make(typed)
    if missing:
        raise Refused(_missing_text(make, missing), _words(missing))
    if strange := [name for name in settings if name not in given.used]:
        match = near(strange[0], sorted(known))
        raise Refused(
            f"{strange[0]} is no argument of {_name(make)} nor of its config; it takes "
            f"{', '.join(sorted(known)) or 'none'}",
            f"did you mean {match}=...?" if match else f"leave {strange[0]} away",
        )
    built = make(**arguments)
    if not isinstance(built, nn.Module):
        raise Refused(
            f"{_name(make)} gives a {type(built).__name__}, not a torch.nn.Module",
            "name a class that derives from torch.nn.Module, or a function that returns one",
        )
    return built


def _parameters(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(make).parameters
    return {name: one for name, one in found.items() if one.kind in kinds}


def _name(make: Callable[..., Any]) -> str:
    return getattr(make, "__name__", "it")


def _missing_text(make: Callable[..., Any], missing: list[str]) -> str:
    return f"{_name(make)} cannot be built without {', '.join(missing)}"


def _words(missing: list[str]) -> str:
    return " ".join(f"{name}={trial_value(name)}" for name in missing)


def trial_value(name: str) -> Any:
    """A small value that an argument of this name may have."""
    lower = name.lower()
    for parts, value in _TRIAL:
        if any(part in lower for part in parts):
            return value
    return "VALUE"


# ---------------------------------------------------------------- a config


@dataclass
class _Holder:
    """A config that is one argument: the settings it takes, those it needs, and how it is made."""

    names: list[str]
    required: list[str]
    make: Callable[[dict[str, Any]], Any]


def _config_of(
    module: ModuleType,
    make: Callable[..., Any],
    parameter: inspect.Parameter,
    typed: Any,
) -> _Holder | None:
    """The config that this argument is; None where it is an ordinary value."""
    if isinstance(typed, str) and hasattr(module, typed):  # config=GPTConfig, config=CONFIG_124M
        return _holder_of(getattr(module, typed))
    if typed is not None:
        return None
    annotated = _annotation(module, parameter)
    if isinstance(annotated, type) and annotated.__module__ == module.__name__:
        return _of_class(annotated)
    if annotated is not dict and parameter.name not in _CONFIG_NAMES:
        return None
    read = _keys_read(module, parameter.name)[0]
    fitting = [held for held in _configs_in(module) if read <= set(held.names)]
    if len(fitting) == 1:
        return fitting[0]
    return _read_from_source(module, parameter.name)


def _annotation(module: ModuleType, parameter: inspect.Parameter) -> Any:
    found = parameter.annotation
    return getattr(module, found, found) if isinstance(found, str) else found


def _holder_of(found: Any) -> _Holder:
    """A config that was named: a class, a dictionary, or a thing with attributes."""
    if isinstance(found, type):
        return _of_class(found)
    if isinstance(found, dict):
        return _Holder(list(found), [], lambda typed: {**found, **typed})

    def changed(typed: dict[str, Any]) -> Any:
        for name, value in typed.items():
            setattr(found, name, value)
        return found

    return _Holder(list(vars(found)), [], changed)


def _of_class(cls: type) -> _Holder:
    parameters = _parameters(cls)
    empty = inspect.Parameter.empty
    required = [name for name, one in parameters.items() if one.default is empty]
    if parameters or dataclasses.is_dataclass(cls):
        return _Holder(list(parameters), required, lambda typed: cls(**typed))
    names = [name for name in vars(cls) if not name.startswith("_")]

    def made(typed: dict[str, Any]) -> Any:
        one = cls()
        for name, value in typed.items():
            setattr(one, name, value)
        return one

    return _Holder(names, [], made)


def _configs_in(module: ModuleType) -> list[_Holder]:
    """The configs that the file itself holds: classes, and dictionaries in capitals."""
    found = []
    for name, value in vars(module).items():
        own = isinstance(value, type) and value.__module__ == module.__name__
        if own and not issubclass(value, nn.Module):
            found.append(_of_class(value))
        elif isinstance(value, dict) and name.isupper() and value:
            found.append(_holder_of(value))
    return found


def _read_from_source(module: ModuleType, name: str) -> _Holder:
    """A config that no class describes: what the file reads from it must be given."""
    keys, optional, as_dict = _keys_read(module, name)
    make = dict if as_dict else lambda typed: SimpleNamespace(**typed)
    return _Holder(sorted(keys | optional), sorted(keys), make)


def _keys_read(module: ModuleType, name: str) -> tuple[set[str], set[str], bool]:
    """(keys read from it, those that may be absent, whether it is a dictionary), in the source."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    names = {name, f"self.{name}"}
    attributes, items, optional = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (key := _optional_key(node, names)):
            optional.add(key)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in names:
            attributes.add(node.attr)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in names:
            if isinstance(node.slice, ast.Constant):
                items.add(str(node.slice.value))
    if items or (attributes == {"get"}):
        return items - optional, optional, True
    return attributes - optional, optional, False


def _optional_key(call: ast.Call, names: set[str]) -> str | None:
    """The key of `config.get("key", ...)` or `getattr(config, "key", ...)`."""
    function, place = call.func, -1
    if isinstance(function, ast.Attribute) and function.attr == "get":
        place = 0 if ast.unparse(function.value) in names else -1
    elif ast.unparse(function) == "getattr" and len(call.args) == 3:
        place = 1 if ast.unparse(call.args[0]) in names else -1
    key = call.args[place] if 0 <= place < len(call.args) else None
    return str(key.value) if isinstance(key, ast.Constant) else None
