"""A data file opened safely: regular files only, .gz and .zst unpacked, bombs and changes refused."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import shlex
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mule.errors import DataError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".md", ".tokens")
COMPRESSIONS = (".gz", ".zst")
BOMB_RATIO = 200  # text seldom packs better than 1:20
BOMB_BYTES = 100 * 10**6
_BUFFER_BYTES = 1 << 20

OnBytes = Callable[[int], object]
"""Told the number of bytes of the file, as stored, consumed since its last call."""

_UNPACK = {
    ".zip": "unzip {name}",
    ".tar": "tar -xf {name}",
    ".tgz": "tar -xf {name}",
    ".7z": "7z x {name}",
    ".rar": "unrar x {name}",
    ".bz2": "bunzip2 -k {name}",
    ".xz": "xz -dk {name}",
    ".lz4": "lz4 -d {name}",
    ".br": "brotli -d {name}",
}
_CONVERT = {
    ".arrow": "datasets.Dataset.from_file({text!r}).to_json({stem!r} + '.jsonl') in Python",
    ".feather": "pandas.read_feather({text!r}).to_parquet({stem!r} + '.parquet') in Python",
    ".xlsx": "libreoffice --headless --convert-to csv {name}",
    ".xls": "libreoffice --headless --convert-to csv {name}",
    ".ods": "libreoffice --headless --convert-to csv {name}",
    ".docx": "pandoc -t plain --wrap=none -o {base}.txt {name}",
    ".odt": "pandoc -t plain --wrap=none -o {base}.txt {name}",
    ".epub": "pandoc -t plain --wrap=none -o {base}.txt {name}",
    ".html": "pandoc -t plain --wrap=none -o {base}.txt {name}",
    ".doc": "libreoffice --headless --convert-to txt {name}",
    ".pdf": "pdftotext {name}",
    ".sqlite": "sqlite3 -csv -header {name} 'select * from TABLE' > {base}.csv",
    ".db": "sqlite3 -csv -header {name} 'select * from TABLE' > {base}.csv",
}
_CODE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".joblib")
_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"PK\x03\x04": ("a zip archive", ".zip"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"7z\xbc\xaf": ("a 7z archive", ".7z"),
    b"%PDF-": ("PDF", ".pdf"),
    b"PAR1": ("Parquet", ".parquet"),
}


# ---------------------------------------------------------------- names


def data_suffix(file: str | Path) -> str:
    """The suffix that tells the kind of file, in small letters, without .gz or .zst."""
    path = Path(str(file).lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


def compression(file: str | Path) -> str:
    """ ".gz", ".zst" or ""."""
    suffix = Path(file).suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def is_data_file(file: str | Path) -> bool:
    """Whether the name is one of a file Mule reads."""
    return data_suffix(file) in SUFFIXES


def refuse_other_kinds(file: Path) -> None:
    """DataError with the command that helps, for archives, office files and the like."""
    suffix = data_suffix(file)
    names = {
        "name": shlex.quote(file.name),
        "text": file.name,
        "stem": file.stem,
        "base": shlex.quote(file.stem),
    }
    if suffix in _UNPACK:
        hint = f"unpack it: {_UNPACK[suffix].format(**names)}"
        raise DataError(file, None, f"Mule does not read {suffix} archives", hint)
    if suffix in _CONVERT:
        hint = f"convert it: {_CONVERT[suffix].format(**names)}"
        raise DataError(file, None, f"Mule does not read {suffix} files", hint)
    if suffix in _CODE:
        raise DataError(
            file,
            None,
            f"{suffix} files can run code or hold no text, so Mule does not open them",
            "write the rows as JSON lines: json.dumps(row) + '\\n' for each",
        )


# ---------------------------------------------------------------- opening


@contextlib.contextmanager
def open_file(file: Path) -> Iterator[io.FileIO]:
    """The regular file as stored. Raises DataError, also when it changed before the block ended."""
    refuse_other_kinds(file)
    with _explained(file), io.FileIO(_open_regular(file), "rb") as opened:
        before = os.fstat(opened.fileno())
        yield opened
        after = os.fstat(opened.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(
            file,
            None,
            "the file changed while it was read",
            "wait until whatever writes it has finished, then start again",
        )


@contextlib.contextmanager
def open_unpacked(file: Path, on_bytes: OnBytes | None = None) -> Iterator[io.BufferedReader[Any]]:
    """The content, .gz and .zst unpacked as it is read. Raises DataError."""
    with open_file(file) as stored:
        _check_magic(file, stored)
        with io.BufferedReader(_Unpacked(file, stored, on_bytes), _BUFFER_BYTES) as stream:
            yield stream


def _open_regular(file: Path) -> int:
    # O_NONBLOCK: opening a FIFO nobody writes to would wait for ever.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise DataError(file, None, "a folder, not a file", "give one of the files in it")
    raise DataError(
        file,
        None,
        "not a regular file (a pipe, a socket or a device)",
        f"write it into a file first: cat {shlex.quote(str(file))} > data.jsonl",
    )


_CAUSES = {
    errno.ENOENT: ("no such file", "check the path"),
    errno.ENOTDIR: ("no such file: a parent of this path is a file", "check the path"),
    errno.ELOOP: ("a symbolic link that leads to itself", "give the path of the real file"),
    errno.ENAMETOOLONG: ("the name is too long", "check the path"),
    errno.ENXIO: (
        "not a regular file (a pipe, a socket or a device)",
        "write the data into a file first",
    ),
    errno.EIO: ("the disk reported an input/output error", "check the disk, or copy the file"),
}


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        hint = f"chmod u+r {shlex.quote(str(file))}"
        raise DataError(file, None, "permission denied", hint) from None
    except OSError as error:
        cause, hint = _CAUSES.get(
            error.errno or 0, (f"cannot be read ({error.strerror or error})", "copy the file again")
        )
        raise DataError(file, None, cause, hint) from None


def _check_magic(file: Path, stored: io.FileIO) -> None:
    """Refuse content that is plainly another kind than the name says."""
    start = stored.read(8)
    stored.seek(0)
    packed = compression(file)
    name = shlex.quote(file.name)
    if packed and start and not start.startswith(_PACKED_MAGIC[packed]):
        raise DataError(
            file,
            None,
            f"the name says {packed}, but the content is not",
            f"if it is not packed: mv {name} {shlex.quote(file.stem)}; else copy it again",
        )
    for magic, (what, suffix) in _MAGIC.items():
        if not packed and start.startswith(magic) and data_suffix(file) != suffix:
            raise DataError(
                file,
                None,
                f"the content is {what}, which the name does not say",
                f"mv {name} {shlex.quote(file.name + suffix)}",
            )


# Zstandard frames may be preceded by skippable ones (0x184D2A50 to 0x184D2A5F, RFC 8878, 3.1.2).
_PACKED_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + n]) + b"\x2a\x4d\x18" for n in range(16))),
}


# ---------------------------------------------------------------- unpacking


class _Unpacked(io.RawIOBase):
    """The content of an open file as a raw stream; tells `on_bytes` of what it consumes."""

    def __init__(self, file: Path, stored: io.FileIO, on_bytes: OnBytes | None) -> None:
        super().__init__()
        self._file, self._stored, self._on_bytes = file, stored, on_bytes
        self._packed = compression(file)
        self._stored_bytes = os.fstat(stored.fileno()).st_size
        self._told_bytes = self._given_bytes = 0
        self._damage: DataError | None = None
        self._content = _unpacked(stored, self._packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer`; less only at the end of the content or before damage."""
        if self._damage is not None:
            raise self._damage
        filled_bytes = self._fill(memoryview(buffer))
        self._given_bytes += filled_bytes
        self._refuse_bomb()
        consumed_bytes = self._stored.tell()
        if self._on_bytes is not None and consumed_bytes > self._told_bytes:
            self._on_bytes(consumed_bytes - self._told_bytes)
            self._told_bytes = consumed_bytes
        return filled_bytes

    def _fill(self, buffer: memoryview) -> int:
        filled_bytes = 0
        while filled_bytes < len(buffer):
            try:
                num_bytes = self._read(buffer[filled_bytes:])
            except DataError as error:
                if not filled_bytes:
                    raise
                self._damage = error  # what came before it is read first
                break
            if not num_bytes:
                break
            filled_bytes += num_bytes
        return filled_bytes

    def close(self) -> None:
        if self._content is not self._stored and not self.closed:
            self._content.close()  # or its buffers stay for ever (pyarrow 26)
        super().close()

    def _read(self, buffer: memoryview) -> int:
        try:
            if isinstance(self._content, gzip.GzipFile):
                return self._content.readinto1(buffer)  # what came before damage, without it
            return self._content.readinto(buffer)
        except EOFError:
            reason = "the packed data ends too early"
        except (gzip.BadGzipFile, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            reason = str(error).splitlines()[0]
        kind = self._packed.removeprefix(".")
        raise DataError(
            self._file,
            None,
            f"cut off or damaged {kind} data ({reason})",
            "copy or download the file again",
        )

    def _refuse_bomb(self) -> None:
        limit_bytes = max(BOMB_BYTES, BOMB_RATIO * self._stored_bytes)
        if not self._packed or self._given_bytes <= limit_bytes:
            return
        raise DataError(
            self._file,
            None,
            f"{self._stored_bytes:,} bytes unpack to more than {self._given_bytes:,} "
            f"(over {BOMB_RATIO} times and 100 MB): this looks like a decompression bomb",
            f"if it is meant, unpack it and give that file: {unpack_command(self._file)}",
        )


def unpack_command(file: Path) -> str:
    """The command that unpacks a .gz or .zst file beside itself."""
    tool = {".gz": "gunzip -k", ".zst": "zstd -d"}[compression(file)]
    return f"{tool} {shlex.quote(file.name)}"


def _unpacked(stored: io.FileIO, packed: str) -> Any:
    """A stream with readinto and close, which leaves `stored` open."""
    if packed == ".gz":
        return gzip.GzipFile(fileobj=stored, mode="rb")
    if packed == ".zst":
        import pyarrow

        same = io.FileIO(stored.fileno(), closefd=False)  # pyarrow closes what it reads from
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(same, "r"), "zstd")
    return stored
