"""A request that is refused, in the shape of OpenAI's errors."""

from __future__ import annotations

import json
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_MAX_SHOWN = 80  # characters of a client's value in a message


class Problem(Exception):
    """What is told to a client: the HTTP status, what was found, and what to send instead.

    `param` is the field at fault; `code` a word for programs; `hint` the edit or command that helps.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        hint: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.param, self.code, self.hint = param, code, hint
        self.headers = headers or {}

    def as_dict(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`, and the hint where there is one."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, default),
                "param": self.param,
                "code": self.code,
                **({} if self.hint is None else {"hint": self.hint}),
            }
        }

    def as_bytes(self) -> bytes:
        return json.dumps(self.as_dict()).encode()


def shown(value: Any) -> str:
    """A client's value as JSON, cut short; escapes keep it on one line."""
    text = json.dumps(value) if not isinstance(value, (list, dict)) else f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
