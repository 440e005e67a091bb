"""The trained models that faults are planted in, and `mule verify` as it is asked about them."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from mule.adapters.source import Source, find_source
from mule.commands.lineage import probe_of
from mule.commands.verify import origin_of
from mule.export.merge import merge_adapter
from mule.export.origin import Origin
from mule.export.reference import SourceReference
from mule.export.verify import verify, verify_contents
from mule.export.verify_report import VerifyReport
from tests.parity.planted import FAULTS, Case, Fault
from tests.parity.trained_families import ADAPTED, trained

_NUM_TEXTS, _NUM_PROMPTS = 6, 8
_EARLIER = "checkpoint-00000040"


@dataclass(frozen=True)
class Model:
    """A trained model of a family: `source` is what files are compared with."""

    family: str
    source: Source

    @functools.cached_property
    def reference(self) -> SourceReference:
        return SourceReference(self.source)

    @functools.cached_property
    def probe(self) -> dict[str, list]:
        return probe_of(self.source) or {"texts": [], "prompts": []}

    def verify(self, file: Path, origin: Origin | None = None, **options: object) -> VerifyReport:
        """As the command does it, on some of the run's held-out rows."""
        return verify(
            file,
            self.reference if origin is None else SourceReference(_source_of(origin)),
            texts=self.probe["texts"][:_NUM_TEXTS],
            prompts=self.probe["prompts"][:_NUM_PROMPTS],
            rendered=bool(self.probe.get("rendered")),
            origin=origin or origin_of(self.source),
            threads=1,
            **options,  # type: ignore[arg-type]
        )


@functools.cache
def model(family: str, *, adapted: bool = False) -> Model:
    """The chat model of a family, or the adapter on it."""
    found = trained(family)
    run = found.adapter if adapted else found.run
    assert run is not None, f"no adapter was trained on {family}"
    return Model(family, find_source(str(run)))


def applies(fault: Fault, family: str) -> bool:
    """Whether a fault can happen in this family."""
    has_adapter = "adapter" not in fault.needs or family in ADAPTED
    return has_adapter and (not fault.families or family in fault.families)


@contextmanager
def planted(name: str, family: str, type_name: str) -> Iterator[tuple[Model, Path, Origin]]:
    """The model, a file with the fault in it, and what it is compared with."""
    fault = FAULTS[name]
    known = model(family, adapted="adapter" in fault.needs)
    origin = origin_of(known.source)
    with tempfile.TemporaryDirectory(prefix="mule-planted-") as place:
        scratch = Path(place)
        folder = known.source.model_dir
        assert folder is not None
        case = Case(folder, type_name, scratch, base=origin.base_dir)
        if "adapter" in fault.needs:
            case = replace(case, folder=_merged(family), adapter=known.source.adapter_dir)
        if "base" in fault.needs:
            case = replace(case, base=_before(family, case, scratch / "base"))
            origin = replace(origin, base_dir=case.base)
        if "earlier" in fault.needs:
            earlier = _before(family, case, scratch / "chat" / _EARLIER)
            case = replace(case, earlier=earlier)
            origin = replace(origin, others={f"chat/{_EARLIER}": earlier})
        if fault.own_model:
            shutil.copytree(folder, scratch / "model")
            case = replace(case, folder=scratch / "model")
            origin = Origin(scratch / "model")
        yield known, fault.plant(case), origin


def report_on(name: str, family: str, type_name: str, *, run: bool) -> VerifyReport:
    """What `verify` finds in a file with a fault; without `run`, the part that runs nothing."""
    with planted(name, family, type_name) as (known, file, origin):
        return known.verify(file, origin) if run else verify_contents(file, origin)


@functools.cache
def _merged(family: str) -> Path:
    """The adapter in its base, as `mule merge` writes it; kept while the process lives."""
    found = model(family, adapted=True).source
    place = tempfile.TemporaryDirectory(prefix="mule-merged-")
    _kept.append(place)
    merge_adapter(found, Path(place.name) / "merged", {})
    return Path(place.name) / "merged"


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _before(family: str, case: Case, out: Path) -> Path:
    """The model as it may have been before the end of its training."""
    shutil.copytree(case.folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    first, last = case.weights(trained(family).folder / "untrained"), case.weights()
    before = {n: (0.1 * first[n] + 0.9 * w).contiguous() for n, w in last.items()}
    save_file(before, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _source_of(origin: Origin) -> Source:
    return Source("planted", model_dir=origin.model_dir, adapter_dir=origin.adapter_dir)
