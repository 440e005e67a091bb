"""From the facts of a setup to settings of ours: the arithmetic that is the same for every tool.

Facts that are no setting by themselves: `micro_rows`, `accumulation`, `devices` and `global_rows`
make the batch; `iterations`, `epochs` and `steps` the length; `warmup_share` the warm-up; `method`,
`bits` and `lora_scale` the adapter; `bf16`, `fp16` and `dtype` the precision; `val_size` and
`validates` what is held out; `schedule`, `optimizer` and `min_lr_share` their names there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.table import Given
from mule.config.dump import with_values
from mule.config.hints import wrong_value
from mule.config.knobs import knobs
from mule.config.schema import Recipe

# their name -> ours, and what is not the same
SCHEDULES: dict[str, tuple[str, str]] = {
    "cosine": ("cosine", ""),
    "cosine_decay": ("cosine", ""),
    "cosine_with_min_lr": ("cosine", ""),
    "linear": ("linear", ""),
    "linear_schedule": ("linear", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "warmup_stable_decay": ("wsd", "the last 20% decay (optim.decay_share)"),
    "cosine_with_restarts": ("cosine", "one decay instead of restarts"),
    "polynomial": ("linear", "a straight line instead of a polynomial"),
    "inverse_sqrt": ("cosine", "a cosine instead of an inverse square root"),
    "one_cycle": ("cosine", "warm-up and cosine instead of one cycle"),
    "rex": ("cosine", "a cosine instead of REX"),
    "step_decay": ("cosine", "a cosine instead of steps"),
    "exponential_decay": ("cosine", "a cosine instead of an exponential"),
}
_ADAMW_8BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
_NO_WARM_UP = ("constant",)  # transformers' schedule of this name has none
_OUTSIDE_BLOCKS = ("lm_head", "embed_tokens", "wte", "embed_out")


@dataclass(frozen=True)
class Chosen:
    """A setting of ours, the facts it comes from, and a note in few words."""

    key: str
    value: Any
    facts: tuple[str, ...]
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """A value that Mule's own limits do not allow, so that the recipe leaves it out."""

    key: str
    value: Any
    facts: tuple[str, ...]
    why: str


def choose(setup: ForeignSetup) -> tuple[Recipe, list[Chosen], list[Refused]]:
    """The recipe, the settings it is made of, and those that its limits refuse.

    What the tool assumes is chosen only where Mule would assume something else.
    """
    recipe, taken, refused = Recipe(), [], []
    for chosen in _all(setup):
        is_stated = any(setup.is_stated(fact) for fact in chosen.facts)
        if not is_stated and chosen.value == knobs()[chosen.key].default:
            continue
        try:
            recipe = with_values(recipe, {chosen.key: chosen.value})
            taken.append(chosen)
        except ValidationError as error:
            refused.append(Refused(chosen.key, chosen.value, chosen.facts, _why(chosen, error)))
    return recipe, taken, refused


def _why(chosen: Chosen, error: ValidationError) -> str:
    cause = error.errors()[0].get("ctx", {}).get("error")
    problems = getattr(cause, "problems", [])
    return problems[0].message if problems else wrong_value(knobs()[chosen.key], chosen.value)


def _all(setup: ForeignSetup) -> Iterator[Chosen]:
    """Every setting, those that others depend on first."""
    parts = (_direct, _adapter, _schedule, _optimizer, _warm_up, _length, _batch)
    for part in (*parts, _precision, _validation):
        yield from part(setup)


_DIRECT = (
    *("name", "model.path", "model.revision", "model.size", "model.family", "model.hidden_size"),
    *("model.num_layers", "model.num_heads", "model.num_kv_heads", "model.head_dim"),
    *("model.intermediate_size", "model.rope_theta", "model.vocab_size", "model.tie_embeddings"),
    *("tokenizer.path", "data.train", "data.valid", "data.format", "data.columns"),
    *("data.max_seq_length", "data.packing", "data.too_long", "train.seed", "train.freeze"),
    *("optim.learning_rate", "optim.weight_decay", "optim.beta1", "optim.beta2", "optim.eps"),
    *("optim.max_grad_norm", "checkpoint.every_steps", "checkpoint.keep", "export.types"),
)
_LORA = ("r", "alpha", "dropout", "target_modules", "last_layers", "use_rslora", "use_dora", "init")


def is_adamw(setup: ForeignSetup) -> bool:
    """Whether its learning rate is one for AdamW: Muon's, Lion's and others' are other numbers."""
    name = str(setup.value("optimizer", "adamw")).lower()
    return "adamw" in name or name == "adam" or setup.value("use_muon") is True


def _direct(setup: ForeignSetup) -> Iterator[Chosen]:
    for key in _DIRECT:
        fact = setup.facts.get(key)
        if key == "optim.learning_rate" and not is_adamw(setup):
            continue
        if fact is not None and fact.value is not None:
            yield Chosen(key, _as_ours(key, fact.value), (key,), fact.note)


def _as_ours(key: str, value: Any) -> Any:
    """Whole numbers where ours are numbers and the other way round: strict types tell them apart."""
    kinds = {branch.get("type") for branch in knobs()[key].branches}
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    if "number" in kinds:
        return float(value)
    return int(value) if "integer" in kinds and float(value).is_integer() else value


def _adapter(setup: ForeignSetup) -> Iterator[Chosen]:
    method, bits = setup.value("method", "full"), setup.value("bits")
    if method == "full":
        return
    kind = "qlora" if bits == 4 else "lora"
    facts = ("method", "bits") if bits == 4 else ("method",)
    yield Chosen("adapter.kind", kind, facts)
    for name in _LORA:
        key = f"adapter.lora.{name}"
        value = setup.value(key)
        if name == "alpha" and value is None:
            yield from _scaled(setup)
        elif name == "target_modules" and isinstance(value, list):
            inside = [module for module in value if module not in _OUTSIDE_BLOCKS]
            if inside:
                note = "" if inside == value else "the layers of the blocks only"
                yield Chosen(key, inside, (key,), note)
        elif value is not None:
            yield Chosen(key, _as_ours(key, value), (key,), setup.facts[key].note)
    if kind == "qlora" and setup.value("adapter.lora.double_quant") is not None:
        key = "adapter.lora.double_quant"
        yield Chosen(key, setup.value(key), (key,))
    if setup.value("adapter.warm_start") is not None:
        yield Chosen(
            "adapter.warm_start", setup.value("adapter.warm_start"), ("adapter.warm_start",)
        )


def _scaled(setup: ForeignSetup) -> Iterator[Chosen]:
    """mlx-lm multiplies by `scale` where the others multiply by alpha / r."""
    scale, rank = setup.number("lora_scale"), setup.number("adapter.lora.r")
    if scale is not None and rank is not None:
        note = f"scale {scale:g} x rank {rank:g}"
        yield Chosen("adapter.lora.alpha", scale * rank, ("lora_scale", "adapter.lora.r"), note)


def _schedule(setup: ForeignSetup) -> Iterator[Chosen]:
    name = setup.value("schedule")
    if name is None:
        return
    known, differs = SCHEDULES.get(str(name).lower(), ("cosine", f"no schedule `{name}` here"))
    yield Chosen("optim.schedule", known, ("schedule",), differs)
    if known == "constant" or not is_adamw(setup):
        return
    lowest, share = setup.number("optim.min_learning_rate"), setup.number("min_lr_share")
    rate = setup.number("optim.learning_rate")
    if lowest is not None:
        yield Chosen("optim.min_learning_rate", lowest, ("optim.min_learning_rate",))
    elif share is not None and rate is not None:
        note = f"{share:g} of the highest"
        yield Chosen(
            "optim.min_learning_rate", float(f"{share * rate:.6g}"), ("min_lr_share",), note
        )


def _optimizer(setup: ForeignSetup) -> Iterator[Chosen]:
    name = str(setup.value("optimizer", "adamw")).lower()
    if name in _ADAMW_8BIT:
        if setup.value("method", "full") != "full":
            note = "the moments of an adapter are small: 8 bits would save next to nothing"
            yield Chosen("optim.kind", "adamw", ("optimizer",), note)
        else:
            yield Chosen("optim.kind", "adamw8bit", ("optimizer",), "extra qlora")
    elif name == "muon":
        yield Chosen("optim.kind", "muon", ("optimizer",))
    elif "adamw" in name or name == "adam":
        yield Chosen("optim.kind", "adamw", ("optimizer",))
    else:
        note = f"no `{name}` here: AdamW instead"
        yield Chosen("optim.kind", "adamw", ("optimizer",), note)


def num_steps(setup: ForeignSetup) -> int | None:
    """Updates of the run, where the file alone tells."""
    steps, iterations = setup.number("train.steps"), setup.number("iterations")
    if steps is not None:
        return int(steps)
    if iterations is not None:
        return int(iterations // max(1.0, setup.number("accumulation") or 1.0))
    return None


def _warm_up(setup: ForeignSetup) -> Iterator[Chosen]:
    key, steps = "optim.warmup_steps", num_steps(setup)
    if setup.value("schedule") in _NO_WARM_UP and setup.value("plain_constant", True):
        yield Chosen(key, 0, ("schedule",), "a constant schedule has no warm-up there")
        return
    stated, share = setup.number(key), setup.number("warmup_share")
    if stated is not None and not (stated == 0 and share):
        yield Chosen(key, _as_ours(key, stated), (key,), setup.facts[key].note)
    elif share is not None and (steps is not None or share == 0):
        note = f"{share:g} of {steps:,} updates" if steps else ""
        yield Chosen(key, round(share * (steps or 0)), ("warmup_share",), note)


def _length(setup: ForeignSetup) -> Iterator[Chosen]:
    steps = num_steps(setup)
    if steps is not None:
        facts = (
            ("train.steps",)
            if setup.value("train.steps") is not None
            else ("iterations", "accumulation")
        )
        over = setup.number("accumulation") or 1
        note = (
            f"{setup.value('iterations')} iterations / {over:g}"
            if len(facts) > 1 and over > 1
            else ""
        )
        yield Chosen("train.steps", steps, facts, note)
    elif setup.value("train.tokens") is not None:
        yield Chosen("train.tokens", int(setup.value("train.tokens")), ("train.tokens",))
    elif setup.value("train.epochs") is not None:
        yield Chosen("train.epochs", float(setup.value("train.epochs")), ("train.epochs",))


def update_rows(setup: ForeignSetup) -> int | None:
    """Rows of an update over all devices."""
    total = setup.number("global_rows")
    if total is not None:
        return int(total)
    micro = setup.number("micro_rows")
    if micro is None:
        return None
    return int(micro * (setup.number("accumulation") or 1) * (setup.number("devices") or 1))


def _batch(setup: ForeignSetup) -> Iterator[Chosen]:
    rows = update_rows(setup)
    if rows is None:
        return
    packs = bool(setup.value("data.packing")) or bool(setup.value("pretrain"))
    key = "train.step_rows" if packs else "train.step_examples"
    if setup.number("global_rows") is not None:
        yield Chosen(key, rows, ("global_rows",), "of an update, on all devices together")
        return
    names = {"micro_rows": "rows", "accumulation": "accumulation", "devices": "devices"}
    parts = {word: setup.number(name) for name, word in names.items()}
    known = {word: count for word, count in parts.items() if count is not None}
    said = f"{' x '.join(known)}: {' x '.join(f'{count:g}' for count in known.values())}"
    yield Chosen(key, rows, tuple(names), said if len(known) > 1 else "")


def _precision(setup: ForeignSetup) -> Iterator[Chosen]:
    bf16, fp16 = setup.value("bf16"), setup.value("fp16")
    dtype = str(setup.value("dtype", "")).lower()
    key = "train.precision"
    if bf16 is True or fp16 is True:
        yield Chosen(key, "bf16" if bf16 is True else "fp16", ("bf16", "fp16"))
    elif bf16 == "auto":
        yield Chosen(key, "auto", ("bf16",))
    elif dtype:
        names = {"bf16": "bf16", "bfloat16": "bf16", "32": "fp32", "float32": "fp32", "16": "fp16"}
        found = next((ours for name, ours in names.items() if dtype.startswith(name)), None)
        found = "fp16" if dtype in ("float16", "fp16") else found
        if found is not None:
            yield Chosen(key, found, ("dtype",))


def _validation(setup: ForeignSetup) -> Iterator[Chosen]:
    size, has_files = setup.number("val_size"), setup.value("data.valid") is not None
    validates = has_files or bool(size) or setup.value("validates", False)
    if not has_files:
        samples = setup.number("max_samples")
        if size is not None and size >= 1 and samples:
            yield Chosen("data.valid_share", size / samples, ("val_size", "max_samples"))
        elif size is not None and 0 < size < 1:
            yield Chosen("data.valid_share", size, ("val_size",))
        elif not validates:
            yield Chosen("data.valid_share", 0.0, ("val_size", "validates"), "nothing is held out")
    if not validates:
        return
    for key in ("evaluate.every_steps", "evaluate.max_rows", "evaluate.patience"):
        if setup.value(key) is not None:
            yield Chosen(key, _as_ours(key, setup.value(key)), (key,), setup.facts[key].note)


def lose_what_differs(setup: ForeignSetup, chosen: list[Chosen]) -> None:
    """Note among the losses what the chosen settings only come near to."""
    name = setup.value("schedule")
    differs = SCHEDULES.get(str(name).lower(), ("", f"no schedule `{name}` here: a cosine"))[1]
    if name is not None and differs:
        setup.lose(_given_of(setup, "schedule"), differs)
    if not is_adamw(setup) and setup.is_stated("optim.learning_rate"):
        happens = (
            f"a rate for {setup.value('optimizer')} is another number than one for AdamW: it is left "
            "to Mule, whose Muon takes AdamW's rates too (optim.learning_rate: auto)"
        )
        setup.lose(_given_of(setup, "optim.learning_rate"), happens)
    for row in chosen:
        if row.key == "optim.kind" and "instead" in row.note:
            setup.lose(_given_of(setup, "optimizer"), row.note)
    if setup.value("bits") == 8 and setup.value("method", "full") != "full":
        happens = "the frozen weights stay in 16 bits: more memory; adapter.kind: qlora has 4 bits"
        setup.lose(_given_of(setup, "bits"), happens)
    outside = [m for m in setup.value("adapter.lora.target_modules") or () if m in _OUTSIDE_BLOCKS]
    if outside and setup.value("method", "full") != "full":
        happens = f"{', '.join(outside)} get no adapter: Mule adapts the layers of the blocks"
        setup.lose(_given_of(setup, "adapter.lora.target_modules"), happens)
    share = setup.number("warmup_share")
    is_open = setup.is_stated("warmup_share")
    if share and is_open and not any(row.key == "optim.warmup_steps" for row in chosen):
        happens = (
            "Mule counts the warm-up in updates, and their number is known only with the data: "
            "it takes 5% of them, at most 500; `mule plan` tells the number for optim.warmup_steps"
        )
        setup.lose(_given_of(setup, "warmup_share"), happens)
    size = setup.number("val_size")
    if size and size >= 1 and not setup.number("max_samples"):
        happens = "Mule holds out a share, not a count: a fifth of the chats, at most 400"
        setup.lose(_given_of(setup, "val_size"), happens)
    if setup.number("max_samples"):
        happens = "all rows are used; to take fewer: head -n N file.jsonl"
        setup.lose(_given_of(setup, "max_samples"), happens)


def _given_of(setup: ForeignSetup, fact: str) -> Given:
    found = setup.facts[fact]
    return Given(found.key or f"{setup.title}'s default", found.typed or found.value, found.line)
