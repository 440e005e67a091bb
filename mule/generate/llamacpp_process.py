"""The child process that holds llama.cpp: a crash or an endless loop there is an error here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import mule
from mule.errors import ModelError, UserError

_STDERR_LINES = 6
_STDERR_BYTES = 1 << 16  # read for those lines
_SECONDS_TO_END = 5.0


class Runtime:
    """A child process holding llama.cpp; a crash there is a ModelError here.

    `subject` is what an error names: the file, or the work being done. `pass_fds` are open files
    that the child gets too. Its requests may come from several threads.
    """

    def __init__(self, subject: str, *, pass_fds: Sequence[int] = ()) -> None:
        self.subject = subject
        self._stderr = tempfile.TemporaryFile()
        root = str(Path(mule.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", "mule.generate._llamacpp_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(root),
            pass_fds=pass_fds,
            start_new_session=True,  # Ctrl-C in the terminal is Mule's to handle
        )
        self._sequence = 0  # of the last request; the child's greeting is number 0
        self._torn = False  # a message was cut in the middle
        self.is_late = False  # the child was ended because it took too long
        self._one_at_a_time = threading.RLock()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def request(
        self, op: str, data: Any = b"", *, limit_s: float | None = None, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Send one request and wait for its answer: its fields and its raw bytes.

        After `limit_s` without an answer the child is ended. Raises UserError when the request
        cannot work, ModelError when the child refuses it, dies, or is late.
        """
        with self._one_at_a_time, self._limited(limit_s):
            if self._torn:
                raise ModelError(f"{self.subject}: llama.cpp has ended", "open the file again")
            self._sequence += 1
            head = {"op": op, "seq": self._sequence, "bytes": memoryview(data).nbytes}
            stream = self._process.stdin
            assert stream is not None
            self._torn = True
            try:
                stream.write(json.dumps(head | fields).encode() + b"\n")
                stream.write(data)
                stream.flush()
            except (BrokenPipeError, ValueError):
                raise self.crash() from None
            self._torn = False
            return self._receive()

    @contextlib.contextmanager
    def _limited(self, limit_s: float | None) -> Iterator[None]:
        if limit_s is None:
            yield
            return

        def end() -> None:
            self.is_late = True
            self._process.kill()

        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        stream = self._process.stdout
        assert isinstance(stream, io.BufferedReader)
        answer: dict[str, Any] = {"seq": -1}
        data = b""
        while answer.pop("seq") != self._sequence:  # skip what an interrupted request left behind
            stream.peek(1)  # the wait: Ctrl-C here tears nothing
            self._torn = True
            if not (line := stream.readline()).endswith(b"\n"):
                raise self.crash()
            answer = json.loads(line)
            data = stream.read(num_bytes := answer.pop("bytes", 0))
            if len(data) != num_bytes:
                raise self.crash()
            self._torn = False
        if answer.pop("ok"):
            return answer, data
        if "hint" in answer:
            raise UserError(answer["error"], answer["hint"])
        raise ModelError(f"{self.subject}: {answer['error']}{self._last_words()}", DAMAGED_HINT)

    @property
    def has_ended(self) -> bool:
        """Whether the child has, or cannot be spoken to any more."""
        return self._torn or self._process.poll() is not None

    def crash(self) -> ModelError:
        """How the child ended, once it has: what to raise, or to tell."""
        code = self._process.wait()
        if self.is_late:
            return ModelError(
                f"{self.subject}: llama.cpp took too long and was ended", DAMAGED_HINT
            )
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ModelError(
            f"{self.subject}: llama.cpp crashed ({how}){self._last_words()}", DAMAGED_HINT
        )

    def _last_words(self) -> str:
        file = self._stderr.fileno()  # its position is the child's, too
        start = max(0, os.fstat(file).st_size - _STDERR_BYTES)
        lines = os.pread(file, _STDERR_BYTES, start).decode("utf-8", "replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-_STDERR_LINES:])

    def kill(self) -> None:
        """End the child at once: nothing can be asked of it any more."""
        self._torn = True
        self._process.kill()

    def close(self) -> None:
        """End the child; its input closing is its sign to go."""
        with contextlib.suppress(BrokenPipeError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


DAMAGED_HINT = "if the file is damaged, write it again with `mule export` or download it again"


def _environment(root: str) -> dict[str, str]:
    """No secrets and no switches: only what a process needs to start."""
    kept = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    return kept | {
        "PYTHONPATH": root,
        "PYTHONDONTWRITEBYTECODE": "1",
        "LC_ALL": "C.UTF-8",
        "GGML_NO_BACKTRACE": "1",  # else an abort starts a debugger
    }
