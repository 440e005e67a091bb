"""The cases of the fault bench: which fault in which setting with which seed, and its files."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.doctor_data import CHATS, TEXTS, Folder, Row
from bench.doctor_faults import FAULTS, Draft
from bench.doctor_settings import (
    BASE_CHATS,
    BASE_ROWS,
    BASE_TEXT,
    BASES,
    COMMON,
    SETTINGS,
    Healthy,
    Part,
    Setting,
    healthy_runs,
)
from mule import fsio
from mule.run import Run

SEEDS: dict[Part, tuple[int, ...]] = {"development": (0, 1, 2), "held-out": (10, 11, 12, 13, 14)}
CASE = "case.json"  # written last: what the case is, and how its training ended
RECIPE, TRAIN, VALID = "recipe.yaml", "train.jsonl", "valid.jsonl"


@dataclass(frozen=True)
class Case:
    """A run to train; `fault` is "" of a healthy one."""

    part: Part
    name: str
    setting_name: str
    seed: int
    fault: str = ""
    healthy: Healthy | None = None

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.part][self.setting_name]

    def folder(self, cache: Path) -> Path:
        return cache / self.part / self.name

    def run(self, cache: Path) -> Run:
        return Run(self.folder(cache) / "runs" / self.name)

    def is_kept(self, cache: Path) -> bool:
        """Whether it was trained."""
        return (self.folder(cache) / CASE).is_file()

    def draft(self, cache: Path, data: Folder) -> Draft:
        """What is trained, with the fault in it."""
        setting, healthy = self.setting, self.healthy
        recipe = COMMON | dict(setting.recipe) | {"train.seed": self.seed}
        if setting.base:
            recipe["model.path"] = str(base_path(cache, self.part, setting.base))
        draft = Draft(
            setting=setting,
            recipe=recipe,
            train=copy.deepcopy(data.rows(setting.data, self.seed, setting.num_rows)),
            rng=random.Random(f"{self.name}:{self.seed}"),
            spare=data.rows(self._other_data(), self.seed, setting.num_rows),
        )
        if healthy:
            draft.recipe |= healthy.changes
            draft.damage = "interrupted" if healthy.interrupted else None
        else:
            FAULTS[self.fault].plant(draft)
        steps = draft.recipe["train.steps"]
        draft.recipe.setdefault("evaluate.every_steps", max(1, steps // setting.evaluations))
        draft.recipe.setdefault("checkpoint.every_steps", max(1, steps // 2))
        return draft

    def _other_data(self) -> str:
        """Another data set of the same part and sort."""
        names = {s.data for s in SETTINGS[self.part].values() if _sort(s) == _sort(self.setting)}
        return min(names - {self.setting.data})

    def needs(self) -> set[str]:
        """The data sets without which it cannot be made."""
        names = {self.setting.data, self._other_data()}
        if base := self.setting.base:
            names |= {BASES[self.part][base].text, BASES[self.part][base].chats}
        return names


def _sort(setting: Setting) -> bool:
    return setting.base is None


def base_path(cache: Path, part: Part, name: str) -> Path:
    """The model that a setting fine-tunes; another one where its recipe is another."""
    made = [asdict(BASES[part][name]), BASE_TEXT, BASE_CHATS, BASE_ROWS]
    key = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:8]
    return cache / "bases" / f"{part}-{name}-{key}"


def cases(part: Part) -> list[Case]:
    """All of a part: every fault with the first seed, some healthy runs, the next seed, and so on."""
    healthy = [
        Case(part, f"healthy-{place:02d}", run.setting, run.seed, healthy=run)
        for place, run in enumerate(healthy_runs(part))
    ]
    seeds, found = SEEDS[part], []
    for turn, seed in enumerate(seeds):
        found += [_faulty(part, fault, turn, seed) for fault in FAULTS]
        found += healthy[turn :: len(seeds)]
    return found


def _faulty(part: Part, fault: str, turn: int, seed: int) -> Case:
    """A fault in a setting of the next kind that it can happen in, and of this kind in the next one."""
    kinds = FAULTS[fault].kinds
    number = (
        list(FAULTS).index(fault) + turn
    )  # so that not every fault begins with the same setting
    kind = kinds[number % len(kinds)]
    fitting = [name for name, setting in SETTINGS[part].items() if setting.kind == kind]
    setting = fitting[number // len(kinds) % len(fitting)]
    return Case(part, f"{fault}-{seed}", setting, seed, fault)


def write(draft: Draft, folder: Path) -> None:
    """The recipe and the data of a draft."""
    recipe = draft.recipe | {"data.train": [TRAIN]}
    write_rows(folder / TRAIN, draft.train)
    if draft.valid is not None:
        write_rows(folder / VALID, draft.valid)
        recipe["data.valid"] = [VALID]
    fsio.write_text(folder / RECIPE, json.dumps(nested(recipe), indent=1) + "\n")


def write_rows(file: Path, rows: list[Row]) -> None:
    fsio.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def nested(recipe: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        *sections, last = key.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def key_of(draft: Draft, source: str) -> str:
    """Of all that is trained; `source` is that of its damage. Folders do not count."""
    recipe = {
        key: Path(value).name if key.endswith(".path") else value
        for key, value in draft.recipe.items()
    }
    made = [recipe, draft.train, draft.valid, source]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def available(part: Part, word: str, data: Folder) -> tuple[list[Case], list[Case]]:
    """The cases of a part that begin with `word` and whose data is here, and those without data."""
    have = {name for name in (*TEXTS, *CHATS) if data.has(name)}
    known = set(TEXTS) | set(CHATS)
    found = [case for case in cases(part) if case.name.startswith(word)]
    lacking = [case for case in found if (case.needs() & known) - have]
    return [case for case in found if case not in lacking], lacking
