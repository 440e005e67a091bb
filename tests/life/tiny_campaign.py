"""A small campaign on made-up text, run in a folder of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

from mule.commands import lab_run
from tests.life.tiny_life import write_data

FILE = Path("small.yaml")
FOLDER = Path("campaigns/small")


def make_campaign(folder: Path, text: str, *, modules: Sequence[str] = ()) -> Path:
    """Run the campaign `text` in `folder`, with its data; its summary is kept as summary.json."""
    write_data(folder)
    (folder / FILE).write_text(text)
    with contextlib.chdir(folder):
        summary = lab_run.run(FILE, [], modules=list(modules))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
