"""UTF-8 text out of bytes; every other encoding is recognised and named, never guessed through."""

from __future__ import annotations

import codecs
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mule.data.sources.files import OnBytes, compression, open_unpacked
from mule.errors import DataError

_PART_BYTES = 1 << 20
_BOMS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
# Which of four bytes are zero (0) where mostly Latin letters are written in an encoding.
_ZEROS = {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}
_CP1252 = frozenset(range(0x80, 0xA0)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D}


def read_text_parts(file: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, int]]:
    """(text, line it begins in) of a UTF-8 text file, about 1 MB each, LF line ends.

    A part ends with a line, unless that line is longer than a part. Raises DataError, also when
    the file holds nothing but space.
    """
    is_empty = True
    held = ""  # a CR whose LF may be in the next part
    with open_unpacked(file, on_bytes) as stream:
        check_start(file, stream)
        for part, line in decoded_parts(file, stream):
            text = held + part
            held = "\r" if text.endswith("\r") else ""
            text = (text[:-1] if held else text).replace("\r\n", "\n")
            is_empty = is_empty and not text.strip()
            if text:
                yield text, line
    if held:
        yield held, line
    if is_empty:
        raise DataError(file, None, "the file is empty", "put data in it, or leave it out")


def decoded_parts(
    file: Path, stream: io.BufferedReader, line: int = 1
) -> Iterator[tuple[str, int]]:
    """(text, line it begins in) of the rest of `stream`; cut after lines where these are short."""
    rest = b""
    while content := stream.read(_PART_BYTES):
        content = rest + content
        cut = content.rfind(b"\n") + 1 or _character_end(content)
        content, rest = content[:cut], content[cut:]
        if not content:
            continue
        yield from _decoded(file, content, line)
        line += content.count(b"\n")
    if rest:
        yield from _decoded(file, rest, line)


def check_start(file: Path, stream: io.BufferedReader) -> None:
    """Refuse UTF-16 and UTF-32 by name; step over a UTF-8 byte-order mark."""
    start = stream.peek(4096)[:4096]
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
        return
    name = next((name for mark, name in _BOMS if start.startswith(mark)), None)
    name = name or _name_by_zeros(start)
    if name is not None:
        raise DataError(file, None, f"the file is {name}, not UTF-8", _iconv(file, name))


def decode_line(file: Path, content: bytes, line: int) -> str:
    """The text of UTF-8 `content`, which begins at `line`. Raises DataError."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        _fail_decoding(file, content, line, error.start)
    if "\x00" in text:
        at = line + text.count("\n", 0, text.index("\x00"))
        raise DataError(file, at, "a NUL byte: this is not a text file", "leave this file out")
    return text


def _decoded(file: Path, content: bytes, line: int) -> Iterator[tuple[str, int]]:
    """`content` as text; what precedes a bad byte is given before the error is raised."""
    try:
        text = decode_line(file, content, line)
    except DataError:
        good = _good_bytes(content)
        good = good[: good.rfind(b"\n") + 1]
        if good:
            yield good.decode(), line
        raise
    yield text, line


def _good_bytes(content: bytes) -> bytes:
    content = content.partition(b"\x00")[0]
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content[: error.start]
    return content


def _character_end(content: bytes) -> int:
    """Where the last whole character of `content` ends."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:  # the first byte of a character of several
            num_bytes = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(content) - back if back < num_bytes else len(content)
        if byte < 0x80:
            break
    return len(content)


def _name_by_zeros(start: bytes) -> str | None:
    whole = start[: len(start) // 4 * 4]
    if len(whole) < 4 or b"\x00" not in whole:
        return None
    quarter = len(whole) // 4
    # Mostly zero, or hardly ever: a text in that encoding is nearly all one or the other.
    zeros = "".join("0" if whole[n::4].count(0) * 2 > quarter else "x" for n in range(4))
    return _ZEROS.get(zeros)


def _fail_decoding(file: Path, content: bytes, line: int, at: int) -> NoReturn:
    begin = content.rfind(b"\n", 0, at) + 1
    end = content.find(b"\n", at)
    row = content[begin : end if end >= 0 else len(content)]
    is_windows = any(byte in _CP1252 for byte in row)
    name, codec = ("Windows-1252", "CP1252") if is_windows else ("Latin-1", "LATIN1")
    raise DataError(
        file,
        line + content.count(b"\n", 0, at),
        f"invalid UTF-8 (byte 0x{content[at]:02x}) at byte {at - begin + 1} of the line",
        f"if it is {name}: {_iconv(file, codec)}",
    ) from None


def _iconv(file: Path, encoding: str) -> str:
    name = shlex.quote(file.name)
    packed = compression(file)
    if not packed:
        return f"iconv -f {encoding} -t UTF-8 {name} > {shlex.quote('new-' + file.name)}"
    tool = {".gz": "gunzip -c", ".zst": "zstd -dc"}[packed]
    new = shlex.quote("new-" + file.stem)
    return f"{tool} {name} | iconv -f {encoding} -t UTF-8 > {new}"
