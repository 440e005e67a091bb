"""What `mule verify` catches and what it lets pass: planted faults and good exports, on trained models.

    python -m bench.verify run             # all of them, about ten minutes on two cores
    python -m bench.verify run llama       # of one family
    python -m bench.verify smoke           # a few, in a minute; nothing is written
    python -m bench.verify report          # docs/verify.md from the figures that are kept

The models are those of the tests: 2M to 3M parameters a family, trained for 300 updates. Each fault is
planted in two families if it can happen in two; the first file of each is run in llama.cpp as well.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mule import __version__, fsio, machine
from mule.commands import docs
from mule.export.gguf import write_gguf
from tests.parity.planted import FAULTS, Fault
from tests.parity.planted_cases import applies, model, report_on
from tests.parity.trained_families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "verify.json"
TYPES = ("f32", "f16", "q8_0", "q4_k_m")  # of every family
_MORE_TYPES = {
    "llama": ("bf16", "q6_k", "q5_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k"),
    "qwen3_moe": ("mxfp4",),
    "granitemoeshared": ("mxfp4",),
}
_FAMILIES_A_FAULT = 2
_SMOKE = ("q and k unpermuted", "rope base", "cut short")


def run(families: list[str]) -> None:
    """Measure all of it and write the result."""
    started_at = time.perf_counter()
    chosen = families or list(FAMILIES)
    good = list(good_exports(chosen))
    faults = list(planted_faults(chosen))
    fsio.write_json(
        RESULTS,
        {
            "bench": "verify",
            "command": " ".join(["python -m bench.verify run", *families]),
            "date": datetime.date.today().isoformat(),
            "mule": __version__,
            "xllamacpp": version("xllamacpp"),
            "seconds": round(time.perf_counter() - started_at),
            "good": good,
            "faults": faults,
            "machine": machine.describe(),
        },
    )
    passed, caught = sum(row["ok"] for row in good), sum(row["named"] for row in faults)
    print(f"good exports: {passed} of {len(good)} passed; faults: {caught} of {len(faults)} named")


def good_exports(families: list[str], types: tuple[str, ...] = TYPES) -> Iterator[dict[str, Any]]:
    """One row a file: whether it passed, and its figures."""
    for family in families:
        more = _MORE_TYPES.get(family, ()) if types == TYPES else ()
        for type_name in (*types, *more):
            yield _good(family, type_name)


def _good(family: str, type_name: str) -> dict[str, Any]:
    known = model(family)
    assert known.source.model_dir is not None
    with tempfile.TemporaryDirectory(prefix="mule-bench-verify-") as scratch:
        file = Path(scratch) / f"{family}-{type_name}.gguf"
        write_gguf(known.source.model_dir, file, type_name)
        report = known.verify(file)
    names = (
        "ok verdict kl_mean kl_p99 top1 ppl_change num_greedy_equal num_prompts seconds failures"
    )
    values = report.as_dict()
    row = {"family": family, "type": type_name} | {name: values[name] for name in names.split()}
    print(f"{family} {type_name}: {row['verdict']}")
    return row


def planted_faults(families: list[str], names: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """One row a file with a fault: whether it was caught, and how it was named."""
    for number, name in enumerate(names or FAULTS):
        fault = FAULTS[name]
        files = [(f, kind) for f in _chosen(fault, families, number) for kind in fault.types]
        for place, (family, type_name) in enumerate(files):
            report = report_on(name, family, type_name, run=place == 0)
            named = fault.is_named_in(report.failures)
            first = report.failures[0] if report.failures else ""
            yield {
                "fault": name,
                "title": fault.title,
                "family": family,
                "type": type_name,
                "caught": not report.ok,
                "named": named,
                "first": first,
                "also": sorted({f.partition(":")[0] for f in report.failures[1:]}),
                "was_run": place == 0,
            }
            print(f"{'named' if named else 'MISSED'} {name}, {family} {type_name}: {first[:110]}")


def _chosen(fault: Fault, families: list[str], number: int) -> list[str]:
    """Two families in which a fault can happen, others for each fault."""
    fitting = [family for family in families if applies(fault, family)]
    start = _FAMILIES_A_FAULT * number % max(1, len(fitting))
    return list(dict.fromkeys([*fitting[start:], *fitting]))[:_FAMILIES_A_FAULT]


def smoke() -> None:
    """Two good files and three faults: exits with 1 unless all is as it must be."""
    good = [row["ok"] for row in good_exports(["llama"], ("f32", "q4_k_m"))]
    named = [row["named"] for row in planted_faults(["llama"], _SMOKE)]
    raise SystemExit(0 if all(good + named) else 1)


def report() -> None:
    """Write the page."""
    docs.write()


def main(words: list[str]) -> None:
    verb, *rest = words or ["run"]
    if verb == "run":
        run(rest)
    elif verb in ("smoke", "report") and not rest:
        {"smoke": smoke, "report": report}[verb]()
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
