"""Every error a user can see.

MuleError                what Mule raises on purpose; carries a message, a hint and an exit code
|-- UserError            the input cannot work: nothing was written             exit 2
|   |-- ConfigError      a recipe or an override, every problem at once
|   |-- DataError        a data file, with its line
|   |-- ModelError       a model, tokenizer or adapter folder
|   |-- StorageError     a disk that is full, read-only or damaged
|   `-- BusyError        another process holds the run
|-- CheckFailed          a verification beyond its limit                        exit 1
`-- Interrupted          stopped by a signal after saving                       exit 130 or 143
"""

from __future__ import annotations

from pathlib import Path


class MuleError(Exception):
    """An error meant for the user: what was found and why it cannot work, then the exact remedy."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class UserError(MuleError):
    """The input cannot work; refused before anything was written."""

    exit_code = 2


class ConfigError(UserError):
    """One or more problems in a recipe; `problems` lists each with its place."""

    def __init__(self, problems: list[str], hint: str = "") -> None:
        super().__init__("\n".join(problems), hint)
        self.problems = problems


class DataError(UserError):
    """A problem in a data file, named as `file:line: message`; `what` is the message alone."""

    def __init__(self, file: str | Path, line: int | None, message: str, hint: str = "") -> None:
        place = f"{file}:{line}" if line is not None else str(file)
        super().__init__(f"{place}: {message}", hint)
        self.file, self.line, self.what = str(file), line, message


class ModelError(UserError):
    """A model, tokenizer or adapter folder that cannot be used as it is."""


class StorageError(UserError):
    """A disk that is full, read-only or holds damaged files."""


class BusyError(UserError):
    """Another process holds the run folder."""


class CheckFailed(MuleError):
    """A verification found a difference beyond its stated limit."""

    exit_code = 1


class Interrupted(MuleError):
    """Stopped by a signal, after the state was saved; `signum` gives the exit code 128 + n."""

    def __init__(self, signum: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signum
