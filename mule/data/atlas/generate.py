"""The data of `mule demo`: a pretraining text, chats, a persona, and questions to test with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mule import fsio
from mule.data.atlas import chats, corpus
from mule.data.atlas.facts import COUNTRIES
from mule.data.atlas.plan import Sizes, make_plan
from mule.data.atlas.questions import questions
from mule.data.atlas.voice import Pirate, Plain
from mule.errors import UserError

MIN_COUNTRIES = 16  # below, the rarer wordings would be asked but never trained


@dataclass(frozen=True)
class AtlasFiles:
    """The files written by `generate`; questions and completions are for evaluation only."""

    pretrain: Path
    sft: Path
    sft_valid: Path
    persona: Path
    persona_valid: Path
    questions: Path
    completions: Path


def generate(
    seed: int, out_dir: Path, num_countries: int = len(COUNTRIES), sizes: Sizes | None = None
) -> AtlasFiles:
    """Write the atlas into `out_dir`; the same arguments give the same bytes.

    Raises UserError when the atlas cannot be made with `num_countries`.
    """
    if not MIN_COUNTRIES <= num_countries <= len(COUNTRIES):
        raise UserError(
            f"the atlas cannot be made with {num_countries} countries: it knows {len(COUNTRIES)}, "
            f"and its wordings need at least {MIN_COUNTRIES}",
            f"choose a number from {MIN_COUNTRIES} to {len(COUNTRIES)}",
        )
    plan = make_plan(seed, COUNTRIES[:num_countries], sizes or Sizes())
    files = AtlasFiles(
        pretrain=out_dir / "pretrain.txt",
        sft=out_dir / "sft.jsonl",
        sft_valid=out_dir / "sft.valid.jsonl",
        persona=out_dir / "persona.jsonl",
        persona_valid=out_dir / "persona.valid.jsonl",
        questions=out_dir / "questions.jsonl",
        completions=out_dir / "completions.jsonl",
    )
    fsio.write_text(files.pretrain, corpus.pretrain_text(plan))
    _write_rows(files.sft, chats.sft_rows(plan))
    _write_rows(files.sft_valid, chats.valid_rows(plan, Plain()))
    _write_rows(files.persona, chats.persona_rows(plan))
    pirate = Pirate(random.Random(f"{seed}:pirate"))
    _write_rows(files.persona_valid, chats.valid_rows(plan, pirate))
    _write_rows(files.questions, questions(plan))
    _write_rows(files.completions, corpus.completions(plan))
    return files


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    fsio.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
