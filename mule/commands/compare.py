"""`mule compare`: a setup beside published ones, or runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mule.errors import UserError
from mule.message import Message
from mule.run import RUNS, Run

if TYPE_CHECKING:
    from mule.compare.sourced import Setup
    from mule.compare.verdict import Verdict
    from mule.french import Language

PART = "compare"  # of Mule, whose sentences these are
_PAGES = (".md", ".html")
_NEAREST = 3  # published setups beside yours where none is named
# What is the same in every language: names, commands, settings and what sources say.
_KEPT = frozenset(
    "name run first second folder key setting values source sources hearsay next".split()
)


def run(
    words: Sequence[str],
    *,
    out: Sequence[Path] = (),
    root: Path = RUNS,
    language: Language = "en",
) -> dict[str, Any]:
    """Compare what `words` name: recipes, runs and published setups; `key=value` edits the first.

    Of two or more runs alone, the runs side by side. Writes the result to `out` as well. In another
    language than English the result has its texts in it too, under that language's name.
    """
    if out and language != "en":
        raise UserError(
            f"{out[0]} would be in English: --lang cannot take effect on --out",
            "leave one of the two away",
        )
    return told(_compared(words, out, root), language)


def told(found: dict[str, Any], language: Language) -> dict[str, Any]:
    """The result, with all its texts in that language beside the English ones."""
    if language == "en":
        return found
    from mule.french import retold, speaker

    say = speaker(language, PART)
    return found | {"language": language, language: retold(found, say, kept=_KEPT)}


def _compared(words: Sequence[str], out: Sequence[Path], root: Path) -> dict[str, Any]:
    """What `words` name, compared."""
    for file in out:
        _check(file)
    edits = [word for word in words if _is_edit(word)]
    named = [word for word in words if not _is_edit(word)]
    if not named:
        raise UserError(
            "nothing to compare: name a recipe, a run or a published setup",
            "mule compare RECIPE; `mule compare --list` shows the published setups",
        )
    runs = [_run_called(word, root) for word in named]
    if edits and not _is_recipe(named[0], root):
        raise UserError(
            f"{edits[0]} cannot take effect: {named[0]} is no recipe",
            f"name a recipe first: mule compare RECIPE {' '.join(edits)} {named[0]}",
        )
    if len(named) > 1 and all(run is not None for run in runs):
        return compare_runs([run for run in runs if run is not None], out=out)
    setups = [_setup(word, edits if place == 0 else [], root) for place, word in enumerate(named)]
    found = compare_setups(setups[0], setups[1:])
    return _written(found | {"next": _next(setups[0], named[0], found["edits"])}, out)


def list_published() -> dict[str, Any]:
    """The catalogue: what each setup is, and whether all of its values were read at their source."""
    from mule.compare.catalogue import catalogue

    rows = [
        {
            "name": setup.name,
            "setup": setup.title,
            "kind": setup.kind,
            "parameters": setup.shown("parameters"),
            "examples_or_tokens": setup.shown("rows") or setup.shown("trained_tokens"),
            "learning_rate": setup.shown("learning_rate"),
            "values": len([v for v in setup.values.values() if _is_given(v)]),
            "unchecked": len([v for v in setup.values.values() if _is_given(v) and not v.checked]),
            "origin": setup.origin,
        }
        for setup in catalogue().values()
    ]
    return {"published": rows, "next": "mule compare RECIPE"}


def compare_setups(yours: Setup, others: Sequence[Setup]) -> dict[str, Any]:
    """Yours beside `others`, or beside the published setups that are nearest."""
    from mule.compare import advice, judge
    from mule.compare.catalogue import catalogue
    from mule.compare.nearest import nearest

    published = catalogue()
    beside = list(others) or nearest(yours, published.values(), _NEAREST)
    verdicts = judge.judged(yours, published)
    changes = advice.edits(yours, verdicts, published)
    return {
        "compared": "setups",
        "yours": {"name": yours.name, "title": yours.title, "kind": yours.kind},
        "beside": [{"name": s.name, "title": s.title, "kind": s.kind} for s in beside],
        "rows": _rows(yours, beside, verdicts),
        "strengths": [_line(yours, v) for v in verdicts if v.word in ("near", "ahead")],
        "attention": [_line(yours, v) for v in verdicts if v.word in ("behind", "unusual")],
        "edits": [vars(edit) for edit in changes],
        "hearsay": [
            {"setup": s.title, "said": said, "so": so} for s in beside for said, so in s.hearsay
        ],
        "sources": _sources(yours, beside),
        "words": advice.closing(yours, verdicts, changes, published),
    }


def compare_runs(runs: Sequence[Run], *, out: Sequence[Path] = ()) -> dict[str, Any]:
    """Two or more runs: settings that differ, figures, and what the seeds can show."""
    from mule.compare import side_by_side

    if len(runs) < 2:
        raise UserError(
            "one run has nothing to stand beside",
            f"name another, or see the published setups: mule compare {runs[0].folder}",
        )
    told = side_by_side.read(runs)
    found = side_by_side.differing(told)
    best = min(told, key=lambda one: side_by_side.figures(one)["best_val_loss"] or float("inf"))
    compared = {
        "compared": "runs",
        "runs": [
            {"run": one.name, "folder": str(one.run.folder), **side_by_side.figures(one)}
            for one in told
        ],
        "differs": [row for row in found if row["role"] == "identity"],
        "differs_mechanically": [row for row in found if row["role"] == "mechanical"],
        "significance": side_by_side.significance(told),
        "next": f"mule runs show {best.run.folder}",
    }
    return _written(compared, out)


def _written(found: dict[str, Any], out: Sequence[Path]) -> dict[str, Any]:
    """The result, after writing it to the files asked for."""
    for file in out:
        _check(file)
    if not out:
        return found
    from mule.commands.compare_page import write

    return found | {"files": [str(file) for file in write(found, out)]}


# ---------------------------------------------------------------- what is named


def _is_edit(word: str) -> bool:
    return "=" in word and not Path(word).exists()


def _run_called(word: str, root: Path) -> Run | None:
    """The run of that name or folder; None of anything else."""
    if _is_recipe(word, root):
        return None
    try:
        return Run.open(word, root)
    except UserError:
        return None


def _is_recipe(word: str, root: Path) -> bool:
    """A file, or a recipe that comes with Mule where no run is called so."""
    from mule.config.presets import preset_file

    is_file = Path(word).is_file() or word.endswith((".yaml", ".yml"))
    return is_file or (preset_file(word) is not None and not (root / word).is_dir())


def _setup(word: str, edits: list[str], root: Path) -> Setup:
    from mule.compare import catalogue, normalise

    if _is_recipe(word, root):
        return normalise.from_recipe(word, edits)
    if (found := _run_called(word, root)) is not None:
        return normalise.from_run(found)
    return catalogue.named(word)


def _next(yours: Setup, word: str, changes: Sequence[dict[str, str]]) -> str:
    """Train the recipe with the changes; of what is no recipe, look closer."""
    if yours.origin == "recipe":
        return " ".join(["mule train", word, *(edit["setting"] for edit in changes)])
    return f"mule runs show {word}" if yours.origin == "run" else "mule compare --list"


def _check(file: Path) -> None:
    if file.suffix not in _PAGES:
        raise UserError(
            f"{file}: a comparison cannot be written as {file.suffix or 'a file without a suffix'}",
            f"name a file that ends in {' or '.join(_PAGES)}: --out {file.with_suffix('.html')}",
        )


# ---------------------------------------------------------------- the table


def _rows(
    yours: Setup, beside: Sequence[Setup], verdicts: Sequence[Verdict]
) -> list[dict[str, Any]]:
    """A row for each parameter that any of them has."""
    from mule.compare.parameters import PARAMETERS

    words = {verdict.key: verdict for verdict in verdicts}
    rows = []
    for parameter in PARAMETERS:
        shown = [setup.shown(parameter.key) for setup in (yours, *beside)]
        if not any(shown):
            continue
        verdict = words.get(parameter.key)
        rows.append(
            {
                "key": parameter.key,
                "parameter": parameter.label,
                "setting": parameter.setting,
                "yours": shown[0],
                "beside": shown[1:],
                "verdict": verdict.word if verdict else "",
                "reason": verdict.reason if verdict else "",
                "sources": list(verdict.sources) if verdict else [],
            }
        )
    return rows


def _line(yours: Setup, verdict: Verdict) -> str:
    from mule.compare.parameters import BY_KEY

    shown = yours.shown(verdict.key)
    return Message("{} {}: {}", BY_KEY[verdict.key].label, shown, verdict.reason)


def _is_given(value: Any) -> bool:
    return not value.source.startswith("computed:")


def _sources(yours: Setup, beside: Sequence[Setup]) -> list[dict[str, Any]]:
    """Where each value is from, and what one that was not read there rests on."""
    from mule.compare.parameters import PARAMETERS

    return [
        {
            "setup": setup.title,
            "parameter": parameter.label,
            "value": setup.shown(parameter.key),
            "source": value.source,
            "note": value.note,
            "checked": value.checked,
            "rests_on": value.rests_on,
        }
        for setup in (yours, *beside)
        for parameter in PARAMETERS
        if (value := setup.values.get(parameter.key)) is not None
    ]
