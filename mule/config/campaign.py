"""A campaign: variants of a model, trained alike, each from several seeds. One file says all of it.

Beside what is here, the file has the sections of a recipe that all runs share: tokenizer, data, train,
optim, checkpoint and evaluate.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from mule.config.hints import near
from mule.config.knobs import sections
from mule.config.lab import Amount, BudgetSection, VariantSection
from mule.config.layers import Layer, read_node, read_overrides
from mule.config.load import by_line, check_layers, recipe_text
from mule.config.presets import campaign_file
from mule.config.reader import YamlProblem, line_of, mapping_items, parse_yaml, plain
from mule.config.schema import Count, Recipe, Share, Text
from mule.config.search import SearchSection
from mule.config.section import Problem, Section, knob, section
from mule.config.section_check import Places, checked, knob_at
from mule.errors import ConfigError

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_+.-]{0,39}$")]
SHARED_SECTIONS = ("tokenizer", "data", "train", "optim", "checkpoint", "evaluate")
_NOT_SHARED = {
    "model": "a variant says what its model is; write it below `variants:`",
    "adapter": "a campaign trains new models; remove it",
    "export": "a campaign exports nothing; `mule export` does it with a run of it",
    "extends": "a campaign is one file; write the settings into it",
}


class HeldOutSection(Section):
    """What a campaign has of data beside a recipe."""

    test: list[Text] = knob([], "Files that a run is measured on when it has ended, never before.")
    test_share: Share = knob(
        0.0,
        "Share of each source in data.train kept apart as test set, the same for all runs, as "
        "data.valid_share is.",
    )

    def idle(self) -> Iterator[Problem]:
        why = "cannot take effect: data.test is given; remove one of the two"
        if self.test:
            yield Problem("test_share", why, because="test")


class ExpectSection(Section):
    """Tokens that the data must have, the ends of documents left out.

    A campaign of other data ends before it has begun.
    """

    train: Count | None = knob(None, "Tokens of data.train.", unit="tokens")
    valid: Count | None = knob(None, "Tokens of data.valid.", unit="tokens")
    test: Count | None = knob(None, "Tokens of data.test.", unit="tokens")


class DecodeSection(Section):
    """How decoding is measured once the runs have ended: with a cache and without."""

    enabled: bool = knob(True, "Measure it.", role="mechanical")
    batch: Annotated[list[Count], Field(min_length=1)] = knob(
        [1], "Texts decoded at once.", role="mechanical"
    )
    context: Annotated[list[Count], Field(min_length=1)] = knob(
        [128], "Lengths at which a token is decoded.", role="mechanical", unit="tokens"
    )
    repetitions: Count = knob(5, "Times that each is measured.", role="mechanical")


class CampaignFile(Section):
    """A campaign, but for the sections of a recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = knob(
        None,
        "Name of the campaign's folder. Default: the file's name.",
        role="mechanical",
        form="letters, digits, dot, dash and underscore, at most 100",
    )
    budget: BudgetSection = knob(..., "What all variants have in common: their active size.")
    variants: Annotated[dict[VariantName, VariantSection], Field(min_length=1)] = knob(
        ...,
        "What is compared, by name; docs/campaigns.md shows some.",
        form="names of lower-case letters, digits, dot, dash, plus and underscore",
    )
    baseline: Text | None = knob(
        None,
        "The variant that the others are compared with. Default: the first.",
        role="mechanical",
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = knob(
        [0, 1, 2], "Each variant is trained once from each: initial weights and order of the data."
    )
    sizes: list[Amount] = knob(
        [], "Budgets in place of the one in budget, such as [3m, 6m]: loss against parameters."
    )
    data: HeldOutSection = section(HeldOutSection)
    expect_tokens: ExpectSection = section(ExpectSection)
    search: SearchSection = section(SearchSection)
    decode: DecodeSection = section(DecodeSection)
    compile_table: bool = knob(
        False,
        "Measure for each variant what compiling costs and gains, once the runs have ended.",
        role="mechanical",
    )
    processes: Count | None = knob(
        None,
        "Processes that share a run, through torchrun. Default: one for each GPU here, else 1.",
        role="mechanical",
    )

    def conflicts(self) -> Iterator[Problem]:
        if self.baseline is not None and self.baseline not in self.variants:
            names = ", ".join(self.variants)
            yield Problem("baseline", f"no variant is called {self.baseline}; there are {names}")
        for name in ("seeds", "sizes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                yield Problem(name, "one is listed twice; remove it")


@dataclass(frozen=True)
class Campaign:
    """A campaign as it was given; `shared` is the part of every run's recipe."""

    plan: CampaignFile
    shared: Recipe
    text: str
    overrides: list[str]
    file: Path

    @property
    def name(self) -> str:
        return self.plan.name or self.file.stem

    @property
    def baseline(self) -> str:
        return self.plan.baseline or next(iter(self.plan.variants))


def load_campaign(path: Path | str, overrides: list[str] | None = None) -> Campaign:
    """Read a campaign (a file, or the name of one that comes with Mule) and apply the overrides.

    Raises ConfigError, listing every problem with its line.
    """
    overrides = overrides or []
    file = _find(path)
    text = recipe_text(file)
    own, common, problems = _parts(text, str(file))
    values: dict[str, Any] = {}
    for key, node in own:
        values.setdefault(key, {}).update(node) if key == "data" else values.update({key: node})
    words, others = _own_words(overrides, values, problems)
    node = parse_yaml(text) if not problems else None
    plan, found = checked(CampaignFile, values, Places(str(file), node, words))
    problems += found
    layers = [*([read_node(common, str(file), 0)] if common else []), _recipe_words(others)]
    shared, settings, found = check_layers(layers, str(file), complete=False)
    problems += found
    if shared and plan:
        problems += _at_odds(shared, plan, {key: s.place() for key, s in settings.items()}, file)
    if problems or shared is None or plan is None:
        hint = "docs/campaigns.md describes a campaign, docs/configuration.md the keys of a recipe"
        raise ConfigError(sorted(problems, key=by_line), hint)
    text += "".join(f"\n# command line: {word}" for word in overrides) + ("\n" if overrides else "")
    return Campaign(plan, shared, text, overrides, file)


def _find(path: Path | str) -> Path:
    if Path(path).is_file():
        return Path(path)
    if found := campaign_file(str(path)):
        return found
    inside = Path(path) / "campaign.yaml"
    if inside.is_file():
        raise ConfigError([f"{path}: a folder, not a campaign"], f"give the file: {inside}")
    raise ConfigError(
        [f"{path}: no such campaign"], "docs/campaigns.md shows one to begin with: give its file"
    )


# ---------------------------------------------------------------- the two parts


def _parts(text: str, source: str) -> tuple[list[tuple[str, Any]], MappingNode | None, list[str]]:
    """What is the campaign's own, as (key, value); the node of the recipe's part; the problems."""
    try:
        root = parse_yaml(text)
        if root is None:
            return [], None, [f"{source}: it is empty; docs/campaigns.md shows a campaign"]
        if not isinstance(root, MappingNode):
            return (
                [],
                None,
                [f"{source}:{line_of(root)}: a campaign holds keys, as `variants: ...`"],
            )
        return _sorted_keys(root, source)
    except YamlProblem as problem:
        return [], None, [f"{source}:{problem.line}: {problem.message}"]


def _sorted_keys(
    root: MappingNode, source: str
) -> tuple[list[tuple[str, Any]], MappingNode, list[str]]:
    own: list[tuple[str, Any]] = []
    common: list[tuple[Node, Node]] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    for (key_node, _), (key, line, value) in zip(root.value, mapping_items(root), strict=True):
        if key in seen:
            problems.append(f"{source}:{line}: {key}: given twice (first on line {seen[key]})")
        elif key == "data" and isinstance(value, MappingNode):
            mine = [pair for pair in value.value if pair[0].value in HeldOutSection.model_fields]
            rest = [pair for pair in value.value if pair not in mine]
            own.append((key, plain(_with_items(value, mine))))
            common.append((key_node, _with_items(value, rest)))
        elif key in CampaignFile.model_fields and key != "data":
            own.append((key, _filled(key, plain(value))))
        elif key in SHARED_SECTIONS:
            common.append((key_node, value))
        else:
            problems.append(f"{source}:{line}: {key}: {_unknown(key)}")
        seen.setdefault(key, line)
    return own, _with_items(root, common), problems


def _filled(key: str, value: Any) -> Any:
    """A variant without settings (`mha:`) is the plain model."""
    if key != "variants" or not isinstance(value, dict):
        return value
    return {name: {} if variant is None else variant for name, variant in value.items()}


def _with_items(node: MappingNode, items: list[tuple[Node, Node]]) -> MappingNode:
    return MappingNode(node.tag, items, node.start_mark, node.end_mark)


def _unknown(key: str) -> str:
    if key in _NOT_SHARED:
        return _NOT_SHARED[key]
    names = list(dict.fromkeys((*CampaignFile.model_fields, *SHARED_SECTIONS)))
    match = near(key.lower().replace("-", "_"), names)
    told = f"did you mean `{match}`?" if match else f"a campaign has {', '.join(names)}"
    return f"no such key; {told}"


# ---------------------------------------------------------------- the command line


def _own_words(
    overrides: list[str], values: dict[str, Any], problems: list[str]
) -> tuple[dict[str, str], list[str]]:
    """Put the campaign's own overrides into `values`; their words by key, and the other words."""
    words: dict[str, str] = {}
    others: list[str] = []
    for word in overrides:
        key, equals, text = word.partition("=")
        top, *below = key.split(".")
        is_held_out = top == "data" and below and below[0] in HeldOutSection.model_fields
        if not equals or not (is_held_out or (top in CampaignFile.model_fields and top != "data")):
            others.append(word)
            continue
        try:
            node = parse_yaml(text)
        except YamlProblem as problem:
            problems.append(f"command line: {word}: {problem.message}")
            continue
        value = None if node is None else plain(node)
        if isinstance(node, ScalarNode) and _wants_list(key):
            value = [value]
        inside = values
        for part in (top, *below)[:-1]:
            inside = inside.setdefault(part, {})
        if not isinstance(inside, dict):
            problems.append(f"command line: {word}: {key} has no keys below it")
            continue
        inside[(top, *below)[-1]] = value
        words[key] = word
    return words, others


def _wants_list(key: str) -> bool:
    """Whether a setting of the campaign is a list; one value on the command line is one item."""
    knob = knob_at(CampaignFile, tuple(key.split(".")))
    return knob is not None and knob.is_list


def _recipe_words(words: list[str]) -> Layer:
    """The overrides of the recipe's part; those of a run alone are refused."""
    allowed, refused = [], []
    for word in words:
        top = word.partition("=")[0].partition(".")[0]
        (refused if top in _NOT_SHARED and top in (*sections(), "extends") else allowed).append(
            word
        )
    layer = read_overrides(allowed, 1)
    for word in refused:
        why = _NOT_SHARED[word.partition("=")[0].partition(".")[0]]
        layer.problems.append(f"command line: {word}: {why}")
    return layer


def _at_odds(shared: Recipe, plan: CampaignFile, places: dict[str, str], file: Path) -> list[str]:
    """What a recipe may say and a campaign may not."""
    found = []

    def place(key: str) -> str:
        return places.get(key, f"{file}: {key}")

    if "train.seed" in places:
        found.append(f"{place('train.seed')}: the seeds of the runs are in `seeds`; remove it")
    if not shared.data.train:
        found.append(f"{file}: data.train is missing: the files to train on")
    if not shared.data.valid and shared.data.valid_share in ("auto", 0):
        found.append(
            f"{place('data.valid_share')}: a campaign is judged on fixed validation files; give "
            "data.valid, or a share of each source, as data.valid_share: 0.01"
        )
    if not plan.data.test and not plan.data.test_share:
        found.append(
            f"{file}: data.test is missing: the files of the test set; or a share of each source, "
            "as data.test_share: 0.01"
        )
    if plan.data.test_share and shared.data.valid:
        found.append(
            f"{file}: data.test_share goes with data.valid_share, data.test with data.valid; give "
            "both as files or both as shares"
        )
    if plan.data.test and not shared.data.valid:
        found.append(
            f"{file}: data.test goes with data.valid, data.test_share with data.valid_share; give "
            "both as files or both as shares"
        )
    found += _search_at_odds(shared, plan.search, place, places)
    if shared.train.freeze:
        found.append(f"{place('train.freeze')}: a campaign trains every weight; remove it")
    if shared.evaluate.patience is not None:
        found.append(
            f"{place('evaluate.patience')}: runs that end early have seen fewer tokens than others; "
            "remove it"
        )
    return found


def _search_at_odds(
    shared: Recipe, search: SearchSection, place: Callable[[str], str], given: Collection[str]
) -> list[str]:
    found = [
        f"{place(key)}: cannot take effect beside search, which finds it for each variant; remove "
        "one of the two"
        for key in search.searched
        if key in given
    ]
    lowest = search.ranges.get("optim.learning_rate", (1.0, 1.0))[0]
    if shared.optim.min_learning_rate > lowest:
        found.append(
            f"{place('optim.min_learning_rate')}: {shared.optim.min_learning_rate:g} is above the "
            f"lowest learning rate that search tries, {lowest:g}; lower it"
        )
    return found
