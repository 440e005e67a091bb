"""One object of a data file, with its place, which every complaint about it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from mule.errors import DataError

MAX_ROW_BYTES = 64 * 10**6  # far beyond any context; what is longer is a mistake in the file
_TYPE_NAMES = {
    type(None): "null",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a data file; `line` is its row number in Parquet, its first line elsewhere."""

    value: dict[str, Any]
    file: str
    line: int

    def fail(self, message: str, hint: str = "") -> NoReturn:
        raise DataError(self.file, self.line, message, hint)

    def text(self, key: str) -> str:
        """The string under `key`; DataError when it is missing, no string, or not writable."""
        if key not in self.value:
            found = ", ".join(self.value) or "nothing"
            self.fail(f'no "{key}" in this row (found: {found})', f'add "{key}" to the row')
        return self.checked_text(self.value[key], f'"{key}"')

    def checked_text(self, value: Any, name: str) -> str:
        if not isinstance(value, str):
            self.fail(f"{name} is {type_name(value)}, not a string", "put the text in quotes")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            self.fail(
                f"{name} holds \\u{ord(value[error.start]):04x}, half of a character",
                "remove it, or write the whole character",
            )
        return value


def type_name(value: Any) -> str:
    """What a JSON value is called in a message."""
    return _TYPE_NAMES.get(type(value), type(value).__name__)
