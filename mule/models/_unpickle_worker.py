"""The only place where Mule opens a pickle file: a child process with limits, weights only.

One JSON object on stdin asks (`file`, `out`, `key`, `memory_bytes`, `cpu_s`); one on stdout answers.
The tensors go to `out` as safetensors, just as they were; nothing else leaves the process.
"""

from __future__ import annotations

import ctypes  # noqa: F401  (safetensors loads it late, when opening libraries is no longer allowed)
import hashlib
import json
import math
import os
import re
import resource
import sys
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

from mule import fsio

State = dict[str, torch.Tensor]
Keys = tuple[str, ...]  # of dictionaries inside one another; () is the top level

_MAX_DEPTH = 3  # of dictionaries inside one another, searched for a state dict
_MAX_SHOWN = 60  # characters of a value, entries of a list
_NAME = re.compile(r"[\w.\-/:+]{1,300}")
_NOT_WEIGHTS = re.compile(r"(optim|sched|lr_|rng|scaler|loss_scal|grad)", re.IGNORECASE)
# What safetensors can hold.
_DTYPES = frozenset(
    getattr(torch, name)
    for name in """float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e8m0fnu
    int64 int32 int16 int8 uint8 bool""".split()
)
# Python's audit events that reading weights never causes.
_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
_FORBIDDEN += ("socket.", "pickle.find_class", "ctypes.dlopen", "os.kill", "shutil.", "os.putenv")


class Refused(Exception):
    """The file cannot be converted; `kind` names the remedy, the text says what was found."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def unpickle(file: Path, out: Path, key: str | None) -> dict[str, Any]:
    """Copy the tensors of the state dict in `file` to `out`; the report about them.

    Tensors that share their values are written once: `aliases` names the others.
    Raises Refused, with nothing written.
    """
    root = _load(file)
    keys, state = _choose(_states(root), key)
    written, aliases, odd = _separate(state)
    tensors = {name: _described(tensor) for name, tensor in written.items()}
    with fsio.stream_file(out) as temporary:
        save_file(written, temporary)
    return {
        "ok": True,
        "key": ".".join(keys),
        "tensors": tensors,
        "aliases": aliases,
        "left_out": _left_out(root, keys) | odd,
    }


# ---------------------------------------------------------------- opening


def _load(file: Path) -> Any:
    _check_container(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", text := str(error)):
            raise Refused("code", f"asks to run `{found[1]}`, which no weights need") from None
        raise Refused("damaged", f"not weights alone ({_short(text)})") from None
    except MemoryError:
        raise Refused("memory", "") from None
    except (RuntimeError, OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        if "allocate" in (text := str(error)):
            raise Refused("memory", "") from None
        raise Refused("damaged", f"cut off or damaged ({_short(text)})") from None


def _check_container(file: Path) -> None:
    """Only the zip form of torch.save, with plain records: it can be mapped, and cannot inflate."""
    with open(file, "rb") as opened:
        start = opened.read(4)
    if start[:1] == b"\x80":
        raise Refused("legacy", "a plain pickle, or torch's form before 1.6")
    if start != b"PK\x03\x04":
        raise Refused("damaged", "not a file of torch.save")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise Refused("damaged", f"cut off or damaged ({_short(str(error))})") from None
    names = [entry.filename for entry in entries]
    if len(set(names)) < len(names) or any(entry.compress_type for entry in entries):
        raise Refused("damaged", "its records are compressed or doubled; torch.save writes neither")
    if any("/code/" in name for name in names):
        raise Refused("code", "a TorchScript program, not weights")


# ---------------------------------------------------------------- finding the state dict


def _states(root: Any) -> dict[Keys, State]:
    """Every dictionary in `root` that holds weight matrices, by the keys that lead to it."""
    found: dict[Keys, State] = {}
    waiting: list[tuple[Keys, Any]] = [((), root)]
    while waiting:
        keys, value = waiting.pop(0)
        if not isinstance(value, dict):
            continue
        named = {name: item for name, item in value.items() if isinstance(name, str)}
        tensors = {name: item for name, item in named.items() if isinstance(item, torch.Tensor)}
        if any(tensor.is_floating_point() and tensor.dim() > 1 for tensor in tensors.values()):
            found[keys] = tensors
        elif len(keys) < _MAX_DEPTH:
            inner = [name for name in list(named)[:1000] if not _NOT_WEIGHTS.match(name)]
            waiting += [((*keys, name), named[name]) for name in inner]
    return found


def _choose(states: dict[Keys, State], key: str | None) -> tuple[Keys, State]:
    by_path = {".".join(keys): keys for keys in states}
    paths = ", ".join(_short(path) or "(top level)" for path in list(by_path)[:10])
    if key is not None:
        if key not in by_path:
            found = paths or "none"
            raise Refused("key", f"no state dict is called {_short(key)}; found: {found}")
        return by_path[key], states[by_path[key]]
    if not states:
        raise Refused("empty", "holds no state dict: no dictionary of named weight matrices")
    if len(states) > 1:
        raise Refused("several", f"holds {len(states)} state dicts: {paths}")
    return next(iter(states.items()))


def _left_out(root: Any, keys: Keys) -> dict[str, str]:
    """What stands beside the chosen tensors, in words."""
    found: dict[str, str] = {}
    for depth in range(len(keys) + 1):
        chosen = keys[depth] if depth < len(keys) else None
        for name, item in list(root.items())[:_MAX_SHOWN]:
            is_weight = chosen is None and isinstance(item, torch.Tensor)
            if name != chosen and not is_weight:
                found[_short(".".join([*keys[:depth], str(name)]))] = _in_words(item)
        root = root[chosen] if chosen is not None else root
    return found


def _in_words(item: Any) -> str:
    if isinstance(item, torch.Tensor):
        return f"{str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
    if item is None or isinstance(item, (bool, int, float)):
        return _short(str(item))
    if isinstance(item, str):
        return _short(item)
    size = f" of {len(item):,}" if isinstance(item, (dict, list, tuple, set)) else ""
    return f"{type(item).__name__}{size}"


# ---------------------------------------------------------------- the tensors


def _separate(state: State) -> tuple[State, dict[str, str], dict[str, str]]:
    """(tensors with storage of their own, name -> the name that holds its values, what is odd)."""
    written: State = {}
    aliases: dict[str, str] = {}
    odd: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not _NAME.fullmatch(name):
            raise Refused("damaged", f"a tensor is called {_short(name)}")
        tensor = tensor.detach()
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
            odd[name] = f"{_in_words(tensor)}, not a plain tensor of weights"
            continue
        _check_size(name, tensor)
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            aliases[name] = seen[view]
            continue
        seen[view] = name
        storage = tensor.untyped_storage().data_ptr()
        alone = storage not in storages and tensor.is_contiguous() and not tensor.storage_offset()
        written[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
        storages.add(storage)
    return written, aliases, odd


def _check_size(name: str, tensor: torch.Tensor) -> None:
    """A tensor must not claim more values than the file holds: that would inflate on writing."""
    claimed = math.prod(tensor.shape) * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if claimed > held:
        raise Refused("damaged", f"{name} claims {claimed:,} bytes and holds {held:,}")


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    """Dtype, shape and the SHA-256 of the values' bytes in C order."""
    values = tensor.reshape(-1).view(torch.uint8).numpy().data
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(values).hexdigest(),
    }


def _short(text: str) -> str:
    """Printable, one line, not long: it comes from a file nobody has vouched for."""
    line = text.strip().split("\n")[0].encode("ascii", "backslashreplace").decode()
    line = "".join(char if char.isprintable() else "?" for char in line)
    return line if len(line) <= 2 * _MAX_SHOWN else line[: 2 * _MAX_SHOWN] + "..."


# ---------------------------------------------------------------- limits


def limit(memory_bytes: int, cpu_s: int) -> None:
    """From here on: so much more memory and processor time, no core file, no other program."""
    torch.set_num_threads(1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(usage.ru_utime + usage.ru_stime) + cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if (used := _address_space()) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    sys.addaudithook(_refuse_event)


def _address_space() -> int | None:
    """Bytes mapped now; None where the system keeps no such limit (macOS)."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return None
    return int(statm.read_text().split()[0]) * resource.getpagesize()


def _refuse_event(event: str, _: tuple[Any, ...]) -> None:
    if event.startswith(_FORBIDDEN):
        raise Refused("code", f"tried {event} while being read")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The report of `unpickle`, or why not: `kind` and `error`."""
    try:
        return unpickle(Path(request["file"]), Path(request["out"]), request["key"])
    except Refused as refused:
        return {"ok": False, "kind": refused.kind, "error": str(refused)}
    except MemoryError:
        return {"ok": False, "kind": "memory", "error": ""}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    request = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    limit(request["memory_bytes"], request["cpu_s"])
    json.dump(answer(request), answers)
    answers.close()


if __name__ == "__main__":
    main()
