"""Broken versions of good inputs: everything follows from a random.Random."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random

_EDGES = (0, 1, -1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63)
_TOKENS = (
    b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\r", b"\r\n", b"\t", b";", b"|",
    b"\x00", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"-Infinity", b"1e999", b"null",
    b"\\ud800", b"\\u00", b'""', b'","', b"[[[[", b'{"a":', b"0" * 5000, b"[" * 2000, b" " * 3000,
    b'{"a":1,"a":2}', b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", "é\u2028😀".encode(),
)  # fmt: skip
_SCALARS = (
    "NaN",
    "-0",
    "1e400",
    '"\\ud83d"',
    '"é"',
    '""',
    "true",
    "null",
    "12",
    "[]",
    "{}",
    "1" * 99,
)


def mutate(random: Random, seeds: Sequence[bytes]) -> bytes:
    """One of `seeds` after one to six changes."""
    content = random.choice(seeds)
    for _ in range(random.randint(1, 6)):
        content = random.choice(_MUTATORS)(random, content, seeds)
    return content


def json_text(random: Random, depth: int = 4) -> str:
    """Text of the JSON grammar, now and then with a small fault."""
    if random.random() < 0.02:
        return random.choice(("{", "]", '"', ",", "tru", "01", "'a'", "\n"))
    kind = random.randrange(3) if depth else 0
    space = random.choice(("", " ", "\n", "\r\n"))
    items = [json_text(random, depth - 1) for _ in range(random.randrange(4))] if kind else []
    if kind == 1:
        return f"[{space}{f',{space}'.join(items)}{space}]"
    if kind == 2:
        keys = (random.choice(("text", "a", "b", "messages", "é")) for _ in items)
        pairs = (f"{json.dumps(key)}:{space}{item}" for key, item in zip(keys, items))
        return f"{{{space}{','.join(pairs)}{space}}}"
    return random.choice(_SCALARS)


def _flip_bit(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    if not content:
        return b"\x01"
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def _cut(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    return content[: random.randint(0, len(content))]


def _drop_slice(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    begin, end = _slice(random, content)
    return content[:begin] + content[end:]


def _repeat_slice(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    begin, end = _slice(random, content)
    return content[:end] + content[begin:end] * random.choice((1, 2, 50)) + content[end:]


def _splice(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    other = random.choice(seeds)
    return content[: random.randint(0, len(content))] + other[random.randint(0, len(other)) :]


def _insert_token(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    at = random.randint(0, len(content))
    return content[:at] + random.choice(_TOKENS) + content[at:]


def _write_edge(random: Random, content: bytes, seeds: Sequence[bytes]) -> bytes:
    order, code = random.choice("<>"), random.choice("BHIQ")
    size = struct.calcsize(code)
    value = random.choice(_EDGES) % (1 << 8 * size)
    at = random.randint(0, max(0, len(content) - size))
    return content[:at] + struct.pack(order + code, value) + content[at + size :]


def _slice(random: Random, content: bytes) -> tuple[int, int]:
    begin = random.randint(0, len(content))
    return begin, min(len(content), begin + random.choice((1, 4, 30, 1000)))


_MUTATORS: tuple[Callable[[Random, bytes, Sequence[bytes]], bytes], ...] = (
    _flip_bit,
    _cut,
    _drop_slice,
    _repeat_slice,
    _splice,
    _insert_token,
    _write_edge,
)
