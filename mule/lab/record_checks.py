"""Whether a campaign's results can be compared: what is refused, what differs, what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mule.config.search import searched_keys
from mule.errors import UserError
from mule.lab.records import Result, Row, Study, asked_names, read_settings
from mule.lab.techniques import own_module

# Settings that a comparison of architectures must not change beside the architecture.
_SAME_SECTIONS = ("data", "tokenizer", "optim")
_SAME_OF_TRAIN = ("steps", "epochs", "step_tokens", "step_rows", "step_examples", "dropout", "ema")
_SAME_SIZE = 0.03  # twice the solver's tolerance for small models and mixtures
_NEARLY = 0.01  # of the tokens of a run: what its last rows lack is no other budget


def refuse_incomparable(study: Study) -> None:
    """Raise UserError when results of two campaigns, budgets, tests or tokenizers are mixed."""
    _refuse_repeated(study.results)
    _refuse_strangers(study)
    for size in study.sizes:
        own = [result for result in study.results if result.size == size]
        _refuse_unequal(own, "was trained on", _tokens_given, _NEARLY)
        _refuse_unequal(own, "was tested on", lambda r: r.record["test"].get("num_tokens"), 0.0)
    tokenizers = {lineage.get("tokenizer") for lineage in study.lineages.values()} - {None}
    if len(tokenizers) > 1:
        raise UserError(
            f"the runs of {study.folder} have {len(tokenizers)} different tokenizers: their losses "
            "per token cannot be compared",
            "train all variants with one tokenizer: mule lab run makes it once",
        )


def what_is_missing(study: Study) -> list[str]:
    """Cells that the campaign asks for without a result, and measurements that are not there."""
    found = []
    if not study.asked:
        found.append("campaign.yaml: what was asked is taken from the results alone")
    there = {arm.variant for arm in study.arms}
    found += [f"{name}: no result" for name in asked_names(study.asked) if name not in there]
    found += _missing_sizes(study)
    seeds = [seed for seed in study.asked.get("seeds") or study.seeds]
    for arm in study.arms:
        if lost := [seed for seed in seeds if seed not in arm.seeds]:
            found.append(f"{arm.name}: no result of seed {_listed(lost)}")
        if broken := [r.seed for r in arm.results if r.value("test", "loss") is None]:
            found.append(f"{arm.name}: no finite test loss of seed {_listed(broken)}")
        if lost := [r.seed for r in arm.results if r.run is None]:
            found.append(
                f"{arm.name}: the run's folder, and so its curves, of seed {_listed(lost)}"
            )
    kinds = [("shapes", study.shapes)]
    if (study.asked.get("decode") or {}).get("enabled", True):
        kinds.append(("decoding", study.decode))
    if study.asked.get("compile_table") or study.compiled:
        kinds.append(("compiling", study.compiled))
    if searched_keys(study.asked.get("search") or {}):
        kinds.append(("the search", study.searches))
    for kind, measured in kinds:
        if lost := [arm for arm in study.arms if arm.file_stem not in measured]:
            names = [
                f"{arm.name} (its own module)" if own_module(arm, study.asked) else arm.name
                for arm in lost
            ]
            found.append(f"{kind}: not measured for {_listed(names)}")
    return found


def what_differs(study: Study) -> list[str]:
    """What is not the same for all runs and should be."""
    found = [
        f"{key} is not the same for all variants: {_listed(sorted(values))}"
        for key, values in _differing_settings(study).items()
    ]
    found += _different_sizes(study)
    found += [
        f"{arm.name}, a module of its own, is not told where documents begin, and sees across those of "
        "a row; the other variants do not"
        for arm in study.arms
        if study.shapes.get(arm.file_stem, {}).get("across_documents")
    ]
    tokens = sorted({_tokens_given(result) for result in study.results})
    if len(tokens) > 1 and len(study.sizes) == 1:
        found.append(f"tokens of a run differ a little: {tokens[0]:,} to {tokens[-1]:,}")
    found += _lost_updates(study)
    machines = {
        (machine.get("cpu"), machine.get("cores"))
        for lineage in study.lineages.values()
        if (machine := lineage.get("machine"))
    }
    if any(len(prepared) > 1 for prepared in _prepared(study).values()):
        found.append("runs of one seed were trained on different prepared data")
    if len(machines) > 1:
        found.append("the runs were made on different machines: their speeds cannot be compared")
    return found


# ---------------------------------------------------------------- what is refused


def _refuse_repeated(results: list[Result]) -> None:
    seen: dict[tuple[str, str, int], Result] = {}
    for result in results:
        key = (result.variant, result.size, result.seed)
        if key in seen:
            raise UserError(
                f"{seen[key].file} and {result.file} are both {result.variant}, seed {result.seed}: "
                "two campaigns are mixed in this folder",
                "keep the results of one campaign in a folder, and move the others away",
            )
        seen[key] = result


def _refuse_strangers(study: Study) -> None:
    names = asked_names(study.asked)
    for result in study.results:
        if names and result.variant not in names:
            raise UserError(
                f"{result.file} is of the variant {result.variant}, which the campaign does not have "
                f"({_listed(names)}): two campaigns are mixed in this folder",
                "move the results of the other campaign away",
            )


def _tokens_given(result: Result) -> float:
    """Tokens of all updates, of those too that taught nothing; as many as trained where unknown."""
    return result.record.get("tokens_given") or result.record["tokens"]


def _refuse_unequal(
    results: list[Result], verb: str, value: Callable[[Result], Any], nearly: float
) -> None:
    """Another number of trained or scored tokens makes losses incomparable."""
    known = [result for result in results if isinstance(value(result), (int, float))]
    for other in known[1:]:
        first = known[0]
        if abs(value(other) - value(first)) > nearly * value(first):
            raise UserError(
                f"{first.file.stem} {verb} {value(first):,} tokens, {other.file.stem} on "
                f"{value(other):,}: their losses cannot be compared",
                f"remove what does not belong (for example {other.file}, and its run), and make it "
                "again: mule lab run CAMPAIGN.yaml",
            )


# ---------------------------------------------------------------- what differs or is missing


def _missing_sizes(study: Study) -> list[str]:
    """Variants that have no result in one of the campaign's sizes."""
    sizes = [str(size) for size in study.asked.get("sizes") or [] if size]
    there = {(arm.variant, arm.size) for arm in study.arms}
    return [
        f"{variant}: no result at {size}"
        for size in sizes
        for variant in study.variants
        if (variant, size) not in there
    ]


def _different_sizes(study: Study) -> list[str]:
    found = []
    if (study.asked.get("budget") or {}).get("mode") == "flops_per_token":
        return []
    for size in study.sizes:
        active = {
            count: arm.name
            for arm in study.arms
            if arm.size == size and (count := arm.shape.get("active_params"))
        }
        if active and max(active) > (1 + _SAME_SIZE) * min(active):
            few, many = min(active), max(active)
            found.append(
                f"active parameters differ by {many / few - 1:.1%}, from {active[few]} ({few:,}) to "
                f"{active[many]} ({many:,}): part of a difference in loss may be that of size"
            )
    return found


def _lost_updates(study: Study) -> list[str]:
    """The variants that learned from less than they were given."""
    told = []
    for arm in study.arms:
        shares = [result.record["tokens"] / _tokens_given(result) for result in arm.results]
        if min(shares) < 1:
            told.append(f"{arm.name} {_listed(f'{share:.1%}' for share in shares)}")
    if not told:
        return []
    return [
        "updates taught nothing that were refused as spikes, or undone by a return to earlier weights "
        f"(optim.max_spike); learned from, of the tokens given: {'; '.join(told)}"
    ]


def _differing_settings(study: Study) -> dict[str, set[str]]:
    """Dotted keys that variants of one size and seed have otherwise, with their values."""
    cells: dict[tuple[int, str], list[Row]] = {}
    for result in study.results:
        if settings := read_settings(result.run):
            cells.setdefault((result.seed, result.size), []).append(_compared(settings))
    differing: dict[str, set[str]] = {}
    for runs in cells.values():
        for key in sorted({key for settings in runs for key in settings}):
            values = {str(settings.get(key)) for settings in runs}
            if len(values) > 1:
                differing.setdefault(key, set()).update(values)
    for key in searched_keys(study.asked.get("search") or {}):
        differing.pop(key, None)
    return differing


def _prepared(study: Study) -> dict[int, set[str]]:
    """The prepared data, named by their content, that the runs of each seed were trained on."""
    found: dict[int, set[str]] = {}
    for result in study.results:
        if name := study.lineages.get(result.file.stem, {}).get("data"):
            found.setdefault(result.seed, set()).add(str(name))
    return found


def _compared(settings: Row) -> Row:
    """The settings that must be the same, by dotted key."""
    kept = {
        f"{section}.{key}": value
        for section in _SAME_SECTIONS
        for key, value in (settings.get(section) or {}).items()
    }
    train = settings.get("train") or {}
    return kept | {f"train.{key}": train[key] for key in _SAME_OF_TRAIN if key in train}


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)
