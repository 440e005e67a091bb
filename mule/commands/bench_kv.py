"""`mule bench kv MODEL_OR_SHAPE`: what a cache of keys and values gains, and what it takes.

A model is measured as it is. A shape (125m) gets random weights, once for each kind of attention:
mha (all heads have their own keys and values), gqa, or gqa-N for N of them, and mqa (one for all).
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mule.errors import UserError
from mule.models.config import SIZES, ModelConfig, named_size

if TYPE_CHECKING:
    from mule.models.decoder import Decoder

_LISTS = {"context": 4, "batch": 1}  # settings that are lists of numbers, and their least
_NUMBERS = {"repetitions": 1, "new_tokens": 2, "minutes": 1, "vocab_size": 16}
_EXAMPLE = "mule bench kv 125m --attention mha,gqa,mqa --context 128,1024 --batch 1"
_VARIED = 3.0  # times larger than at the start of training: else a tied head repeats each token


@dataclass(frozen=True)
class Asked:
    """What to measure: a model or a shape with its kinds of attention, and how much."""

    model: str
    attention: tuple[str, ...] = ()
    context: tuple[int, ...] = (1024,)
    batch: tuple[int, ...] = (1,)
    precision: str | None = None
    repetitions: int = 5
    new_tokens: int = 32
    minutes: int = 10
    vocab_size: int = 32_768  # of a shape

    @property
    def is_shape(self) -> bool:
        return self.model in SIZES


def compare(words: list[str]) -> dict[str, Any]:
    """Tokens a second with and without the cache, the gain beside its prediction, and the bytes.

    `words`: the model or shape, then settings: attention=mha,gqa context=128,1024 batch=1,8
    precision=bf16 repetitions=5 new_tokens=32 minutes=10.
    """
    from mule import machine
    from mule.lab.decode import measure_decode

    asked = read_words(words)
    precision = asked.precision or _precision(asked)
    deadline = time.perf_counter() + 60.0 * asked.minutes
    bandwidth, found = 0.0, {}
    names = asked.attention or ("own",)
    for number, name in enumerate(names):
        model: Decoder | str = asked.model
        if asked.is_shape:
            model = shaped_model(shaped_config(asked, name), precision)
        device = "cuda" if _has_cuda() else "cpu"
        bandwidth = max(bandwidth, machine.read_bandwidth(device))
        left_s = max(1.0, deadline - time.perf_counter()) / (len(names) - number)
        found[name] = measure_decode(
            model,
            batches=asked.batch,
            contexts=asked.context,
            precision=precision,
            repetitions=asked.repetitions,
            new_tokens=asked.new_tokens,
            time_limit_s=left_s,
            bandwidth=bandwidth,
            device=device,
        )
    return judge(found) | {"model": asked.model, "settings": dataclasses.asdict(asked)}


def judge(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row for each kind of attention, batch and context of what `measure_decode` gave."""
    first = next(iter(found.values()))
    rows = [row for name, measured in found.items() for row in _rows(name, measured)]
    texts = [row["same_text"] for row in rows if row["same_text"] is not None]
    return {
        "verdict": _verdict(rows),
        "same_text": all(texts) if texts else None,
        "max_error": max((m["max_error"] or 0.0 for m in found.values()), default=None),
        "cache_bytes_as_the_formula": all(row["cache_as_the_formula"] for row in rows),
        **{key: first[key] for key in ("engine", "precision", "device", "threads")},
        "bandwidth_bytes_per_second": max(m["bandwidth_bytes_per_second"] for m in found.values()),
        "rows": rows,
        "not_measured": [
            {"attention": name} | row for name, m in found.items() for row in m["not_measured"]
        ],
        "models": {name: measured["card"] for name, measured in found.items()},
    }


def row(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a kept result that fit one line of a table: of its longest context."""
    compared = [one for one in result["rows"] if one["gain"] is not None] or result["rows"]
    best = max(compared, key=lambda one: (one["context"], -one["batch"]), default={})
    names = ("attention", "batch", "context", "tokens_per_second", "uncached_tokens_per_second")
    return {
        "model": result["model"],
        "cpu": result["machine"]["gpu"] or result["machine"]["cpu"],
        "precision": result["precision"],
        **{name: best.get(name) for name in (*names, "gain", "predicted_gain", "cache_bytes")},
        "same_text": result["same_text"],
        "date": result["date"],
        "command": result["command"],
    }


def _rows(name: str, measured: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for cached in (row for row in measured["rows"] if row["cached"]):
        place = {key: cached[key] for key in ("batch", "context")}
        plain = _at(measured["rows"], place | {"cached": False})
        gain = _at(measured["gains"], place)
        rows.append(
            {"attention": name, **place}
            | {"tokens_per_second": cached["decode_tokens_per_second"]}
            | {"std": cached["decode_std"], "repetitions": cached["repetitions"]}
            | {"uncached_tokens_per_second": plain.get("decode_tokens_per_second")}
            | {"uncached_std": plain.get("decode_std")}
            | {"uncached_repetitions": plain.get("repetitions")}
            | {"uncached_new_tokens": plain.get("new_tokens")}
            | {"gain": gain.get("gain"), "predicted_gain": gain.get("predicted")}
            | {"share_of_prediction": gain.get("share"), "same_text": plain.get("same_text")}
            | {"time_to_first_token_s": cached["time_to_first_token_s"]}
            | {"prefill_tokens_per_second": cached["prefill_tokens_per_second"]}
            | {"share_of_bandwidth": cached["share_of_bandwidth"]}
            | {"cache_bytes": cached["cache_bytes"], "cache_tokens": cached["cache_tokens"]}
            | {"cache_as_the_formula": cached["cache_bytes"] == cached["cache_formula_bytes"]}
        )
    return rows


def _at(rows: list[dict[str, Any]], place: dict[str, Any]) -> dict[str, Any]:
    return next((row for row in rows if place.items() <= row.items()), {})


def _verdict(rows: list[dict[str, Any]]) -> str:
    compared = [row for row in rows if row["gain"] is not None]
    if not compared:
        return "no gain was measured: the time did not allow a token without the cache"
    best = max(compared, key=lambda row: (row["context"], -row["batch"]))
    same = "the same text" if best["same_text"] else "other texts"
    return (
        f"at {best['context']:,} tokens the cache makes decoding {best['gain']:.1f} times as fast "
        f"({best['share_of_prediction']:.0%} of the prediction), with {same} "
        f"({best['attention']}, batch {best['batch']})"
    )


# ---------------------------------------------------------------- what is measured


def shaped_config(asked: Asked, attention: str) -> ModelConfig:
    """The shape with the key/value heads of a kind of attention, all else equal."""
    size = named_size(asked.model)
    return ModelConfig(
        family="qwen3",
        vocab_size=asked.vocab_size,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_kv_heads=num_kv_heads(attention, size.num_heads, size.num_kv_heads),
        head_dim=size.head_dim,
        intermediate_size=size.intermediate_size,
        max_position_embeddings=max(asked.context),
        qk_norm=True,
    )


def num_kv_heads(attention: str, num_heads: int, usual: int) -> int:
    """Of `mha`, `gqa` (the shape's own number, where it is one of grouped heads), `gqa-N`, `mqa`."""
    if attention == "mha":
        return num_heads
    if attention == "mqa":
        return 1
    if attention == "gqa":
        if 1 < usual < num_heads:
            return usual
        shared = [n for n in range(2, num_heads) if num_heads % n == 0]
        found = min(shared, key=lambda n: abs(n - num_heads / 4), default=None)
        if found is None:
            raise UserError(f"{num_heads} heads cannot be grouped", "leave out gqa: mha,mqa")
        return found
    kind, _, number = attention.partition("-")
    if kind != "gqa" or not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"there is no attention called `{attention}`", "some of mha, gqa, gqa-N, mqa"
        )
    if num_heads % int(number):
        raise UserError(
            f"{num_heads} heads cannot share {number} heads of keys and values",
            f"a number that divides {num_heads}",
        )
    return int(number)


def shaped_model(config: ModelConfig, precision: str) -> Decoder:
    """Random weights whose greedy texts vary."""
    import torch

    from mule.lab.decode import DTYPES
    from mule.models.decoder import empty_decoder

    model = empty_decoder(config, torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(_VARIED)
    dtype = DTYPES.get(precision, torch.float32)  # an unknown one is refused by what measures
    return model.to(dtype).to("cuda" if _has_cuda() else "cpu")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _precision(asked: Asked) -> str:
    """As `mule chat` would compute it; a shape stands for weights that are stored in bf16."""
    import torch

    from mule import machine
    from mule.adapters.source import find_source
    from mule.generate.batching import serving_dtype
    from mule.generate.native.build import library

    if asked.is_shape:
        fast = _has_cuda() or machine.has_fast_bf16() or library() is not None
        return "bf16" if fast else "fp32"
    source = find_source(asked.model)
    if source.model_dir is None:
        raise UserError(
            f"{asked.model}: a GGUF file is computed by llama.cpp, whose cache cannot be left out",
            "name the run or the folder it was made of",
        )
    adapted = source.adapter_dir is not None
    dtype = serving_dtype(source.model_dir, adapted=adapted)
    return "bf16" if dtype == torch.bfloat16 else "fp32"


# ---------------------------------------------------------------- words


def read_words(words: list[str]) -> Asked:
    """The words of the command line; UserError or UserError says what would be right."""
    names = [word for word in words if "=" not in word]
    if len(names) != 1:
        raise UserError(
            f"`mule bench kv` measures one model or shape; {len(names)} are named", _EXAMPLE
        )
    given: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            given[key] = _setting(key, value)
    asked = Asked(names[0], **given)
    if asked.is_shape:
        return asked if asked.attention else dataclasses.replace(asked, attention=("gqa",))
    if asked.attention or "vocab_size" in given:
        raise UserError(
            f"{asked.model} is a model, which has the attention and tokens that it was trained with",
            f"leave them out, or name a shape: {', '.join(SIZES)}",
        )
    return asked


def _setting(key: str, value: str) -> Any:
    parts = value.split(",")
    if key == "attention" and all(parts):
        return tuple(dict.fromkeys(parts))
    if key == "precision" and value:
        return value
    if key in _LISTS and all(_is_number(part, _LISTS[key]) for part in parts):
        return tuple(int(part) for part in parts)
    if key in _NUMBERS and _is_number(value, _NUMBERS[key]):
        return int(value)
    raise UserError(f"`{key}={value}` is no setting of this benchmark", f"for example {_EXAMPLE}")


def _is_number(text: str, least: int) -> bool:
    return text.isdecimal() and int(text) >= least
