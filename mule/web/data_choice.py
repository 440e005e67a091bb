"""What can be chosen on the page Data, by ids that the server makes; typed paths are confined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule.commands import data_found
from mule.serve.problem import Problem, shown
from mule.web import ids
from mule.web.site import Site

_MAX_TYPED = 100
_MAX_PATH = 1000


@dataclass(frozen=True)
class Choice:
    """Data to look at: `path` as it is shown, the words after a data verb, its own tokenizer."""

    kind: str  # file, folder, recipe, run or path
    path: str
    words: tuple[str, ...]
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.path}"

    @property
    def id(self) -> str:
        return ids.id_of(self.name)

    @property
    def prepared(self) -> str | None:
        """What `mule data stats` takes, where rows may have been made of it."""
        return {"run": str(Path(self.words[0]).parent), "recipe": self.words[0]}.get(self.kind)


class Table:
    """The choices by their ids: what was found in the working folder, and what was typed."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._known: dict[str, Choice] = {}
        self._typed: dict[str, Choice] = {}
        self._tokenizers: dict[str, str] = {}

    def look(self) -> dict[str, Any]:
        """What is there now; its rows have an `id` each."""
        found = data_found.run(runs=self._site.runs)
        groups = {
            "folders": [_of_path("folder", path) for path in found["folders"]],
            "files": [_of_path("file", file["file"]) for file in found["files"]],
            "recipes": [_of_path("recipe", path) for path in found["recipes"]],
            "runs": [_of_run(self._site.runs / name, name) for name in found["runs"]],
        }
        self._known = {choice.id: choice for own in groups.values() for choice in own}
        self._tokenizers = {ids.id_of(name): name for name in found["tokenizers"]}
        sizes = {file["file"]: file for file in found["files"]}
        return groups | {"facts": sizes, "more": found["more"]}

    def find(self, id: str) -> Choice:
        """Problem 404 where there is no such choice."""
        if id not in self._known and id not in self._typed:
            self.look()
        choice = self._known.get(id) or self._typed.get(id)
        if choice is None:
            raise Problem(
                404,
                f"no data {shown(id)} here",
                code="not_found",
                hint="choose it again on the page Data: it was moved, or typed before a restart",
            )
        return choice

    def tokenizers(self) -> dict[str, str]:
        """The tokenizers here, by id."""
        if not self._known:
            self.look()
        return self._tokenizers

    def tokenizer(self, id: str) -> str | None:
        """The path of this id; None for the one that the choice itself has."""
        if not id:
            return None
        return self.tokenizers()[ids.id_of(ids.find(id, self.tokenizers().values(), "tokenizer"))]

    def typed(self, text: str) -> Choice:
        """What a person typed: a file, a folder or a recipe below the working folder."""
        choice = _of_path("path", confined(text))
        if len(self._typed) >= _MAX_TYPED:
            self._typed.pop(next(iter(self._typed)))
        self._typed[choice.id] = choice
        return choice


def confined(text: str) -> str:
    """The path, from the working folder. Problem 422 where it leads out of it, or to nothing."""
    root = Path.cwd().resolve()
    try:
        found = (root / text.strip()).resolve() if text.strip() else None
        inside = found is not None and len(text) <= _MAX_PATH and found.is_relative_to(root)
        exists = inside and found is not None and found.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
        inside, exists, found = True, False, None
    if not inside or found is None or not exists:
        what = "is nothing in" if inside else "is not below"
        raise Problem(
            422,
            f"{shown(text.strip())} {what} the folder that mule ui shows",
            code="bad_path",
            hint=f"name a file or a folder below {root.name}; or start mule ui where the data is",
        )
    return str(found.relative_to(root))


def _of_path(kind: str, path: str) -> Choice:
    # A name that begins with a dash would be read as an option.
    return Choice(kind, path, (f"./{path}" if path.startswith("-") else path,))


def _of_run(folder: Path, name: str) -> Choice:
    """The data of a run, as it was resolved where it has begun."""
    files = [folder / file for file in ("resolved.yaml", "recipe.yaml")]
    recipe = next((file for file in files if file.is_file()), files[-1])
    has_own = (folder / "tokenizer" / "tokenizer.json").is_file()
    return Choice("run", name, (str(recipe),), str(folder) if has_own else None)
