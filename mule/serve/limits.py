"""What a server takes: sizes, numbers, and how long it waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server. What is larger, deeper or slower is refused."""

    body_bytes: int = 8_000_000
    header_bytes: int = 16 * 1024  # request line and headers together
    json_depth: int = 64
    json_values: int = 200_000  # commas and brackets of a body, outside of strings
    text_chars: int = 2**20  # of all messages or prompts together; what a template may write
    messages: int = 4_096

    queue: int = 64  # requests that wait for a row, of each model
    connections: int = 512
    answers: int = 8  # prompts x n of one request
    default_max_tokens: int = 4_096  # where a request names none

    head_seconds: float = 10.0  # until a request's headers are there; also of an idle connection
    body_seconds: float = 30.0
    read_seconds: float = 30.0  # until a slow reader has taken what waits for it
    request_seconds: float = 3_600.0  # far beyond an answer; who leaves is noticed at once
    closing_seconds: float = 5.0  # that answers under way are given at the end
