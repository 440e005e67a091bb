"""How far a run's model is on its way from base to file: what is done, and the next command.

Read from what each step left: the run's lineage, a merged folder's, an export's record. A folder
belongs to the run when its lineage has the same recipe, data and tokenizer, by their hashes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mule import fsio
from mule.doctor.history import History
from mule.run import Run

EXPORTS = Path("exports")
_SAME = ("recipe", "data", "tokenizer")
_SHOWN_FILES = 3


def stages(run: Run, history: History, exports: Path = EXPORTS) -> list[dict[str, Any]]:
    """The stages in order, each with `stage`, `done`, `what` in words, and the `next` command."""
    lineage = history.lineage
    merged = _merged(lineage, exports)
    found = [_base(history), _tune(run, history)]
    if history.kind == "adapter":
        found.append(_merge(run, merged))
    found.append(_deploy(run, lineage, merged[0] if merged else None, exports))
    return found


def _base(history: History) -> dict[str, Any]:
    base = history.lineage.get("base") or {}
    path = base.get("path") or history.recipe.model.path
    if path is None:
        return _stage("base", True, "none: the model was trained from scratch")
    sums = base.get("sha256")
    known = ", known by its hashes" if sums else ""
    return _stage("base", True, f"`{path}`{known}")


def _tune(run: Run, history: History) -> dict[str, Any]:
    stage = "pretrain" if history.kind == "pretrain" else "tune"
    what = f"{history.step:,} of {history.num_steps:,} updates"
    best = run.best()
    if best is not None:
        what += f"; the best checkpoint is that of update {best['step']:,}"
    following = "" if history.is_over else f"mule train {run.folder}/recipe.yaml --resume"
    return _stage(stage, history.is_over, what, following)


def _merge(run: Run, merged: list[Path]) -> dict[str, Any]:
    if not merged:
        return _stage(
            "merge", False, "the adapter is apart from its base", f"mule merge {run.folder}"
        )
    proof = fsio.read_json(merged[0] / "lineage.json").get("merge", {})
    difference = proof.get("merged_against_adapter")
    told = f", its logits at most {difference:.1e} from the adapter's" if difference else ""
    return _stage("merge", True, f"`{merged[0]}`{told}")


def _deploy(
    run: Run, lineage: dict[str, Any], merged: Path | None, exports: Path
) -> dict[str, Any]:
    for folder, record in _exported(lineage, exports):
        files = record["files"]
        if not files:
            continue
        names = ", ".join(f"`{folder / file['file']}`" for file in files[:_SHOWN_FILES])
        checks = [file.get("check") for file in files]
        if any(check is not None and not check.get("ok") for check in checks):
            return _stage("deploy", False, f"{names}: verification failed", f"mule verify {folder}")
        if any(check is None for check in checks):
            return _stage("deploy", False, f"{names}, not verified yet", f"mule verify {folder}")
        return _stage(
            "deploy", True, f"{names}, verified", f"mule chat {folder / files[-1]['file']}"
        )
    source = merged or run.folder
    return _stage("deploy", False, "no file has been exported", f"mule export {source}")


def _stage(stage: str, done: bool, what: str, following: str = "") -> dict[str, Any]:
    return {"stage": stage, "done": done, "what": what, "next": following}


def _merged(lineage: dict[str, Any], exports: Path) -> list[Path]:
    """Merged folders of this run, below the exports."""
    files = sorted(exports.glob("*/lineage.json")) + sorted(exports.glob("*/merged/lineage.json"))
    return [
        file.parent
        for file in files
        if "merge" in (found := fsio.read_json(file)) and _is_of(lineage, found)
    ]


def _exported(lineage: dict[str, Any], exports: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Export folders of this run, with their records."""
    from mule.export.record import RECORD, read_record

    records = [
        (file.parent, read_record(file.parent)) for file in sorted(exports.glob(f"*/{RECORD}"))
    ]
    return [
        (folder, record)
        for folder, record in records
        if record is not None and _is_of(lineage, record.get("lineage") or {})
    ]


def _is_of(lineage: dict[str, Any], found: dict[str, Any]) -> bool:
    return all(lineage.get(name) and lineage.get(name) == found.get(name) for name in _SAME)
