"""`mule verify`: compare exported files with the model they came from, and run them in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError

if TYPE_CHECKING:
    from mule.adapters.source import Source
    from mule.export.origin import Origin

MAX_PROMPTS = 50
_MAX_TEXTS = 16
_MAX_CHECKPOINTS = 4  # of the same run, whose weights a stale file may hold
# Where a model brings no held-out rows: plain prose, written for this purpose.
_PROSE = [
    "The train left the station a few minutes late. Most of the seats were empty, and the few "
    "passengers who had boarded looked out at the rain and said nothing for a long while.",
    "To make bread you need flour, water, salt and yeast. Mix them, let the dough rest until it "
    "has doubled, shape it, and bake it in a hot oven for about forty minutes.",
    "Question: a shop sells pens at 3 for 2 dollars. How much do 12 pens cost? Answer: 12 pens are "
    "4 groups of 3, and 4 times 2 is 8, so they cost 8 dollars.",
]
# And no prompts: each of these of each thing.
_QUESTIONS = (
    "What is {}?",
    "Write one sentence about {}.",
    "Name two things that have to do with {}.",
    "Explain {} to a child.",
    "Is {} older than a hundred years?",
)
_THINGS = (
    *("bread", "the moon", "a river", "a bicycle", "winter"),
    *("a library", "salt", "the number seven", "a train", "music"),
)


def run(
    gguf: Path,
    *,
    against: str | None = None,
    texts: list[Path] | None = None,
    base: str | None = None,
    base_gguf: Path | None = None,
    prompts: int = MAX_PROMPTS,
) -> dict[str, Any]:
    """Verify a GGUF file, or every one in an export folder; `ok` is False beyond a limit."""
    from mule.adapters.source import find_source
    from mule.commands import export_adapter
    from mule.export.imatrix_file import FILE_NAME
    from mule.export.record import note_checks, read_record, source_of
    from mule.export.reference import SourceReference
    from mule.export.verify import verify

    files = sorted(gguf.glob("*.gguf")) if gguf.is_dir() else [gguf]
    files = [file for file in files if file.name != FILE_NAME or file == gguf]
    if not files or not all(file.is_file() for file in files):
        raise UserError(f"{gguf}: no GGUF file there", "write one first: mule export RUN")
    if adapters := export_adapter.adapters_among(files, base_gguf):
        return export_adapter.check(adapters, against=against, base=base, base_gguf=base_gguf)
    folder = files[0].parent
    record = read_record(folder)
    named = against or source_of(folder, record)
    if named is None:
        raise UserError(
            f"{gguf}: nothing says which model it was written from",
            "name the model: mule verify FILE --against RUN_OR_FOLDER",
        )
    source = find_source(named, base=base)
    if source.model_dir is None:
        raise UserError(
            f"{named}: a GGUF file itself",
            "compare with the run or folder that it was written from: --against RUN_OR_FOLDER",
        )
    reference, origin = SourceReference(source), origin_of(source)
    probe = _probe(source, texts, has_chats=reference.tokenizer.chat_template is not None)
    reports = [
        verify(
            file,
            reference,
            texts=probe["texts"][:_MAX_TEXTS],
            prompts=probe["prompts"][:prompts],
            rendered=probe.get("rendered", False),
            origin=origin,
        )
        for file in files
    ]
    rows = [report.as_dict() for report in reports]
    note_checks(folder, rows)
    ok = all(report.ok for report in reports)
    result = {"ok": ok, "against": str(source.adapter_dir or source.model_dir), "files": rows}
    if len(rows) == 1:  # one file: its figures stand at the top too, for scripts
        result = rows[0] | result
    if ok:
        result["next"] = f"mule chat {files[-1]}"
    return result


def origin_of(source: Source) -> Origin:
    """The folders that a file of `source` is written from, and those it may be by mistake."""
    from mule.export.origin import Origin

    model_dir = source.model_dir
    assert model_dir is not None
    if source.adapter_dir is not None:
        return Origin(
            model_dir,
            adapter_dir=source.adapter_dir,
            base_dir=model_dir,
            adapted=True,
            others=_checkpoints_beside(source.adapter_dir),
        )
    base, merged = _base_of(source)
    return Origin(model_dir, base_dir=base, adapted=merged, others=_checkpoints_beside(model_dir))


def _base_of(source: Source) -> tuple[Path | None, bool]:
    """The folder that a model was trained from, if it is here, and whether an adapter was merged."""
    from mule.adapters.source import find_source
    from mule.commands.lineage import lineage_of
    from mule.export.about import base_folder

    lineage = lineage_of(source)
    merged = "merge" in lineage
    place = base_folder(lineage)
    return (None if place is None else find_source(str(place)).model_dir), merged


def _checkpoints_beside(folder: Path) -> dict[str, Path]:
    """The other checkpoints of a run, the newest first, by what to call them."""
    if not folder.name.startswith("checkpoint-"):
        return {}
    found = [
        (int(other.name.rpartition("-")[2]), other)
        for other in folder.parent.glob("checkpoint-*")
        if other != folder and other.name.rpartition("-")[2].isdigit()
    ]
    newest = sorted(found, reverse=True)[:_MAX_CHECKPOINTS]
    return {f"{other.parent.name}/{other.name}": other for _, other in newest}


def _probe(source: Source, texts: list[Path] | None, *, has_chats: bool) -> dict[str, Any]:
    """Texts and prompts to compare on: the user's, else the run's held-out rows, else our own."""
    from mule.commands.lineage import probe_of
    from mule.data.sources import Document, read

    asked = [
        [{"role": "user", "content": question.format(thing)}]
        for thing in _THINGS
        for question in _QUESTIONS
    ]
    probe = probe_of(source) or {"texts": _PROSE, "prompts": asked if has_chats else []}
    if texts is None:
        return probe
    found = [
        item.text if isinstance(item, Document) else "\n".join(m.content for m in item.messages)
        for item in read(texts)
    ]
    return {"texts": found, "prompts": probe["prompts"]}
