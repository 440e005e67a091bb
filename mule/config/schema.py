"""Every setting of Mule, once: its type, limits, default, meaning and role.

This file feeds validation, `--help`, docs/configuration.md, the JSON Schema and the web form.
Role: an *identity* setting changes what is learned, so it is part of a run's fingerprint and may
not change on resume; a *mechanical* setting changes only speed, storage or reporting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from mule.config.adapter import AdapterSection
from mule.config.architecture import ModelSection as ModelSection
from mule.config.optim import OptimSection as OptimSection
from mule.config.section import Problem, Section, knob, section

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
ExportType = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q6_k",
    "q5_k_m",
    "q5_k_s",
    "q4_k_m",
    "q4_k_s",
    "iq4_xs",
    "q3_k_m",
    "q2_k",
    "mxfp4",
]

ChatFormat = Literal[
    "messages", "sharegpt", "alpaca", "dolly", "gsm8k", "pairs", "oasst", "mbpp", "humaneval"
]
TextFormat = Literal["text", "wikitext"]
CHAT_FORMATS: tuple[str, ...] = get_args(ChatFormat)
TEXT_FORMATS: tuple[str, ...] = get_args(TextFormat)
_ONE_OF = (("steps", "epochs", "tokens"), ("step_rows", "step_tokens", "step_examples"))


class TokenizerSection(Section):
    """How text becomes token ids: an existing tokenizer, or a BPE trained on data.train."""

    path: Text | None = knob(None, "A tokenizer.json, a folder that holds one, or a hub id.")
    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] | None = knob(
        None, "Train a byte-level BPE of this size on data.train, when no path is given."
    )

    def idle(self) -> Iterator[Problem]:
        if self.path is not None:
            why = f"cannot take effect: tokenizer.path={self.path} is used as it is; remove one"
            yield Problem("vocab_size", why, because="path")


class DataSection(Section):
    """The files to learn from and how they become rows of tokens."""

    train: list[Text] = knob([], "Files, folders or patterns (*.jsonl) to train on. Required.")
    valid: list[Text] | None = knob(
        None, "Files for validation. Default: data.valid_share of data.train is held out."
    )
    valid_share: Share | Auto = knob(
        "auto",
        "Share of data.train held out for validation; 0 trains without. auto is a fifth of the "
        "chats, at most 400, and none of fewer than 5; of documents 0.02.",
    )
    format: Literal["auto", ChatFormat, "preference", "text_rows", TextFormat] = knob(
        "auto", "What the files hold; docs/data.md describes each. auto looks at every row."
    )
    columns: dict[Text, Text] = knob(
        {},
        "The columns of the files by the name the format has for them, as "
        "data.columns.instruction=question.",
    )
    threads: Literal["best", "all"] = knob(
        "best", "Of an OpenAssistant tree: its best-ranked path, or every path."
    )
    wikitext: Literal["keep", "clean"] = knob(
        "keep", "WikiText's tokenised text: as published, or with the spaces and marks undone."
    )
    max_seq_length: Annotated[int, Field(ge=2, le=1_048_576)] = knob(
        1024, "Length of a training row.", unit="tokens"
    )
    packing: bool = knob(True, "Put several short examples into one row, kept apart by a mask.")
    document_mask: bool = knob(
        False, "In pretraining, keep attention inside each document. Chats are always kept apart."
    )
    too_long: Literal["drop", "error", "truncate"] = knob(
        "drop", "What to do with an example longer than data.max_seq_length."
    )

    def idle(self) -> Iterator[Problem]:
        if self.valid is not None:
            why = "cannot take effect: data.valid is given; remove one of the two"
            yield Problem("valid_share", why, because="valid")
        if self.format in CHAT_FORMATS:
            why = f"cannot take effect: {self.format} examples are always kept apart; remove it"
            yield Problem("document_mask", why, because="format")
        why = f"cannot take effect with data.format={self.format}; remove it"
        if self.format not in ("auto", "oasst"):
            yield Problem("threads", why, because="format")
        if self.format not in ("auto", "wikitext"):
            yield Problem("wikitext", why, because="format")
        if self.format in TEXT_FORMATS:
            yield Problem("columns", why, because="format")


class TrainSection(Section):
    """How long, in what portions and on which device to train."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = knob(
        0, "Seed of the initial weights, the order of the data and dropout."
    )
    steps: Count | None = knob(
        None, "Length of the run; give one of steps, epochs, tokens.", unit="updates"
    )
    epochs: Annotated[float, Field(gt=0)] | None = knob(
        None,
        "Length of the run in passes over the data. Default, if no length is given: 1; of a "
        "fine-tune on chats 1 to 10, the more the fewer they are.",
    )
    tokens: Count | None = knob(None, "Length of the run in trained tokens.", unit="tokens")
    step_tokens: Count | None = knob(
        None,
        "Size of one update; give one of step_rows, step_tokens, step_examples.",
        unit="tokens",
    )
    step_rows: Count | None = knob(None, "Size of one update in rows.", unit="rows")
    step_examples: Count | None = knob(
        None, "Size of one update in examples (chats, documents).", unit="examples"
    )
    micro_batch_rows: Count | Auto = knob(
        "auto",
        "Rows computed at once; an update is cut into as many as needed, with the same result.",
        role="mechanical",
        unit="rows",
    )
    precision: Literal["auto", "bf16", "fp32", "fp16", "fp8"] = knob(
        "auto",
        "Arithmetic of the forward and backward pass; master weights are always fp32. fp16 scales "
        "the loss; fp8 is bf16 with the blocks' products in float8 (extra fp8).",
    )
    dropout: Share = knob(
        0.0,
        "Share of what each block's two halves add that is dropped in training; for data that is "
        "seen many times.",
    )
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = knob(
        "auto",
        "What is computed again in the backward pass to save memory: selective keeps the results "
        "of matrix products and attention, full keeps the blocks' inputs only.",
        role="mechanical",
    )
    sharding: Literal["auto", "none", "full", "hybrid"] = knob(
        "auto",
        "How several processes hold the model: none is a whole one each, full divides it among "
        "all of them, hybrid among those of one machine.",
        role="mechanical",
    )
    freeze: list[Text] = knob(
        [],
        "Weights that stay as they are, as patterns of their names, such as model.embed_tokens.* "
        "or model.layers.0.*.",
    )
    compile: Auto | bool = knob("auto", "Compile the model with torch.compile.", role="mechanical")
    device: Literal["auto", "cpu", "cuda", "mps"] = knob(
        "auto", "Where to train.", role="mechanical"
    )
    threads: Count | Auto = knob("auto", "CPU threads.", role="mechanical")

    def idle(self) -> Iterator[Problem]:
        for group in _ONE_OF:
            for because in (key for key in group if getattr(self, key) is not None):
                for key in group:
                    if key != because:
                        why = f"train.{because} says it already; keep one of {', '.join(group)}"
                        yield Problem(key, why, because)


class CheckpointSection(Section):
    """When the state is saved and how many are kept."""

    every_steps: Count | Auto = knob(
        "auto", "Updates between checkpoints.", role="mechanical", unit="updates"
    )
    keep: Count = knob(2, "Newest checkpoints kept, beside the best one.", role="mechanical")


class EvaluateSection(Section):
    """What is measured while training."""

    every_steps: Count | Auto = knob(
        "auto", "Updates between evaluations.", role="mechanical", unit="updates"
    )
    max_rows: Count = knob(
        64,
        "Validation rows used at each evaluation, spread evenly.",
        role="mechanical",
        unit="rows",
    )
    patience: Count | None = knob(
        None,
        "Stop after so many evaluations in a row without a better validation loss; the best "
        "checkpoint is kept.",
        unit="evaluations",
    )
    prompts: list[Text] = knob(
        [], "Prompts answered at every evaluation, to see the model learn.", role="mechanical"
    )


class GoalSection(Section):
    """What the run is to reach: how likely that is, and when, is forecast while it trains."""

    val_loss: Annotated[float, Field(gt=0)] | None = knob(
        None,
        "A validation loss to reach. Each evaluation says how likely it is by the end and at which "
        "update it is expected; reaching it is told and logged. It does not end the run.",
        role="mechanical",
        unit="nats a token",
    )


class ExportSection(Section):
    """The files made for llama.cpp, Ollama and Docker Model Runner."""

    types: Annotated[list[ExportType], Field(min_length=1)] = knob(
        ["q8_0", "q4_k_m"], "GGUF types to write.", role="mechanical"
    )

    def conflicts(self) -> Iterator[Problem]:
        if twice := sorted({kind for kind in self.types if self.types.count(kind) > 1}):
            yield Problem("types", f"{', '.join(twice)} is listed twice; remove one")


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = knob(
        None,
        "Name of the run's folder. Default: the recipe's file name.",
        role="mechanical",
        form="letters, digits, dot, dash and underscore, at most 100",
    )
    extends: Text | None = knob(
        None,
        "A recipe to start from: a file relative to this one, or a name from `mule recipe list`.",
        role="mechanical",
    )
    model: ModelSection = section(ModelSection)
    tokenizer: TokenizerSection = section(TokenizerSection)
    data: DataSection = section(DataSection)
    train: TrainSection = section(TrainSection)
    optim: OptimSection = section(OptimSection)
    adapter: AdapterSection = section(AdapterSection)
    checkpoint: CheckpointSection = section(CheckpointSection)
    evaluate: EvaluateSection = section(EvaluateSection)
    goal: GoalSection = section(GoalSection)
    export: ExportSection = section(ExportSection)

    def idle(self) -> Iterator[Problem]:
        if self.model.path is not None:
            why = (
                f"cannot take effect: model.path={self.model.path} brings its tokenizer; remove it"
            )
            yield Problem("tokenizer.vocab_size", why, because="model.path")
        if self.adapter.kind != "none":
            why = f"cannot take effect: adapter.kind={self.adapter.kind} freezes every weight; remove it"
            yield Problem("train.freeze", why, because="adapter.kind")

    def conflicts(self) -> Iterator[Problem]:
        rows, ids = self.model.vocab_size, self.tokenizer.vocab_size
        if rows and ids and rows < ids:
            yield Problem(
                "model.vocab_size", f"{rows:,} is less than tokenizer.vocab_size = {ids:,}"
            )
        longest, length = self.model.max_position_embeddings, self.data.max_seq_length
        if longest and longest < length:
            yield Problem(
                "model.max_position_embeddings",
                f"{longest:,} is less than data.max_seq_length = {length:,}; rows would not fit",
            )
