"""The settings of the model, beside the other sections of mule/config/schema.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from mule.config.adapter import Text
from mule.config.section import Problem, Section, knob, section

Count = Annotated[int, Field(ge=1)]
CountFromZero = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, le=10)]

_EXPERT_FAMILIES = ("qwen3_moe", "granitemoeshared")  # each block is a mixture
_WINDOW_FAMILIES = ("qwen3", "qwen3_moe")


class RoutingSection(Section):
    """How the router of a mixture of experts is trained."""

    balance: Literal["aux", "bias", "none"] | None = knob(
        None,
        "What keeps the experts equally busy: an auxiliary loss, or a bias on the router's choice "
        "that is moved after every update, without a loss. Default: aux.",
    )
    aux_loss: Weight | None = knob(None, "Weight of the auxiliary loss. Default: 0.01.")
    z_loss: Weight | None = knob(
        None, "Weight of the loss that keeps the router's logits small; 0 is none. Default: 0.001."
    )
    bias_rate: Annotated[float, Field(gt=0, le=1)] | None = knob(
        None, "With balance=bias: what an update moves an expert's bias by. Default: 0.001."
    )
    capacity_factor: Annotated[float, Field(gt=0, le=1024)] | None = knob(
        None,
        "In training an expert takes at most this many times its even share of a batch's tokens. "
        "Default: all that come (dropless), as always in evaluation.",
    )
    overflow: Literal["drop", "reroute"] | None = knob(
        None,
        "With capacity_factor: tokens beyond it pass without this expert, those of the smallest "
        "router weight first, or go to their next best expert that has room. Default: drop.",
    )

    def idle(self) -> Iterator[Problem]:
        balance = self.balance or "aux"
        why = f"cannot take effect with balance={balance}; remove it"
        if balance != "aux":
            yield Problem("aux_loss", f"{why}, or use aux", because="balance")
        if balance != "bias":
            yield Problem("bias_rate", f"{why}, or use bias", because="balance")
        if self.capacity_factor is None:
            why = (
                "cannot take effect: without capacity_factor an expert takes every token that comes; "
                "set it, or remove this"
            )
            yield Problem("overflow", why, because="capacity_factor")

    def routing(self) -> dict[str, Any]:
        """What is set of it, by name."""
        asked = {name: getattr(self, name) for name in RoutingSection.model_fields}
        return {name: value for name, value in asked.items() if value is not None}


class MoESection(RoutingSection):
    """A mixture of experts in place of the feed-forward layer, and how its router is trained."""

    num_experts: Annotated[int, Field(ge=2, le=1024)] | None = knob(
        None,
        "Experts of a block. Default: 8; with granitemoehybrid none, so an ordinary feed-forward "
        "layer.",
    )
    experts_per_token: Count | None = knob(
        None, "Experts that a token passes, at most num_experts. Default: 2."
    )
    intermediate_size: Count | None = knob(
        None,
        "Width of one expert. Default: such that the experts of a token are together as wide as the "
        "feed-forward layer that they replace.",
    )
    shared_intermediate_size: CountFromZero | None = knob(
        None,
        "Width of an expert that every token passes beside its own; 0 is none. Default: as wide as "
        "one expert where the family has it (granitemoeshared, granitemoehybrid).",
    )

    def conflicts(self) -> Iterator[Problem]:
        experts, chosen = self.num_experts or 8, self.experts_per_token or 2
        if chosen > experts:
            yield Problem("experts_per_token", f"{chosen} experts a token of {experts} in all")


class MambaSection(Section):
    """State-space layers in place of attention: Mamba-2 with granitemoehybrid, Mamba-1 with jamba."""

    kind: Literal["mamba2", "mamba1", "none"] | None = knob(
        None,
        "mamba2 with granitemoehybrid, mamba1 with jamba; none, with granitemoehybrid, is attention "
        "in every block. Default: that of the family.",
    )
    attention_every: Annotated[int, Field(ge=2)] | None = knob(
        None,
        "Every so many-th block attends, beginning with this one. Default: no block attends.",
        unit="blocks",
    )
    state_size: Count | None = knob(
        None, "Numbers of state that a channel keeps. Default: 128, with mamba1 16."
    )
    num_heads: Count | None = knob(
        None,
        "Heads, of one decay each; with mamba1 channels. num_heads x head_dim is a multiple of "
        "model.hidden_size. Default: such that it is twice that.",
    )
    head_dim: Count | None = knob(None, "Channels of a head, with mamba2. Default: 64.")
    num_groups: Count | None = knob(
        None,
        "Groups of heads that share what they read and write, with mamba2; divides num_heads. "
        "Default: 1.",
    )
    conv_kernel: Annotated[int, Field(ge=2, le=64)] | None = knob(
        None, "Tokens that the short convolution sees. Default: 4.", unit="tokens"
    )
    chunk_size: Annotated[int, Field(ge=8, le=4096)] | None = knob(
        None,
        "Tokens that are computed as one matrix, with mamba2: a matter of speed. Default: 128.",
        unit="tokens",
    )
    dt_rank: Count | None = knob(
        None, "Bottleneck of the step sizes, with mamba1. Default: model.hidden_size / 16."
    )

    def conflicts(self) -> Iterator[Problem]:
        heads, groups = self.num_heads, self.num_groups
        if heads and groups and heads % groups:
            yield Problem("num_groups", f"{groups} does not divide model.mamba.num_heads = {heads}")


def _keys(kind: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a section, and of those below it."""
    for name, field in kind.model_fields.items():
        below = field.annotation
        if isinstance(below, type) and issubclass(below, Section):
            yield from _keys(below, f"{prefix}{name}.")
        else:
            yield prefix + name


class ModelSection(Section):
    """What is trained: a model to start from, a named size, or explicit dimensions."""

    path: Text | None = knob(
        None, "Model to start from: a run, a folder in Hugging Face layout, or a hub id."
    )
    revision: Text | None = knob(
        None, "Of a hub id: the branch, tag or commit to take. What it names then is recorded."
    )
    size: Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?[mb]$")] | None = knob(
        None,
        "Named size of a new model, such as 25m; docs/sizes.md lists them. "
        "Dimensions given beside it replace its own.",
        form="a number followed by m or b, such as 25m",
    )
    family: Literal[
        "llama", "qwen3", "qwen3_moe", "granitemoeshared", "granitemoehybrid", "jamba"
    ] = knob(
        "qwen3",
        "Architecture of a new model, named as in transformers. qwen3 adds QK-norm to llama; "
        "qwen3_moe has experts, granitemoeshared a shared expert too; granitemoehybrid has Mamba-2 "
        "blocks, jamba Mamba-1 blocks.",
    )
    hidden_size: Count | None = knob(None, "Width of the residual stream.")
    num_layers: Count | None = knob(None, "Number of decoder blocks.")
    num_heads: Count | None = knob(None, "Query heads of each attention layer.")
    num_kv_heads: Count | None = knob(
        None,
        "Key and value heads: equal to num_heads is MHA, 1 is MQA, between them GQA. "
        "Default: num_heads.",
    )
    head_dim: Count | None = knob(
        None, "Width of one head, an even number. Default: hidden_size / num_heads."
    )
    intermediate_size: Count | None = knob(
        None,
        "Width of the SwiGLU feed-forward layer. Default: chosen from hidden_size. Of experts: "
        "model.moe.intermediate_size.",
    )
    sliding_window: Count | None = knob(
        None,
        "Tokens that attention sees, itself included, in the blocks of sliding_layers; qwen3 and "
        "qwen3_moe. Default: all.",
        unit="tokens",
    )
    sliding_layers: Annotated[list[CountFromZero], Field(min_length=1)] | None = knob(
        None, "Blocks that sliding_window is for, counted from 0; qwen3. Default: all."
    )
    position_embedding: Literal["rope", "none"] | None = knob(
        None,
        "Rotary positions, or none at all; granitemoehybrid. Default: rope, and none beside Mamba "
        "blocks, which tell the order themselves.",
    )
    tie_embeddings: bool = knob(True, "Use the embedding matrix as the output head too.")
    rope_theta: Annotated[float, Field(ge=1)] = knob(10_000.0, "Base of the rotary positions.")
    max_position_embeddings: Count | None = knob(
        None, "Longest context the model declares. Default: data.max_seq_length.", unit="tokens"
    )
    vocab_size: Count | None = knob(
        None,
        "Rows of the embedding matrix, at least the tokenizer's size. Default: the tokenizer's "
        "size, rounded up.",
    )
    module: Text | None = knob(
        None,
        "A model of your own, FILE.py:Class; a campaign sets it for the runs of such a variant.",
    )
    module_args: list[Text] = knob([], "With module: what its class was given, as name=value.")
    moe: MoESection = section(MoESection)
    mamba: MambaSection = section(MambaSection)

    @property
    def has_experts(self) -> bool:
        """Whether a new model's feed-forward layers are mixtures of experts."""
        is_asked = self.family == "granitemoehybrid" and self.moe.num_experts is not None
        return is_asked or self.family in _EXPERT_FAMILIES

    @property
    def mixer(self) -> Literal["attention", "mamba2", "mamba1"]:
        """What a new model's blocks have, but for those of attention_every."""
        if self.family == "jamba":
            return "mamba1"
        is_mamba = self.family == "granitemoehybrid" and self.mamba.kind != "none"
        return "mamba2" if is_mamba else "attention"

    @property
    def attends(self) -> bool:
        """Whether a new model has any attention."""
        return self.mixer == "attention" or self.mamba.attention_every is not None

    @property
    def has_rope(self) -> bool:
        """Whether a new model's attention turns queries and keys by their positions."""
        if not self.attends or self.family == "jamba":
            return False
        return (self.position_embedding or "rope") == "rope" and (
            self.mixer == "attention" or self.position_embedding is not None
        )

    def idle(self) -> Iterator[Problem]:
        if self.path is not None:
            yield from self._idle_beside_path(self.path)
            return
        if self.module is not None:
            why = (
                f"cannot take effect: model.module={self.module} brings its own; remove one of both"
            )
            for name in _keys(type(self)):
                if name not in ("module", "module_args"):
                    yield Problem(name, why, because="module")
            return
        why = "cannot take effect without model.module; set it, or remove this"
        yield Problem("module_args", why, because="module")
        why = "cannot take effect: a new model has no hub id; set model.path, or remove it"
        yield Problem("revision", why, because="path")
        yield from self._idle_experts()
        yield from self._idle_mamba()
        yield from self._idle_attention()

    def _idle_beside_path(self, path: str) -> Iterator[Problem]:
        why = f"cannot take effect: model.path={path} brings its own; remove one of the two"
        for name in type(self).model_fields:
            if name not in ("path", "revision", "moe", "mamba"):
                yield Problem(name, why, because="path")
        for name in MoESection.model_fields:
            if name not in RoutingSection.model_fields:  # which also holds for a trained model
                yield Problem(f"moe.{name}", why, because="path")
        for name in MambaSection.model_fields:
            yield Problem(f"mamba.{name}", why, because="path")

    def _idle_experts(self) -> Iterator[Problem]:
        if self.has_experts:
            why = "cannot take effect: every block has experts; set model.moe.intermediate_size"
            yield Problem("intermediate_size", why, because="family")
            if self.family == "qwen3_moe":
                why = "cannot take effect: qwen3_moe has no shared expert; use granitemoeshared"
                yield Problem("moe.shared_intermediate_size", why, because="family")
            return
        optional = self.family == "granitemoehybrid"
        why = f"cannot take effect: model.family={self.family} has no experts; "
        why += "set model.moe.num_experts" if optional else "use qwen3_moe or granitemoeshared"
        for name in MoESection.model_fields:
            if not (optional and name == "num_experts"):
                yield Problem(f"moe.{name}", why, because="family")

    def _idle_mamba(self) -> Iterator[Problem]:
        mixer = self.mixer
        if mixer == "attention":
            optional = self.family == "granitemoehybrid"
            what = "model.mamba.kind=none" if optional else f"model.family={self.family}"
            why = f"cannot take effect: with {what} no block is one of Mamba; "
            why += "remove one of the two" if optional else "use granitemoehybrid or jamba"
            for name in MambaSection.model_fields:
                if not (optional and name == "kind"):
                    because = "mamba.kind" if optional else "family"
                    yield Problem(f"mamba.{name}", why, because=because)
            return
        others = {"mamba1": ("head_dim", "num_groups", "chunk_size"), "mamba2": ("dt_rank",)}
        for name in others[mixer]:
            why = f"cannot take effect: {mixer}, of model.family={self.family}, has none; remove it"
            yield Problem(f"mamba.{name}", why, because="family")

    def _idle_attention(self) -> Iterator[Problem]:
        if not self.attends:
            why = "cannot take effect: no block attends; set model.mamba.attention_every"
            for name in ("num_heads", "num_kv_heads", "head_dim"):
                yield Problem(name, why, because="family")
        if self.family != "granitemoehybrid" or not self.attends:
            why = "cannot take effect: only granitemoehybrid, where it attends, has the choice"
            yield Problem("position_embedding", why, because="family")
        if not self.has_rope:
            why = "cannot take effect: this model has no rotary positions; remove it"
            yield Problem("rope_theta", why, because="family")
        if self.family not in _WINDOW_FAMILIES:
            why = f"cannot take effect: {self.family} sees all tokens; use qwen3 or qwen3_moe"
            yield Problem("sliding_window", why, because="family")
        if self.sliding_window is None:
            why = "cannot take effect without model.sliding_window; set it, or remove this"
            yield Problem("sliding_layers", why, because="sliding_window")
        elif self.family == "qwen3_moe":
            why = "cannot take effect: the window of qwen3_moe is that of every block; remove it"
            yield Problem("sliding_layers", why, because="family")

    def conflicts(self) -> Iterator[Problem]:
        heads, kv_heads, hidden = self.num_heads, self.num_kv_heads, self.hidden_size
        if heads and kv_heads and heads % kv_heads:
            yield Problem("num_kv_heads", f"{kv_heads} does not divide num_heads = {heads}")
        if self.head_dim and self.head_dim % 2:
            yield Problem("head_dim", f"{self.head_dim} is odd; rotary positions need an even one")
        if heads and hidden and not self.head_dim and hidden % (2 * heads):
            yield Problem(
                "num_heads",
                f"hidden_size {hidden} / {heads} heads is not an even whole number; "
                "change one of them, or give model.head_dim",
            )
        kinds = {"granitemoehybrid": ("mamba2", "none"), "jamba": ("mamba1",)}
        kind, possible = self.mamba.kind, kinds.get(self.family, ())
        if kind and possible and kind not in possible:
            yield Problem(
                "mamba.kind",
                f"{kind}, but model.family={self.family} has {' or '.join(possible)}; change one",
            )
        if self.has_experts and self.family == "granitemoehybrid":
            if self.moe.shared_intermediate_size == 0:
                yield Problem(
                    "moe.shared_intermediate_size",
                    "0, but every block of granitemoehybrid has a shared expert; give its width",
                )
