"""What a section of the recipe is made of: knobs, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["identity", "mechanical"]


def section(kind: type[Section]) -> Any:
    """A field that holds a section, described by the section's docstring."""
    return Field(default_factory=kind, description=kind.__doc__)


def knob(
    default: Any, description: str, *, role: Role = "identity", unit: str = "", form: str = ""
) -> Any:
    """A pydantic field with Mule's metadata; limits live in the field's type.

    `form` says in words what a pattern means.
    """
    extra: dict[str, Any] = {"role": role}
    extra |= {name: text for name, text in (("unit", unit), ("form", form)) if text}
    return Field(default, description=description, json_schema_extra=extra)


@dataclass(frozen=True)
class Problem:
    """A setting at odds with another. With `because`, `key` has no effect due to that key."""

    key: str
    message: str
    because: str = ""


class Conflict(ValueError):
    """Settings that are each valid but contradict one another."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{problem.key}: {problem.message}" for problem in problems))
        self.problems = problems


class Section(BaseModel):
    """The base of all sections: unknown keys refused, types exact, values frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    def idle(self) -> Iterator[Problem]:
        """The keys that cannot take effect beside the other settings, set or not."""
        yield from ()

    def conflicts(self) -> Iterator[Problem]:
        """Values that contradict one another."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Section:
        given = self.given()
        problems = [problem for problem in self.idle() if problem.key in given]
        if problems := problems + list(self.conflicts()):
            raise Conflict(problems)
        return self

    def given(self, prefix: str = "") -> set[str]:
        """Dotted keys set explicitly, below this section; a key set to null is not set."""
        keys: set[str] = set()
        for name in self.model_fields_set:
            value = getattr(self, name)
            if isinstance(value, Section):
                keys |= value.given(f"{prefix}{name}.")
            elif value is not None:
                keys.add(prefix + name)
        return keys
