"""Faults planted in real exports: what each does to a file, and how `mule verify` must name it.

Every fault is one that a converter, a quantiser or a person made somewhere. Most begin with a copy of
the model's folder that is changed and then exported; the others change entries or bytes of a good file.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from mule.adapters.delta import read_deltas
from mule.adapters.identity import base_identity
from mule.export.families import interleave_heads, read_shape
from mule.export.gguf import write_gguf
from mule.export.layout import part_heads
from mule.export.quantize import Quantizer
from mule.export.stored import through_blocks
from mule.models.folder import weight_files

Weights = dict[str, torch.Tensor]
_T = GGMLQuantizationType
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LARGE = 1.2e5  # beyond float16
_SHARDS = ("model.safetensors.index.json", "model-*.safetensors")
_ONE_MLP = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "smollm3", "phi3", "granite")
_EXPERTS = ("qwen3_moe", "granitemoeshared")
_MAMBA = ("granitemoehybrid", "jamba")


@dataclass(frozen=True)
class Case:
    """A model to export wrongly, and room to do it in.

    `base` is what it was trained from; `adapter` makes it of that base, in which case `folder` is the
    merged model; `earlier` is another checkpoint of its run.
    """

    folder: Path
    type_name: str
    scratch: Path
    base: Path | None = None
    adapter: Path | None = None
    earlier: Path | None = None

    @property
    def raw(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())

    def export(self, folder: Path | None = None, **metadata: str) -> Path:
        """A GGUF file of a folder, by our own writer."""
        file = self.scratch / "planted.gguf"
        write_gguf(folder or self.folder, file, self.type_name, metadata=metadata)
        return file

    def changed(
        self,
        weights: Callable[[Weights], Weights] | None = None,
        config: Mapping[str, Any] | None = None,
        drop: tuple[str, ...] = (),
    ) -> Path:
        """A copy of the model's folder, changed."""
        copy = self.scratch / "changed"
        shutil.rmtree(copy, ignore_errors=True)
        left_out = shutil.ignore_patterns("*.gguf", *(_SHARDS if weights else ()))
        shutil.copytree(self.folder, copy, ignore=left_out)
        if weights is not None:
            save_file(
                {name: tensor.contiguous() for name, tensor in weights(self.weights()).items()},
                copy / "model.safetensors",
                metadata={"format": "pt"},
            )
        raw = self.raw | dict(config or {})
        for name in drop:
            raw.pop(name, None)
        (copy / "config.json").write_text(json.dumps(raw))
        return copy

    def weights(self, folder: Path | None = None) -> Weights:
        found: Weights = {}
        for file in weight_files(folder or self.folder):
            found |= {name: tensor.float() for name, tensor in load_file(file).items()}
        return found


@dataclass(frozen=True)
class Fault:
    """`plant` writes a wrong file; the first failure must match `named`.

    `families`: those in which it can happen (empty: all); `needs`: what the case must have.
    """

    title: str
    named: str
    plant: Callable[[Case], Path]
    families: tuple[str, ...] = ()
    types: tuple[str, ...] = ("f16", "q4_k_m")
    needs: tuple[str, ...] = ()
    own_model: bool = False  # the folder of the case is changed too: it must be a copy

    def is_named_in(self, failures: list[str]) -> bool:
        return bool(failures) and re.search(self.named, failures[0]) is not None


FAULTS: dict[str, Fault] = {}


def _fault(name: str, title: str, named: str, **options: Any) -> Callable[..., Any]:
    def register(plant: Callable[[Case], Path]) -> Callable[[Case], Path]:
        FAULTS[name] = Fault(title, named, plant, **options)
        return plant

    return register


def rewritten(
    file: Path,
    entries: Callable[[dict[str, Any]], None] | None = None,
    drop_tensors: tuple[str, ...] = (),
    tensors: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Path:
    """The same tensors under changed entries; an entry that becomes None is left out.

    `tensors` changes numbers of the tensors in float32.
    """
    reader = GGUFReader(file)
    out = file.with_name("rewritten.gguf")
    fields = {key: item for key, item in reader.fields.items() if not key.startswith("GGUF.")}
    values = {key: item.contents() for key, item in fields.items()}
    before = dict(values)
    if entries is not None:
        entries(values)
    writer = GGUFWriter(out, values["general.architecture"])
    for key, value in values.items():
        if key == "general.architecture" or value is None:
            continue
        kinds = fields[key].types if key in before else []
        if kinds:
            writer.add_key_value(key, value, kinds[0], kinds[-1] if len(kinds) > 1 else None)
        else:
            writer.add_string(key, value)
    for tensor in reader.tensors:
        if not re.search("|".join(drop_tensors) or "$^", tensor.name):
            data = np.asarray(tensor.data)
            if tensors is not None and tensor.tensor_type == _T.F32:
                data = tensors(tensor.name, data).astype(np.float32)
            writer.add_tensor(tensor.name, data, raw_shape=data.shape, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.unlink()
    return out.rename(file)


def _entry(case: Case, **changes: Any) -> Path:
    """A good file with other values of entries, by the ends of their keys (dots as two _)."""

    def change(values: dict[str, Any]) -> None:
        for name, value in changes.items():
            end = name.replace("__", ".")
            key = next((key for key in values if key.endswith(end)), None)
            assert key is not None, f"no entry ends in {end}"
            values[key] = value(values[key]) if callable(value) else value

    return rewritten(case.export(), change)


def _each(weights: Weights, part: str) -> list[str]:
    return [name for name in weights if f".{part}." in name]


# ---------------------------------------------------------------- which weights


@_fault(
    "adapter left out",
    "the base was exported in place of the merged model",
    r"the adapter was left out: the weights are the base's",
    needs=("adapter",),
    types=("f16", "q8_0", "q4_k_m"),
)
def _left_out(case: Case) -> Path:
    return case.export(case.base)


@_fault(
    "merged twice",
    "the adapter was merged into a model that had it already",
    r"the adapter is in it twice",
    needs=("adapter",),
    types=("f16", "q8_0", "q4_k_m"),
)
def _twice(case: Case) -> Path:
    assert case.adapter is not None
    deltas = read_deltas(case.adapter)

    def again(weights: Weights) -> Weights:
        return {n: deltas[n].merged(w) if n in deltas else w for n, w in weights.items()}

    return case.export(case.changed(again))


@_fault(
    "half strength",
    "the adapter was merged with half of its alpha",
    r"the adapter is in it at 0\.5 times its strength",
    needs=("adapter",),
)
def _half(case: Case) -> Path:
    def half(weights: Weights) -> Weights:
        base = case.weights(case.base)
        return {n: (w + base[n]) / 2 if n in base else w for n, w in weights.items()}

    return case.export(case.changed(half))


@_fault(
    "training left out",
    "the model that training began with was exported",
    r"the training is not in it: the weights are those it began with",
    needs=("base",),
)
def _untrained(case: Case) -> Path:
    return case.export(case.base)


@_fault(
    "stale checkpoint",
    "an earlier checkpoint of the run was exported",
    r"stale: the weights are those of .*checkpoint-",
    needs=("earlier",),
)
def _stale(case: Case) -> Path:
    return case.export(case.earlier)


@_fault(
    "other state",
    "the file was made from a state of the model that is no longer there",
    r"another state of this model",
    types=("f16", "q8_0"),
)
def _other_state(case: Case) -> Path:
    def moved(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(1)
        return {
            n: w + 0.2 * w.std() * torch.randn(w.shape, generator=generator) if w.dim() > 1 else w
            for n, w in weights.items()
        }

    return case.export(case.changed(moved))


@_fault(
    "a step before",
    "the file is of a state one step before, which nobody kept",
    r"stale: the file says that it was written from other weights",
    types=("q4_k_m",),
)
def _step_before(case: Case) -> Path:
    def moved(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(4)
        return {
            n: w + 0.01 * w.std() * torch.randn(w.shape, generator=generator) if w.dim() > 1 else w
            for n, w in weights.items()
        }

    before = case.changed(moved)
    return case.export(before, **{"mule.weights": base_identity(before)["weights"] or ""})


@_fault(
    "other model",
    "the file of another model of the same shape",
    r"the weights are those of another model",
    types=("f16", "q4_k_m"),
)
def _other_model(case: Case) -> Path:
    def drawn(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(2)
        return {
            n: w.std() * torch.randn(w.shape, generator=generator) if w.dim() > 1 else w
            for n, w in weights.items()
        }

    return case.export(case.changed(drawn))


@_fault(
    "quantised twice",
    "made from a file that was quantised already",
    r"made from an already quantised file: the grid of Q8_0",
    types=("f16", "q4_k_m"),
)
def _quantised_twice(case: Case) -> Path:
    with Quantizer() as quantizer:

        def grid(weights: Weights) -> Weights:
            return {
                n: torch.from_numpy(
                    through_blocks(quantizer, n, w.flatten(0, -2).numpy(), _T.Q8_0)
                ).view_as(w)
                if w.dim() > 1 and w.shape[-1] % 32 == 0
                else w
                for n, w in weights.items()
            }

        return case.export(case.changed(grid))


# ---------------------------------------------------------------- where the weights are


@_fault(
    "q and k unpermuted",
    "the rows of q and k were left as the folder has them",
    r"q and k rows are not permuted",
    families=("llama", "mistral", "smollm3", "granite", "granitemoeshared", "granitemoehybrid"),
)
def _unpermuted(case: Case) -> Path:
    return case.export(case.changed(_turned(case, part_heads)))


@_fault(
    "q and k permuted",
    "the rows of q and k were interleaved in a family that must not",
    r"q and k rows are permuted, and this family's are not",
    families=("qwen2", "qwen3", "gemma3_text", "qwen3_moe"),
)
def _permuted(case: Case) -> Path:
    return case.export(case.changed(_turned(case, interleave_heads)))


def _turned(case: Case, how: Callable[[Any, int], Any]) -> Callable[[Weights], Weights]:
    _, shape = read_shape(case.folder)

    def turn(weights: Weights) -> Weights:
        for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            for name in _each(weights, part):
                weights[name] = torch.from_numpy(how(weights[name].numpy(), heads).copy())
        return weights

    return turn


@_fault("gate and up swapped", "gate and up changed places", r"gate and up are swapped")
def _gate_and_up(case: Case) -> Path:
    def swap(weights: Weights) -> Weights:
        for name in _each(weights, "gate_proj"):
            other = name.replace("gate_proj", "up_proj")
            weights[name], weights[other] = weights[other], weights[name]
        for name in [*_each(weights, "gate_up_proj"), *_each(weights, "input_linear")]:
            weights[name] = weights[name].roll(weights[name].shape[-2] // 2, -2)
        return weights

    return case.export(case.changed(swap))


@_fault(
    "layers swapped",
    "two layers changed places",
    r"layers 1 and 2 are swapped",
    families=(*_ONE_MLP, *_EXPERTS),
)
def _layers(case: Case) -> Path:
    def swap(weights: Weights) -> Weights:
        other = {"1": "2", "2": "1"}
        return {
            re.sub(r"(layers\.)([12])\.", lambda m: f"{m[1]}{other[m[2]]}.", name): tensor
            for name, tensor in weights.items()
        }

    return case.export(case.changed(swap))


@_fault(
    "vocabulary shifted",
    "the rows of the embedding moved by one token",
    r"vocabulary rows shifted down by 1",
)
def _shifted(case: Case) -> Path:
    def shift(weights: Weights) -> Weights:
        for name in {_EMBEDDING, _HEAD} & weights.keys():
            weights[name] = weights[name].roll(1, 0)
        return weights

    return case.export(case.changed(shift))


@_fault(
    "tokens shifted",
    "the list of tokens moved by one",
    r"vocabulary shifted by 1",
)
def _tokens_shifted(case: Case) -> Path:
    return _entry(case, tokenizer__ggml__tokens=lambda tokens: [*tokens[-1:], *tokens[:-1]])


@_fault(
    "norm + 1 forgotten",
    "Gemma's norms were written as the folder has them",
    r"norm \+ 1 forgotten",
    families=("gemma3_text",),
)
def _norm(case: Case) -> Path:
    def less(weights: Weights) -> Weights:
        return {n: w - 1 if n.endswith("norm.weight") else w for n, w in weights.items()}

    return case.export(case.changed(less))


@_fault(
    "head left out",
    "the head was taken to be the embedding",
    r"the model has a head of its own.*\(tied wrongly\)",
    families=("llama", "mistral", "qwen3", "phi3"),
)
def _head_left_out(case: Case) -> Path:
    return rewritten(case.export(), drop_tensors=("output.weight",))


@_fault(
    "head is the embedding",
    "the embedding was written twice, the head not at all",
    r"the head is not the model's: it is a copy of the embedding",
    families=("llama", "mistral", "qwen3", "phi3"),
)
def _head_copied(case: Case) -> Path:
    def copy(weights: Weights) -> Weights:
        return weights | {_HEAD: weights[_EMBEDDING].clone()}

    return case.export(case.changed(copy))


@_fault(
    "head untied",
    "a model whose head is its embedding got another one",
    r"the head is a matrix of its own.*\(untied wrongly\)",
    families=("qwen2", "granite"),
)
def _head_untied(case: Case) -> Path:
    def add(weights: Weights) -> Weights:
        generator = torch.Generator().manual_seed(3)
        drawn = torch.randn(weights[_EMBEDDING].shape, generator=generator)
        return weights | {_HEAD: drawn * weights[_EMBEDDING].std()}

    return case.export(case.changed(add, {"tie_word_embeddings": False}))


@_fault("scaled", "one matrix was multiplied by 8", r"multiplied by (8|7\.9)")
def _scaled(case: Case) -> Path:
    def scale(weights: Weights) -> Weights:
        return weights | {_EMBEDDING: weights[_EMBEDDING] * 8}

    return case.export(case.changed(scale))


@_fault("a layer of zeros", "a tensor was never filled", r"nothing but zeros")
def _zeros(case: Case) -> Path:
    def clear(weights: Weights) -> Weights:
        name = next(n for n in weights if re.search(r"layers\.1\..*(down_proj|output_linear)", n))
        return weights | {name: torch.zeros_like(weights[name])}

    return case.export(case.changed(clear))


@_fault(
    "damaged bytes",
    "bytes in the middle of the file were changed",
    r"other numbers than the model's|damaged",
    types=("q8_0", "q4_k_m"),
)
def _damaged(case: Case) -> Path:
    file = case.export()
    content = bytearray(file.read_bytes())
    place = len(content) * 2 // 3
    content[place : place + 4000] = bytes(b ^ 0x55 for b in content[place : place + 4000])
    file.write_bytes(content)
    return file


@_fault(
    "f16 overflow",
    "a weight beyond float16 was written as f16",
    r"f16 overflow: inf",
    families=_ONE_MLP,
    types=("f16",),
    own_model=True,
)
def _overflow(case: Case) -> Path:
    name, tensor = "model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"
    file = case.export()
    found = next(t for t in GGUFReader(file).tensors if t.name == tensor)
    row, column = 3, 5
    content = bytearray(file.read_bytes())
    place = int(found.data_offset) + 2 * (row * int(found.shape[0]) + column)
    content[place : place + 2] = np.float16("inf").tobytes()
    file.write_bytes(content)
    weights = case.weights()
    weights[name][row, column] = _LARGE
    for shards in _SHARDS:
        for shard in case.folder.glob(shards):
            shard.unlink()
    save_file(weights, case.folder / "model.safetensors", metadata={"format": "pt"})
    return file


@_fault("cut short", "the copy was interrupted", r"structure: cut short", types=("f16",))
def _cut(case: Case) -> Path:
    file = case.export()
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])
    return file


# ---------------------------------------------------------------- experts


@_fault(
    "experts swapped",
    "two experts of a layer changed places, the router's rows did not",
    r"experts 0 and 1 are swapped",
    families=_EXPERTS,
)
def _experts_swapped(case: Case) -> Path:
    other = {"0": "1", "1": "0"}

    def swap(weights: Weights) -> Weights:
        for name in [*_each(weights, "input_linear"), *_each(weights, "output_linear")]:
            if weights[name].dim() == 3:
                order = [1, 0, *range(2, len(weights[name]))]
                weights[name] = weights[name][order]
        return {
            re.sub(r"(experts\.)([01])\.", lambda m: f"{m[1]}{other[m[2]]}.", name): tensor
            for name, tensor in weights.items()
        }

    return case.export(case.changed(swap))


@_fault(
    "experts' gate and up swapped",
    "gate and up of every expert changed places",
    r"the experts' gate and up are swapped",
    families=_EXPERTS,
)
def _experts_gate_and_up(case: Case) -> Path:
    def swap(weights: Weights) -> Weights:
        for name in [n for n in _each(weights, "gate_proj") if ".experts." in n]:
            other = name.replace("gate_proj", "up_proj")
            weights[name], weights[other] = weights[other], weights[name]
        for name in _each(weights, "input_linear"):
            if weights[name].dim() == 3:
                weights[name] = weights[name].roll(weights[name].shape[1] // 2, 1)
        return weights

    return case.export(case.changed(swap))


@_fault(
    "router shifted",
    "the rows of the routers moved by one expert",
    r"the router's rows shifted down by 1",
    families=_EXPERTS,
)
def _router(case: Case) -> Path:
    def shift(weights: Weights) -> Weights:
        for name in [n for n in weights if n.endswith(("mlp.gate.weight", "router.layer.weight"))]:
            weights[name] = weights[name].roll(1, 0)
        return weights

    return case.export(case.changed(shift))


@_fault(
    "shared expert left out",
    "the tensors of the expert that every token passes are missing",
    r"the shared expert is left out",
    families=("granitemoeshared",),
)
def _shared_left_out(case: Case) -> Path:
    return rewritten(case.export(), drop_tensors=("_shexp",))


@_fault(
    "experts a token",
    "one expert less is asked for each token",
    r"experts a token 1, the model has 2",
    families=_EXPERTS,
)
def _fewer_experts(case: Case) -> Path:
    return _entry(case, expert_used_count=1)


# ---------------------------------------------------------------- state-space layers


def _decays(case: Case, change: Callable[[np.ndarray], np.ndarray], part: str) -> Path:
    """A good file with other numbers in one tensor of each Mamba layer."""
    return rewritten(
        case.export(), tensors=lambda name, data: change(data) if name.endswith(part) else data
    )


@_fault(
    "A's sign forgotten",
    "exp(A_log) was written, without the minus",
    r"A of a Mamba layer has the wrong sign",
    families=_MAMBA,
)
def _sign(case: Case) -> Path:
    return _decays(case, np.negative, ".ssm_a")


@_fault(
    "A_log written",
    "A_log was written as the folder has it",
    r"A of a Mamba layer is its logarithm",
    families=_MAMBA,
)
def _logarithm(case: Case) -> Path:
    return _decays(case, lambda a: np.log(-a), ".ssm_a")


@_fault(
    "D forgotten",
    "what passes a Mamba layer unchanged was left at zero",
    r"D of a Mamba layer was forgotten",
    families=_MAMBA,
)
def _skip(case: Case) -> Path:
    return _decays(case, np.zeros_like, ".ssm_d")


@_fault(
    "convolution reversed",
    "the short convolution runs from the newest token to the oldest",
    r"the convolution of a Mamba layer runs backwards",
    families=_MAMBA,
)
def _convolution(case: Case) -> Path:
    def flip(weights: Weights) -> Weights:
        for name in [n for n in weights if n.endswith("conv1d.weight")]:
            weights[name] = weights[name].flip(-1)
        return weights

    return case.export(case.changed(flip))


@_fault(
    "x and z swapped",
    "the two halves of a Mamba layer's first matrix changed places",
    r"x and z of a Mamba layer are swapped",
    families=_MAMBA,
)
def _halves(case: Case) -> Path:
    _, shape = read_shape(case.folder)
    assert shape.ssm is not None
    inner = shape.ssm.inner

    def swap(weights: Weights) -> Weights:
        for name in [n for n in weights if n.endswith("mamba.in_proj.weight")]:
            z, x, rest = weights[name].split([inner, inner, len(weights[name]) - 2 * inner])
            weights[name] = torch.cat([x, z, rest])
        return weights

    return case.export(case.changed(swap))


@_fault(
    "positions turned",
    "a hybrid without rotary positions was said to have them",
    r"rotary positions True, the model has False",
    families=("granitemoehybrid",),
)
def _turning(case: Case) -> Path:
    return _entry(case, rope__scaling__finetuned=True)


# ---------------------------------------------------------------- what the file says


@_fault(
    "rope base",
    "another base of the rotary positions",
    r"RoPE base 12345, the model has",
    families=(*_ONE_MLP, *_EXPERTS),
)
def _rope_base(case: Case) -> Path:
    return _entry(case, rope__freq_base=12345.0)


@_fault("norm epsilon", "another epsilon of the norms", r"norm epsilon 0\.01, the model has")
def _epsilon(case: Case) -> Path:
    return _entry(case, layer_norm_rms_epsilon=1e-2)


@_fault(
    "heads", "another number of attention heads", r"number of attention heads 2, the model has 4"
)
def _heads(case: Case) -> Path:
    return _entry(case, attention__head_count=2)


@_fault(
    "missing scale",
    "the scale of the logits was left out",
    r"missing logit scale",
    families=("granite", "granitemoeshared"),
)
def _logit_scale(case: Case) -> Path:
    return _entry(case, logit_scale=None)


@_fault(
    "attention scale",
    "the scale of the attention was left out",
    r"missing attention scale",
    families=("granite", "granitemoeshared"),
)
def _attention_scale(case: Case) -> Path:
    return _entry(case, attention__scale=None)


@_fault(
    "sliding window",
    "the window of every layer but each sixth was left out",
    r"missing sliding window",
    families=("gemma3_text",),
)
def _window(case: Case) -> Path:
    return _entry(case, attention__sliding_window=None)


@_fault("pre-tokenizer", "text is cut as another model's", r"wrong pre-tokenizer: 'qwen2'")
def _pre(case: Case) -> Path:
    return _entry(case, tokenizer__ggml__pre="qwen2")


@_fault("merges", "some merges of the tokenizer are missing", r"merges, the model has")
def _merges(case: Case) -> Path:
    return _entry(case, tokenizer__ggml__merges=lambda merges: merges[:-40])


@_fault("BOS", "a BOS before texts that the model never saw with one", r"a BOS too many")
def _bos(case: Case) -> Path:
    return _entry(case, add_bos_token=True)


@_fault("EOS", "another token ends the answers", r"wrong EOS: token 300")
def _eos(case: Case) -> Path:
    return _entry(case, eos_token_id=300)


@_fault("chat template", "the template of another model", r"wrong chat template: from character")
def _template(case: Case) -> Path:
    return _entry(case, chat_template=lambda text: text.replace("assistant", "model"))


@_fault("no chat template", "the template was left out", r"missing chat template")
def _no_template(case: Case) -> Path:
    return _entry(case, tokenizer__chat_template=None)
