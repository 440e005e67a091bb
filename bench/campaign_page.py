"""A campaign's report as a page of the documentation.

    mule lab run lab/lab-10m && python bench/campaign_page.py campaigns/lab-10m

Writes docs/results/NAME.md and its figures beside it, from what `mule lab report` makes of the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mule import fsio
from mule.commands import docs, lab_report

_FIGURES = "report-figures"


def publish(folder: Path) -> Path:
    """Write the page of the campaign in this folder; its path."""
    lab_report.run(folder)
    name, results = folder.resolve().name, docs.settings.DOCS / "results"
    made = (
        f"<!-- written by `mule lab run lab/{name}`, `python bench/campaign_page.py {folder}` -->"
    )
    title, _, rest = (folder / "report.md").read_text(encoding="utf-8").partition("\n")
    page = results / f"{name}.md"
    fsio.write_text(page, f"{title}\n\n{made}\n{rest.replace(f'{_FIGURES}/', f'{name}/')}")
    figures = {file.name: file for file in sorted((folder / _FIGURES).glob("*.svg"))}
    for figure, file in figures.items():
        fsio.write_text(results / name / figure, file.read_text(encoding="utf-8"))
    for old in (results / name).glob("*.svg"):
        if old.name not in figures:
            old.unlink()
    return page


if __name__ == "__main__":
    print(publish(Path(sys.argv[1])))
