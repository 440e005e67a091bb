"""Seeds of GGUF and safetensors files, and what must hold of a broken one that is accepted."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.quants import GGMLQuantizationType, quantize
from safetensors import safe_open
from safetensors.numpy import save

from mule.generate.gguf_header import read_header
from mule.models.tensor_file import stored_tensors


@functools.cache
def ggufs() -> tuple[bytes, ...]:
    """A file with all that is checked of a vocabulary, and one without."""
    seeds = []
    for tokens in (["a", "é", "<0x0A>", "<|end|>"], []):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "m.gguf"
            write_gguf(file, tokens)
            seeds.append(file.read_bytes())
    return tuple(seeds)


def write_gguf(file: Path, tokens: list[str]) -> None:
    """Three tensors, one of them in blocks, and `tokens` of which the last one ends a text."""
    writer = GGUFWriter(str(file), "llama")
    writer.add_uint32("general.alignment", 32)
    writer.add_float32("llama.rope.freq_base", 1e6)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types([6 if token.startswith("<0x") else 1 for token in tokens])
        writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_chat_template("{{ messages }}")
    blocks = quantize(np.ones((2, 64), np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(5, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@functools.cache
def safetensors() -> tuple[bytes, ...]:
    """Files of two tensors, of twelve (one of them empty), and of none."""
    tensors = {"a.weight": np.ones((3, 4), np.float32), "b": np.ones((), np.int64)}
    more = {f"layer.{n}.weight": np.full((n, 2), 0.5, np.float16) for n in range(12)}
    return (save(tensors, {"format": "pt"}), save(more), save({}))


def read_gguf(file: Path) -> None:
    """What is accepted lies inside the file, in places of its own."""
    header = read_header(file)
    spans = sorted((tensor.offset, tensor.offset + tensor.num_bytes) for tensor in header.tensors)
    assert all(start >= stop for (_, stop), (start, _) in itertools.pairwise(spans))
    assert not spans or spans[-1][1] <= header.size_bytes


def read_safetensors(file: Path) -> None:
    """What is accepted, the library accepts too, and sees as we do."""
    found = {tensor.name: tensor.shape for tensor in stored_tensors(file)}
    with safe_open(file, framework="numpy") as opened:
        assert {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()} == found
