"""GGUF files that cannot be what they say: cases 73-86, refused by name before native code sees them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from mule.generate.gguf_header import read_header
from tests.badinput.test_weight_files import refused
from tests.conftest import Mule
from tests.fuzz.model_files import write_gguf

_UINT32, _STRING, _ARRAY, _BYTE_TYPE = 4, 8, 9, 6


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def number(key: str, value: int) -> bytes:
    return pair(key, _UINT32, struct.pack("<I", value))


def texts(key: str, *values: str) -> bytes:
    head = struct.pack("<IQ", _STRING, len(values))
    return pair(key, _ARRAY, head + b"".join(text(value) for value in values))


def numbers(key: str, *values: int) -> bytes:
    return pair(key, _ARRAY, struct.pack(f"<IQ{len(values)}I", _UINT32, len(values), *values))


def tensor(name: str, sizes: tuple[int, ...], offset: int = 0, kind: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def gguf(*parts: bytes, tensors: tuple[bytes, ...] = (), version: int = 3) -> bytes:
    """A file of these entries and tensors, with 256 bytes of data."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(parts))
    content = head + b"".join(parts) + b"".join(tensors)
    return content + bytes(-len(content) % 32) + bytes(256)


VOCABULARY = texts("tokenizer.ggml.tokens", "a", "<0x0A>", "b")
GGUFS: dict[str, tuple[bytes, str]] = {
    "73 empty": (b"", "announces 4 bytes but has 0 bytes left"),
    "73 magic only": (b"GGUF", "announces 4 bytes but has 0 bytes left"),
    **{
        f"74 version {version}": (
            gguf(version=version),
            f"GGUF version {version}; 2 and 3 are known",
        )
        for version in (0, 1, 9)
    },
    "75 entries": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + bytes(99),
        "announces 9,223,372,036,854,775,808 metadata entries but has 99 bytes left",
    ),
    "75 tensors": (
        b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(99),
        "announces 9,223,372,036,854,775,808 tensors but has 99 bytes left",
    ),
    "75 entries that fit": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 10**5) + bytes(2 * 10**6),
        "announces 100,000 metadata entries; more than 65,536 are not read",
    ),
    "76 a string": (
        gguf(pair("general.name", _STRING, struct.pack("<Q", 2**40))),
        "an array or string of 1,099,511,627,776 items",
    ),
    "77 an array": (
        gguf(pair("general.name", _ARRAY, struct.pack("<IQ", _UINT32, 2**40))),
        "an array or string of 1,099,511,627,776 items",
    ),
    "77 an array of what is not left": (
        gguf(pair("general.name", _ARRAY, struct.pack("<IQ", _UINT32, 2**20))),
        "announces 1,048,576 array items but has",
    ),
    "78 arrays 200 deep": (
        gguf(pair("a", _ARRAY, struct.pack("<IQ", _ARRAY, 1) * 200)),
        "an array of arrays, which llama.cpp does not read",
    ),
    "79 a key twice": (
        gguf(number("a.b", 1), number("a.b", 2)),
        "the key 'a.b' is there twice",
    ),
    "80 alignment 0": (gguf(number("general.alignment", 0)), "alignment 0"),
    "80 alignment 13": (gguf(number("general.alignment", 13)), "alignment 13"),
    "80 alignment as text": (
        gguf(pair("general.alignment", _STRING, text("32"))),
        "general.alignment is of value type 8, not a whole number of 32 bits",
    ),
    "81 a size that no number holds": (
        gguf(tensors=(tensor("a", (2**40, 2**40)),)),
        "tensor 'a' of shape [1099511627776, 1099511627776] has more numbers than 63 bits count",
    ),
    "81 1000 dimensions": (
        gguf(tensors=(text("a") + struct.pack("<I", 1000),)),
        "tensor 'a' has 1000 dimensions",
    ),
    "81 a size of 0": (gguf(tensors=(tensor("a", (0,)),)), "tensor 'a' of shape [0] cannot be"),
    "82 beyond the end": (
        gguf(tensors=(tensor("a", (32,), offset=2**50),)),
        "cut short: tensor 'a' ends at byte",
    ),
    "82 an overlap": (
        gguf(tensors=(tensor("a", (32,)), tensor("b", (8,), offset=32))),
        "tensor 'b' overlaps the one before it",
    ),
    "82 a gap": (
        gguf(tensors=(tensor("a", (8,)), tensor("b", (8,), offset=64))),
        "tensor 'b' leaves a gap behind the one before it",
    ),
    "82 unaligned": (
        gguf(tensors=(tensor("a", (8,), offset=4),)),
        "tensor 'a' starts at an unaligned place",
    ),
    "83 a tensor of no type": (
        gguf(tensors=(tensor("a", (8,), kind=77),)),
        "tensor 'a' has the unknown type 77",
    ),
    "83 a value of no type": (gguf(pair("a", 13, b"")), "unknown value type 13"),
    "84 a template of 64 kB": (
        gguf(pair("tokenizer.chat_template", _STRING, text("{{ a }}" * 10_000))),
        "a chat template of 70,000 bytes; at most 65,536 are read",
    ),
    "84 a second template": (
        gguf(pair("tokenizer.chat_template.tools", _STRING, text("{{ a }}" * 10_000))),
        "a chat template of 70,000 bytes",
    ),
    "84 a template that is a number": (
        gguf(number("tokenizer.chat_template", 7)),
        "tokenizer.chat_template is not a text",
    ),
    "85 a byte of -1": (
        gguf(texts("tokenizer.ggml.tokens", "a", "<0x-1>")),
        "token 1 is '<0x-1>', which is no byte from <0x00> on",
    ),
    "85 a byte token that is none": (
        gguf(texts("tokenizer.ggml.tokens", "a"), numbers("tokenizer.ggml.token_type", _BYTE_TYPE)),
        "token 0 is 'a', which is no byte",
    ),
    "85 too few types": (
        gguf(VOCABULARY, numbers("tokenizer.ggml.token_type", 1, 1)),
        "tokenizer.ggml.token_type is not a list with one entry for each of 3 tokens",
    ),
    "85 too many scores": (
        gguf(VOCABULARY, numbers("tokenizer.ggml.scores", *range(4))),
        "tokenizer.ggml.scores is not a list with one entry for each of 3 tokens",
    ),
    "85 tokens that are numbers": (
        gguf(numbers("tokenizer.ggml.tokens", 1, 2)),
        "tokenizer.ggml.tokens is not a list of texts",
    ),
    "86 eos beyond the vocabulary": (
        gguf(VOCABULARY, number("tokenizer.ggml.eos_token_id", 3)),
        "tokenizer.ggml.eos_token_id is 3, and there are 3 tokens",
    ),
    "86 bos negative": (
        gguf(VOCABULARY, pair("tokenizer.ggml.bos_token_id", 5, struct.pack("<i", -1))),
        "tokenizer.ggml.bos_token_id is -1, and there are 3 tokens",
    ),
}


@pytest.mark.parametrize("case", GGUFS)
def test_a_broken_gguf_file(tmp_path: Path, case: str) -> None:
    content, message = GGUFS[case]
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    refused(lambda: read_header(file), message)
    refused(lambda: read_header(file), f"{file}: ")


def test_what_is_right_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    ends = (number("tokenizer.ggml.eos_token_id", 2), number("tokenizer.ggml.padding_token_id", 9))
    file.write_bytes(gguf(VOCABULARY, *ends, tensors=(tensor("a", (8,)), tensor("b", (8,), 32))))
    assert [found.offset for found in read_header(file).tensors] == [0, 32]
    write_gguf(file, ["a", "<0x0A>", "<|end|>"])
    assert read_header(file).metadata["tokenizer.ggml.eos_token_id"] == 2


@pytest.mark.parametrize("case", ["73 empty", "82 an overlap", "85 a byte of -1"])
def test_a_broken_file_ends_a_command_with_one_error(
    mule_cli: Mule, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    Path("broken.gguf").write_bytes(GGUFS[case][0])
    monkeypatch.setattr("subprocess.Popen", None)  # llama.cpp is not started
    code, _, error = mule_cli("chat", "broken.gguf", "--prompt", "Hi")
    assert code == 2
    assert error.startswith("error: broken.gguf: ") and "Traceback" not in error
