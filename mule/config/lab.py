"""What models are compared at which size: two sections of a campaign file (mule/config/campaign.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from mule.config.adapter import Text
from mule.config.architecture import Count, RoutingSection
from mule.config.section import Problem, Section, knob

Amount = (
    Annotated[int, Field(ge=1)] | Annotated[str, Field(pattern=r"^[1-9][0-9]*(\.[0-9]+)?[kmbg]$")]
)
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}
_FORM = "a number, followed by k, m or b, such as 125m"
_EXPERT_KEYS = ("experts_per_token", "shared_expert", *RoutingSection.model_fields)


def amount(value: int | str) -> int:
    """A number from its short form: 125m is 125,000,000."""
    return value if isinstance(value, int) else round(float(value[:-1]) * _UNITS[value[-1]])


class BudgetSection(Section):
    """What all variants have in common: the active parameters, or the FLOPs of a token."""

    active_params: Amount | None = knob(
        None, "Parameters that a token passes, of which the shapes are made.", form=_FORM
    )
    flops_per_token: Amount | None = knob(
        None,
        "With mode=flops_per_token, in place of active_params: FLOPs of training on one token.",
        form=_FORM,
    )
    counted: Literal["all", "without_embeddings"] = knob(
        "all", "Whether active_params has the embedding and the head in it."
    )
    mode: Literal["active_params", "flops_per_token"] = knob(
        "active_params",
        "What is equal in all variants. With flops_per_token and active_params given: the FLOPs of a "
        "dense model with full attention of that many parameters.",
    )
    tolerance: Annotated[float, Field(gt=0, lt=0.5)] | None = knob(
        None,
        "Greatest share by which a variant may miss the budget. Default: 0.005 for dense models from "
        "100m, else 0.015.",
    )
    hidden_size: Count | None = knob(
        None, "Width of the residual stream, the same in all. Default: chosen for the budget."
    )
    num_layers: Count | None = knob(
        None, "Blocks of a variant that does not spend on layers. Default: chosen for the budget."
    )
    head_dim: Literal[32, 64, 128] | None = knob(
        None, "Width of an attention head. Default: 64; below 10m parameters 32."
    )
    tie_embeddings: bool = knob(True, "Use the embedding matrix as the output head too.")

    def of_size(self, size: int | str) -> BudgetSection:
        """The same with another size in place of its own."""
        key = "flops_per_token" if self.active_params is None else "active_params"
        return self.model_copy(update={key: size})

    def idle(self) -> Iterator[Problem]:
        if self.active_params is not None:
            why = "cannot take effect: active_params says the size; keep one of the two"
            yield Problem("flops_per_token", why, because="active_params")
        if self.active_params is None:
            why = "cannot take effect without active_params; set it, or remove this"
            yield Problem("counted", why, because="active_params")

    def conflicts(self) -> Iterator[Problem]:
        if self.active_params is None and self.flops_per_token is None:
            yield Problem("active_params", "missing: how large the variants are, such as 10m")
        elif self.flops_per_token is not None and self.mode == "active_params":
            yield Problem("flops_per_token", "given, but mode=active_params; add the mode's name")


class VariantSection(RoutingSection):
    """What one variant has that others have not; its dimensions are solved for the budget."""

    family: Literal["llama", "qwen3"] | None = knob(
        None, "Of attention without experts: qwen3 has QK-norm, llama has none. Default: qwen3."
    )
    mixer: Literal["attention", "mamba2", "mamba1", "hybrid"] = knob(
        "attention",
        "What mixes tokens; hybrid is Mamba-2 with attention in every so many-th block.",
    )
    attention_every: Annotated[int, Field(ge=2)] | None = knob(
        None, "With mixer hybrid, or mamba1: every so many-th block attends. Default of hybrid: 6."
    )
    attention: Literal["mha", "gqa", "mqa"] = knob(
        "mha", "A key/value head for each query head, for each group of them, or one for all."
    )
    num_kv_heads: Count | None = knob(
        None, "With gqa: key/value heads. Default: a quarter of the query heads, or near it."
    )
    spend: Literal["mlp", "heads", "layers"] | None = knob(
        None,
        "With gqa and mqa: where the saved parameters go: a wider feed-forward layer, more query "
        "heads, or more blocks. Default: mlp.",
    )
    num_experts: Annotated[int, Field(ge=2, le=1024)] | None = knob(
        None, "Experts in place of the feed-forward layer. Default: none."
    )
    experts_per_token: Count | None = knob(
        None, "Experts that a token passes, at most num_experts. Default: 2."
    )
    shared_expert: bool = knob(False, "One expert more, as wide, that every token passes.")
    state_size: Count | None = knob(
        None, "Of Mamba blocks: numbers of state a channel keeps. Default: 128, with mamba1 16."
    )
    sliding_window: Count | None = knob(
        None, "Tokens that attention sees, itself included. Default: all.", unit="tokens"
    )
    position_embedding: Literal["rope", "none"] | None = knob(
        None, "Rotary positions or none. Default: rope, and none beside Mamba blocks."
    )
    module: Text | None = knob(
        None,
        "Your own model in place of all this: FILE.py:Class, as `mule lab check` examines it.",
    )
    module_args: dict[Text, Any] | None = knob(
        None,
        "With module: what its class, or the class's config, is given. The vocabulary and the length "
        "of a row are filled in.",
        form="entries of a name and a value, such as {n_layer: 4}",
    )

    @property
    def attends(self) -> bool:
        """Whether any block has attention."""
        return self.mixer in ("attention", "hybrid") or self.attention_every is not None

    def idle(self) -> Iterator[Problem]:
        if self.module is not None:
            why = f"cannot take effect: module={self.module} brings its own; remove one of the two"
            for name in type(self).model_fields:
                if name not in ("module", "module_args"):
                    yield Problem(name, why, because="module")
            return
        why = "cannot take effect without module; set it, or remove this"
        yield Problem("module_args", why, because="module")
        yield from super().idle()
        yield from self._idle_experts()
        yield from self._idle_attention()
        if self.mixer == "attention":
            why = "cannot take effect with mixer=attention; remove it, or set mixer"
            yield Problem("state_size", why, because="mixer")

    def _idle_experts(self) -> Iterator[Problem]:
        if self.num_experts is None:
            why = "cannot take effect without num_experts; set it, or remove this"
            for name in _EXPERT_KEYS:
                yield Problem(name, why, because="num_experts")
        if self.family is not None and (self.num_experts or self.position_embedding == "none"):
            because = "num_experts" if self.num_experts else "position_embedding"
            why = f"cannot take effect: {because} says the family; remove one of the two"
            yield Problem("family", why, because=because)

    def _idle_attention(self) -> Iterator[Problem]:
        why = f"cannot take effect with mixer={self.mixer}; remove it"
        if self.mixer in ("attention", "mamba2"):
            yield Problem("attention_every", f"{why}, or use hybrid", because="mixer")
        if self.mixer != "attention":
            for name in ("family", "sliding_window"):
                yield Problem(name, why, because="mixer")
        if not self.attends:
            why = f"cannot take effect: with mixer={self.mixer} no block attends; remove it"
            for name in ("attention", "num_kv_heads", "spend", "position_embedding"):
                yield Problem(name, why, because="mixer")
        else:
            why = f"cannot take effect with attention={self.attention}; remove it, or use gqa"
            if self.attention != "gqa":
                yield Problem("num_kv_heads", why, because="attention")
            if self.attention == "mha":
                yield Problem("spend", why, because="attention")
        if self.mixer == "mamba1":
            why = "cannot take effect: Mamba-1 models (jamba) have no rotary positions; remove it"
            yield Problem("position_embedding", why, because="mixer")

    def conflicts(self) -> Iterator[Problem]:
        if self.num_experts and (self.experts_per_token or 2) > self.num_experts:
            chosen = self.experts_per_token or 2
            yield Problem(
                "experts_per_token", f"{chosen} experts a token of {self.num_experts} in all"
            )
        if self.num_experts and self.mixer == "mamba1":
            yield Problem(
                "num_experts", "no family has Mamba-1 and experts that we train; use mamba2"
            )
        if self.num_experts and self.mixer in ("mamba2", "hybrid") and not self.shared_expert:
            yield Problem(
                "num_experts",
                f"with mixer={self.mixer} every block has a shared expert too; set shared_expert",
            )
        if self.sliding_window and (self.shared_expert or self.position_embedding == "none"):
            other = "shared_expert" if self.shared_expert else "position_embedding"
            yield Problem("sliding_window", f"no family has it beside {other}; remove one of both")
        if self.position_embedding == "none" and self.num_experts and not self.shared_expert:
            yield Problem(
                "position_embedding",
                "none, with experts: only a family with a shared expert has it; set shared_expert",
            )
