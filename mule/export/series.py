"""Several types of one model: the quantised ones are made from a master of 16 bits that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mule import fsio, progress
from mule.errors import UserError
from mule.export.from_gguf import write_from_gguf
from mule.export.gguf import Entry, Weights, planned_bytes, require_type, write_gguf
from mule.export.gguf_file import HEADER_BYTES, GgufReport
from mule.export.imatrix_file import FILE_NAME, ImportanceMatrix, write_imatrix
from mule.export.master import choose_master
from mule.export.mixtures import TYPES
from mule.export.quantize import Quantizer, takes_importance

_FULL = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Series:
    """The files asked for, in their order; `master` is one more that was kept, or one of them."""

    files: list[GgufReport]
    master: GgufReport | None = None


@dataclass(frozen=True)
class Target:
    """Where files go, as NAME-TYPE.gguf, and the matrix that weighs their errors."""

    folder: Path
    name: str
    importance: ImportanceMatrix | None = None

    def file(self, type_name: str) -> Path:
        return self.folder / f"{self.name}-{type_name.upper()}.gguf"

    def weighed(self, type_name: str) -> ImportanceMatrix | None:
        return self.importance if takes_importance(TYPES[type_name][0]) else None

    def write_importance(self) -> None:
        """The matrix beside the files, where there is one."""
        if self.importance is not None:
            write_imatrix(self.folder / FILE_NAME, self.importance)


def check_types(types: Sequence[str], *, weighed: bool = False) -> None:
    """Raises UserError for what is no type, is listed twice, or cannot take an importance matrix."""
    for type_name in types:
        require_type(type_name)
        if types.count(type_name) > 1:
            once = ",".join(dict.fromkeys(types))
            raise UserError(f"{type_name} is listed twice", f"once is enough: --types {once}")
    if weighed and not any(takes_importance(TYPES[type_name][0]) for type_name in types):
        raise UserError(
            f"--imatrix has no effect on {', '.join(types)}: nothing there is rounded by it",
            "leave it out, or name a type that it improves: --types q4_k_m",
        )


def write_series(
    model_dir: Path,
    target: Target,
    types: Sequence[str],
    *,
    metadata: Mapping[str, Entry],
    keep_master: bool = True,
) -> Series:
    """Write the model in `model_dir` as files of `types`, and its importance matrix beside them.

    Quantised types are made from the master, after it was read back; without `keep_master` each is
    made from the folder.
    """
    quantised = [type_name for type_name in types if type_name not in _FULL]
    own = _own_master(types) if quantised and keep_master else None
    chosen = choose_master(model_dir) if quantised and keep_master and own is None else None
    written_too = [*types] if chosen is None else [*types, chosen.type_name]
    _require_space(model_dir, target.folder, written_too)
    with Quantizer() as quantizer:

        def direct(type_name: str) -> GgufReport:
            return write_gguf(
                model_dir,
                target.file(type_name),
                type_name,
                metadata=metadata,
                importance=target.weighed(type_name),
                quantizer=quantizer,
            )

        made = {type_name: direct(type_name) for type_name in types if type_name in _FULL}
        master = made[own] if own is not None else None
        if chosen is not None:
            master = direct(chosen.type_name)
            progress.note(f"{master.file} is kept: {chosen.why}")
        if master is None:
            made |= {type_name: direct(type_name) for type_name in quantised}
        else:
            context, told = master.exact_context, master.notes
            for name, report in _from_master(
                Path(master.file), target, quantised, quantizer, context
            ).items():
                # What is true of the model is true of each of its files.
                made[name] = replace(report, notes=[*dict.fromkeys([*told, *report.notes])])
    target.write_importance()
    return Series([made[type_name] for type_name in types], master)


def write_series_from(
    master: Path, target: Target, types: Sequence[str], *, exact_context: int | None = None
) -> Series:
    """Write files of `types` from the GGUF file `master`, and the importance matrix beside them."""
    with Quantizer() as quantizer:
        made = _from_master(master, target, types, quantizer, exact_context)
    target.write_importance()
    return Series(list(made.values()))


def _from_master(
    master: Path,
    target: Target,
    types: Sequence[str],
    quantizer: Quantizer,
    exact_context: int | None,
) -> dict[str, GgufReport]:
    return {
        type_name: write_from_gguf(
            master,
            target.file(type_name),
            type_name,
            importance=target.weighed(type_name),
            quantizer=quantizer,
            exact_context=exact_context,
        )
        for type_name in types
    }


def _own_master(types: Sequence[str]) -> str | None:
    """The most exact of the full types that are asked for."""
    return next((type_name for type_name in _FULL if type_name in types), None)


def _require_space(model_dir: Path, folder: Path, types: Sequence[str]) -> None:
    """Room for all of the files is asked for before the first one is begun."""
    names = set(Weights(model_dir).files)
    total = sum(planned_bytes(model_dir, type_name, names) + HEADER_BYTES for type_name in types)
    fsio.require_space(folder, total, f"the {len(types)} GGUF files ({', '.join(types)})")
