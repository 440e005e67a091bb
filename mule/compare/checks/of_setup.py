"""Checks of what is trained on what: adapter, precision, data, length, batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mule.compare.checks.mistake import (
    NOTHING,
    WASTED,
    WRECKED,
    Mistake,
    Texts,
    is_adapter,
    say,
    say_of,
)
from mule.compare.checks.model_facts import MODULES, context_of, families_of, template_family
from mule.compare.dialects.data_sets import DataSet, known_rows
from mule.compare.dialects.foreign_setup import ForeignSetup
from mule.compare.dialects.to_recipe import update_rows
from mule.config.hints import near

_MOST_EPOCHS = 30
_MOST_MICRO_TOKENS = 131_072  # of one device at once
_MOST_ROWS = 1024  # of an update of a fine-tune
_SHORT_ROW = 128  # tokens
_SHORT_TRIAL = 50  # updates
_MOST_VALID = 0.5
_MISSPELT_CUTOFF = 0.75
_TEXTS = ("text_rows", "text")

_A_RATE = "2e-4 for an adapter, 2e-5 for all weights"
_A_LENGTH = "the updates of 1 to 3 epochs"
_ZEROS = (  # fact, code, why nothing is learned, what to write
    ("adapter.lora.r", "rank-zero", "an adapter of rank 0 has no weights", "8 or 16"),
    ("adapter.lora.alpha", "alpha-zero", "alpha / r multiplies all that it adds", "r or 2 x r"),
    ("lora_scale", "alpha-zero", "scale multiplies all that it adds", "2, or mlx-lm's own 20"),
    ("optim.learning_rate", "rate-zero", "nothing moves at a rate of 0", _A_RATE),
    ("train.epochs", "length-zero", "no row is read", "1 to 3"),
    ("train.steps", "length-zero", "no update is made", _A_LENGTH),
    ("iterations", "length-zero", "no update is made", _A_LENGTH),
    ("micro_rows", "batch-zero", "an update without rows", "1 or more"),
    ("global_rows", "batch-zero", "an update without rows", "1 or more"),
    ("accumulation", "batch-zero", "an update of nothing", "1 or more"),
)


def _zeros(setup: ForeignSetup) -> Iterator[Mistake]:
    """Values that leave nothing to learn with."""
    for fact, code, why, do in _ZEROS:
        value = setup.number(fact)
        is_used = is_adapter(setup) or not fact.startswith(("adapter.", "lora_"))
        if value is not None and value <= 0 and is_used:
            yield say(setup, fact, code, NOTHING, (f"{value:g}", why, do))


def _two_precisions(setup: ForeignSetup) -> Iterator[Mistake]:
    if setup.value("bf16") is True and setup.value("fp16") is True:
        texts = (
            "bf16 and fp16 are both on",
            "a product has one precision; the tool refuses it",
            "bf16 where the GPU has it (since Ampere), else fp16",
        )
        yield say(setup, "fp16", "two-precisions", NOTHING, texts)


def _quantised_and_full(setup: ForeignSetup) -> Iterator[Mistake]:
    bits = setup.number("bits")
    if bits and not is_adapter(setup):
        texts = (
            f"{bits:g} bits without an adapter",
            "quantised weights have no gradient: all weights cannot be trained in them",
            "an adapter (LoRA on 4 bits is QLoRA), or no quantisation",
        )
        source = "QLoRA, arXiv:2305.14314, section 3"
        yield say(setup, "bits", "quantised-full", NOTHING, texts, source=source)


def _qlora_without_bits(setup: ForeignSetup) -> Iterator[Mistake]:
    off = setup.given.get("load_in_4bit")
    if setup.value("adapter") == "qlora" and off is not None and off.value is False:
        texts = (
            "adapter: qlora with load_in_4bit: false",
            "the tool refuses it",
            "load_in_4bit: true, or adapter: lora",
        )
        yield say_of(off, "qlora-without-bits", NOTHING, texts)


def _adapter_off(setup: ForeignSetup) -> Iterator[Mistake]:
    """LoRA's keys, and nothing that switches an adapter on."""
    names = ("lora_r", "lora_rank", "lora_alpha")
    keys = [setup.given[name] for name in names if setup.raw(name)]
    if keys and not is_adapter(setup) and not setup.value("bits"):
        texts = (
            f"{keys[0].key} is given, and no adapter is switched on",
            "all weights would be trained, at a rate meant for an adapter",
            "switch it on (use_peft: true, adapter: lora, finetuning_type: lora)",
        )
        yield say_of(keys[0], "adapter-off", WRECKED, texts)


def _targets(setup: ForeignSetup) -> Iterator[Mistake]:
    targets = setup.value("adapter.lora.target_modules")
    if not is_adapter(setup) or not isinstance(targets, list):
        return
    for name in targets:
        match = near(name, MODULES, _MISSPELT_CUTOFF)
        if name not in MODULES and match is not None:
            texts = (
                f"`{name}` is no layer of a known family",
                "an adapter goes only where a name fits: this one is missing, or the run is refused",
                f"did you mean `{match}`?",
            )
            yield say(setup, "adapter.lora.target_modules", "target-misspelt", NOTHING, texts)


def _patience(setup: ForeignSetup) -> Iterator[Mistake]:
    patience = setup.number("evaluate.patience")
    validates = setup.value("data.valid") is not None or setup.value("validates", False)
    if patience and not validates and not setup.number("val_size"):
        texts = (
            f"stops after {patience:g} evaluations, and nothing is held out",
            "there is no validation loss to wait for",
            "hold out 5 to 10% of the data, or take the early stopping away",
        )
        yield say(setup, "evaluate.patience", "stopping-without-validation", NOTHING, texts)


# ---------------------------------------------------------------- model and data


def _context(setup: ForeignSetup) -> Iterator[Mistake]:
    name, length = str(setup.value("model.path", "")), setup.number("data.max_seq_length")
    longest = context_of(name)
    if length and longest and length > longest:
        texts = (
            f"{length:,.0f} tokens; {name} has a context of {longest:,}",
            "beyond it the positions were never trained",
            f"at most {longest:,}",
        )
        source = "the model's config.json"
        yield say(setup, "data.max_seq_length", "beyond-context", WRECKED, texts, source=source)


def _template(setup: ForeignSetup) -> Iterator[Mistake]:
    template, name = str(setup.value("template", "")), str(setup.value("model.path", ""))
    theirs, models = template_family(template), families_of(name)
    if not setup.value("pretrain") and theirs and models and theirs not in models:
        texts = (
            f"the template is {theirs}'s, the model is {' or '.join(sorted(models))}'s",
            "its marks are no tokens of the model: answers never end as they were trained to",
            "the template of the model's own family",
        )
        yield say(setup, "template", "foreign-template", WRECKED, texts)


def _data_kind(setup: ForeignSetup) -> Iterator[Mistake]:
    fact = "data.train" if "data.train" in setup.facts else "sets"
    for one in setup.value("sets", []):
        if (texts := _wrong_kind(setup, one)) is not None:
            yield say(setup, fact, "data-of-another-kind", NOTHING, texts)


def _wrong_kind(setup: ForeignSetup, one: DataSet) -> Texts | None:
    known, stated, where = one.known_format, one.format, one.name or one.path
    if "preference" in (known, stated):
        return (
            f"{where} holds pairs of answers",
            "this trains on one answer, not on which of two is better",
            "a set of chats or texts",
        )
    if known and stated and known != stated:
        return (
            f"{where} holds {known} rows, read as {stated}",
            "its rows lack the columns that are looked for",
            f"the type for {known} rows",
        )
    if known in _TEXTS and setup.value("stage") == "sft":
        return (f"{where} holds texts without questions", "there is no answer", "stage: pt")
    if known and known not in _TEXTS and setup.value("pretrain"):
        return (f"{where} holds chats", "pretraining reads the column `text`", "a set of texts")
    return None


def _short_rows(setup: ForeignSetup) -> Iterator[Mistake]:
    length = setup.number("data.max_seq_length")
    shortest = _SHORT_ROW - 1 if setup.value("pretrain") else _SHORT_ROW
    if length and length <= shortest:
        why = "most chats are longer: they are cut or left out"
        if setup.value("data.packing"):
            why += ", and hardly two fit into a packed row"
        texts = (f"{length:g} tokens", why, "1,024 or more")
        yield say(setup, "data.max_seq_length", "rows-too-short", WRECKED, texts)


def _held_out(setup: ForeignSetup) -> Iterator[Mistake]:
    share = setup.number("val_size")
    if share and _MOST_VALID <= share < 1:
        texts = (f"{share:g} of the data is held out", "only the rest is learned", "0.02 to 0.1")
        yield say(setup, "val_size", "too-much-held-out", WRECKED, texts)


def _prompts(setup: ForeignSetup) -> Iterator[Mistake]:
    if setup.value("on_prompt") is True and not setup.value("pretrain"):
        texts = (
            "the questions are trained too",
            "the model learns to ask, and the loss counts words that it never has to say",
            "false: only the answers are trained",
        )
        yield say(setup, "on_prompt", "questions-trained", WASTED, texts)


# ---------------------------------------------------------------- batch and length


def _batch(setup: ForeignSetup) -> Iterator[Mistake]:
    micro, length = setup.number("micro_rows"), setup.number("data.max_seq_length")
    total, devices = setup.number("global_rows"), setup.number("devices") or 1
    if micro and total and total < micro * devices:
        texts = (
            f"an update of {total:g} rows in parts of {micro:g} on {devices:g} devices",
            "the part is larger than the whole",
            "micro_batch_size at most global_batch_size / devices",
        )
        yield say(setup, "micro_rows", "part-above-whole", NOTHING, texts)
        return
    longest = context_of(str(setup.value("model.path", "")))
    if length and longest:  # of rows that no model takes, the length is the mistake
        length = min(length, longest)
    if micro and length and micro > 1 and micro * length > _MOST_MICRO_TOKENS:
        texts = (
            f"{micro:g} rows of {length:,.0f} tokens on one device at once",
            "this looks like the size of the whole update: it would not fit, and be multiplied "
            "again by the accumulation and the devices",
            "1 to 16 rows, and accumulate",
        )
        yield say(setup, "micro_rows", "whole-as-part", WRECKED, texts)


def _update_size(setup: ForeignSetup) -> Iterator[Mistake]:
    rows = update_rows(setup)
    if rows and rows > _MOST_ROWS and not setup.value("pretrain"):
        facts = ("global_rows", "accumulation", "micro_rows")
        fact = max(facts, key=lambda name: setup.number(name) or 0)
        texts = (f"{rows:,} rows an update", "few updates are left to learn from", "16 to 128 rows")
        source = "Alpaca (128), LLaMA-2 Chat, arXiv:2307.09288 (64)"
        yield say(setup, fact, "update-too-large", WASTED, texts, source=source)


def _left_over(setup: ForeignSetup) -> Iterator[Mistake]:
    """A few updates from a trial, where epochs are meant."""
    steps, epochs = setup.number("train.steps"), setup.number("train.epochs")
    if not steps or not epochs or setup.value("pretrain") or not setup.is_stated("train.epochs"):
        return
    rows, size = known_rows(setup), update_rows(setup)
    meant = rows * epochs / size if rows and size else None
    if steps <= _SHORT_TRIAL or (meant and steps < meant / 10):
        texts = (
            f"{steps:g} updates beside {epochs:g} epochs",
            "the updates go before the epochs: the run ends after a trial",
            "take the updates away, or the epochs",
        )
        yield say(setup, "train.steps", "trial-left-over", WRECKED, texts)


def _epochs(setup: ForeignSetup) -> Iterator[Mistake]:
    epochs = setup.number("train.epochs")
    if epochs and epochs > _MOST_EPOCHS and setup.number("train.steps") is None:
        texts = (f"{epochs:g} epochs", "the data is known by heart long before", "1 to 5")
        source = "LIMA, arXiv:2305.11206 (15 epochs of 1,000 rows)"
        yield say(setup, "train.epochs", "too-many-epochs", WRECKED, texts, source=source)


CHECKS: tuple[Callable[[ForeignSetup], Iterator[Mistake]], ...] = (
    *(_zeros, _two_precisions, _quantised_and_full, _qlora_without_bits, _data_kind, _targets),
    *(_patience, _batch, _adapter_off, _template, _context, _left_over, _epochs, _short_rows),
    *(_held_out, _prompts, _update_size),
)
