"""Log lines: one line each, and no secret in them."""

from __future__ import annotations

import logging
import re
import sys

LOGGER = "mule.serve"
_SECRETS = re.compile(r"(?i)(bearer\s+)\S+|\b(hf_|sk-)[A-Za-z0-9_-]{4,}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_MAX_CHARS = 2_000


def safe_line(text: str, secrets: frozenset[str] = frozenset()) -> str:
    """`text` on one line: control characters escaped, secrets struck out, length bounded."""
    for secret in secrets:
        text = text.replace(secret, "[secret]")
    text = _SECRETS.sub(lambda match: f"{match[1] or match[2]}[secret]", text)
    text = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return text if len(text) <= _MAX_CHARS else f"{text[:_MAX_CHARS]}..."


class SafeFormatter(logging.Formatter):
    """Time and message of a record; of an exception its kind, message and place, on the line."""

    def __init__(self, secrets: frozenset[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage().strip()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {_described(record.exc_info[1])}"
        return f"{self.formatTime(record, '%H:%M:%S')} {safe_line(text, self._secrets)}"


def start_logging(secrets: frozenset[str]) -> None:
    """Send our lines, and warnings of uvicorn and asyncio, to stderr through the formatter."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(SafeFormatter(secrets))
    for name, level in (
        (LOGGER, logging.INFO),
        ("uvicorn.error", logging.ERROR),
        ("asyncio", logging.ERROR),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def _described(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return f"{type(error).__name__}: {error}"
    file = trace.tb_frame.f_code.co_filename.rpartition("/")[2]
    return f"{type(error).__name__}: {error} at {file}:{trace.tb_lineno}"
