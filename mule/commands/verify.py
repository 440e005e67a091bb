"""`mule verify`: run exported files in llama.cpp beside the model they came from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source

_MAX_TEXTS = 16
# Where a model brings no held-out rows: plain prose, written for this purpose.
_PROSE = [
    "The train left the station a few minutes late. Most of the seats were empty, and the few "
    "passengers who had boarded looked out at the rain and said nothing for a long while.",
    "To make bread you need flour, water, salt and yeast. Mix them, let the dough rest until it "
    "has doubled, shape it, and bake it in a hot oven for about forty minutes.",
    "Question: a shop sells pens at 3 for 2 dollars. How much do 12 pens cost? Answer: 12 pens are "
    "4 groups of 3, and 4 times 2 is 8, so they cost 8 dollars.",
]


def run(
    gguf: Path,
    *,
    against: str | None = None,
    texts: list[Path] | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Verify a GGUF file, or every one in an export folder; `ok` is False beyond a limit."""
    from mule import fsio
    from mule.adapters.source import find_source, load_source
    from mule.export.reference import TorchReference
    from mule.export.verify import verify

    files = sorted(gguf.glob("*.gguf")) if gguf.is_dir() else [gguf]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{gguf}: no GGUF file there", "write one first: mule export RUN")
    record = files[0].parent / "export.json"
    if against is None and not record.is_file():
        raise UserError(
            f"{gguf}: nothing says which model it was written from",
            "name the model: mule verify FILE --against RUN_OR_FOLDER",
        )
    source = find_source(against or fsio.read_json(record)["source"], base=base)
    reference = TorchReference(*load_source(source))
    probe = _probe(source, texts)
    reports = [
        verify(
            file,
            reference,
            texts=probe["texts"][:_MAX_TEXTS],
            prompts=probe["prompts"],
            rendered=probe.get("rendered", False),
        )
        for file in files
    ]
    rows = [report.as_dict() for report in reports]
    ok = all(report.ok for report in reports)
    result = {"ok": ok, "against": str(source.model_dir), "files": rows}
    if len(rows) == 1:  # one file: its figures stand at the top too, for scripts
        result = rows[0] | result
    if ok:
        result["next"] = f"mule chat {files[-1]}"
    return result


def _probe(source: Source, texts: list[Path] | None) -> dict[str, Any]:
    """Texts and prompts to compare on: the user's, else the run's held-out rows, else prose."""
    from mule.commands.lineage import probe_of
    from mule.data.sources import Document, read

    probe = probe_of(source) or {"texts": _PROSE, "prompts": []}
    if texts is None:
        return probe
    found = [
        item.text if isinstance(item, Document) else "\n".join(m.content for m in item.messages)
        for item in read(texts)
    ]
    return {"texts": found, "prompts": probe["prompts"]}
