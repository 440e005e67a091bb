"""What is known about a model that is exported: its licence, its base, its languages, its lineage.

None of it names a folder of the machine or its user: what is exported is made to be passed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule import fsio
from mule.export.card import base_name, front_matter_of, licence_files, licence_of
from mule.hub.repo import HOME, Repo, address_of

if TYPE_CHECKING:
    from mule.adapters.source import Source

_MAX_ANCESTORS = 8
_LINEAGE = "lineage.json"
_PUBLIC = ("mule", "torch", "recipe", "data", "kind", "tokenizer")  # plain values of a lineage
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]+)?")


@dataclass(frozen=True)
class About:
    """`ancestors`: the model's own folder or its adapter's base, then what that was made from, and so
    on. `is_base`: it is a model as it came, not one that was trained; `is_new`: it began with random
    weights.
    """

    name: str
    ancestors: Sequence[Path]
    lineage: Mapping[str, Any]
    is_base: bool
    is_new: bool
    author: str | None = None

    @property
    def licence(self) -> str | None:
        """As the nearest card that states one names it."""
        return next((found for folder in self.ancestors if (found := licence_of(folder))), None)

    @property
    def licence_files(self) -> list[Path]:
        return next((found for folder in self.ancestors if (found := licence_files(folder))), [])

    @property
    def base(self) -> tuple[str, str] | None:
        """(ORG/NAME, commit) of the hub model that it is, or was made from."""
        found = (address_of(folder.resolve()) for folder in self.ancestors)
        return next((address for address in found if address), None)

    @property
    def base_text(self) -> str | None:
        """The base in words; None of a model that began with random weights."""
        if address := self.base:
            return f"{address[0]} (revision {address[1][:12]})"
        return None if self.is_new else base_name(self.ancestors[-1])

    @property
    def languages(self) -> list[str]:
        """The language codes that the nearest card states."""
        for folder in self.ancestors:
            if found := _languages(front_matter_of(folder)):
                return found
        return []

    @property
    def lineage_sha256(self) -> str | None:
        """Of what the run's lineage.json holds; where the run lies on this machine does not count."""
        found = {key: value for key, value in self.lineage.items() if key != "run"}
        return fsio.sha256_json(found) if found else None

    @property
    def public_lineage(self) -> dict[str, Any]:
        return public_lineage(self.lineage)

    def metadata(self, weights_sha256: str) -> dict[str, str | int | list[str]]:
        """The general.* and mule.* entries of a GGUF file."""
        entries: dict[str, str | int | list[str]] = {"name": self.name}
        entries |= {"license": self.licence} if self.licence else {}
        entries |= {"author": self.author} if self.author else {}
        if address := self.base:
            organization, _, name = address[0].partition("/")
            entries |= {
                "general.base_model.count": 1,
                "general.base_model.0.name": name,
                "general.base_model.0.organization": organization,
                "general.base_model.0.version": address[1],
                "general.base_model.0.repo_url": f"{HOME}/{address[0]}",
            }
        entries["tags"] = ["mule", "text-generation"]
        entries |= {"languages": self.languages} if self.languages else {}
        entries["mule.weights"] = weights_sha256
        entries |= {"mule.lineage": self.lineage_sha256} if self.lineage_sha256 else {}
        return entries


def about(
    name: str, source: Source, lineage: Mapping[str, Any], *, author: str | None = None
) -> About:
    """What is known of `source`, whose lineage this is."""
    assert source.model_dir is not None
    is_trained = bool(lineage) or source.adapter_dir is not None
    base = lineage.get("base") or {}
    is_new = bool(lineage) and source.adapter_dir is None and not base.get("path")
    return About(
        name=name,
        ancestors=_ancestors(source.model_dir, lineage),
        lineage=lineage,
        is_base=not is_trained,
        is_new=is_new and "merge" not in lineage,
        author=author,
    )


def public_lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """A lineage as it may be passed on: names in place of paths, and nothing about the machine."""
    found: dict[str, Any] = {key: lineage[key] for key in _PUBLIC if key in lineage}
    if run := lineage.get("run"):
        found["run"] = public_name(run)
    if sources := lineage.get("sources"):
        found["sources"] = [source | {"file": Path(source["file"]).name} for source in sources]
    for key in ("base", "merge"):
        if isinstance(part := lineage.get(key), dict):
            found[key] = _public_part(part)
    return found


def _public_part(part: Mapping[str, Any]) -> dict[str, Any]:
    paths = {key: public_name(part[key]) for key in ("path", "folder", "base") if part.get(key)}
    return {**part, **paths}


def public_path(path: str) -> str:
    """A path that may be told: as it is where it is relative, else what others know it by."""
    folder = Path(path)
    is_told = folder.is_absolute() or address_of(folder.resolve()) is not None
    return public_name(path) if is_told else path


def public_name(path: str) -> str:
    """A model's path as others know it: ORG/NAME@COMMIT of the hub's cache, else its last name."""
    folder = Path(path)
    if address := address_of(folder.resolve()):
        return "@".join(address)
    if (
        not folder.is_absolute() and not folder.exists() and len(folder.parts) == 2
    ):  # ORG/NAME, which names no file here
        return path
    name = folder.name
    return f"{folder.parent.name}/{name}" if name.startswith("checkpoint-") else name


# ---------------------------------------------------------------- where it comes from


def _ancestors(folder: Path, lineage: Mapping[str, Any]) -> list[Path]:
    found = [folder]
    while len(found) < _MAX_ANCESTORS and (before := base_folder(lineage)) and before not in found:
        found.append(before)
        lineage = _lineage_in(before)
    return found


def base_folder(lineage: Mapping[str, Any]) -> Path | None:
    """The folder of what a model was made from, if it is on this machine; nothing is fetched."""
    merge, base = lineage.get("merge") or {}, lineage.get("base") or {}
    for path in filter(None, (merge.get("base"), base.get("path"))):
        if Path(path).is_dir():
            return Path(path)
        name, _, revision = str(path).partition("@")
        if cached := Repo("model", name, revision or base.get("revision") or "").cached():
            return cached
    return None


def _lineage_in(folder: Path) -> dict[str, Any]:
    for place in (folder, folder.parent):
        if (place / _LINEAGE).is_file():
            found = fsio.read_json(place / _LINEAGE)
            return found if isinstance(found, dict) else {}
    return {}


def _languages(front_matter: str) -> list[str]:
    """Of `language: en`, `language: [en, fr]`, or a list below `language:`."""
    match = re.search(r"^language:([^\n]*(?:\n[ \t]*-[^\n]*)*)", front_matter, re.MULTILINE)
    return list(dict.fromkeys(_LANGUAGE.findall(match[1]))) if match else []
