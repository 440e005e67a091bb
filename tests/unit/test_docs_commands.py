"""Every command, setting and recipe on a page of the documentation is one that Mule takes."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from typer._click.exceptions import (
    BadOptionUsage,
    MissingParameter,
    NoArgsIsHelpError,
    NoSuchOption,
    UsageError,
)

from mule.config.campaign import CampaignFile, HeldOutSection, load_campaign
from mule.config.knobs import knobs, sections
from mule.config.lab import BudgetSection, VariantSection
from mule.config.load import load_recipe
from mule.config.reader import parse_yaml, plain
from mule.config.schema import Recipe
from mule.errors import ConfigError
from tests.cli_words import is_setting, parse, root, setting_problems, verb
from tests.docs_pages import ROOT, Block, Shown, commands, inline_code, pages, parts, words_of

# Blocks of YAML that are no recipe and no campaign, by page and first key.
OTHER_YAML = {
    ("docs/compare.md", "title"): "a published setup",
    ("docs/eval.md", "about"): "a task",
    ("docs/eval.md", "score"): "a task",
    ("docs/import.md", "base_model"): "settings of Axolotl",
    ("docs/from-axolotl.md", "base_model"): "settings of Axolotl",
    ("docs/from-llama-factory.md", "model_name_or_path"): "settings of LLaMA-Factory",
}
# Pages that speak of the make targets, the modules or the keys of another project.
OTHER_MAKE = ("docs/from-donkeytune.md", "docs/import.md")
OTHER_PYTHON = ("docs/from-nanochat.md",)
OTHER_KEYS = ("docs/from-torchtune.md",)
# The page that is made of the parser itself.
GENERATED = "docs/cli.md"
# Names that begin like a section of the recipe and are none of its keys.
_WEIGHTS = re.compile(r"model\.(layers|embed_tokens|norm)\b")
# Metadata of a GGUF file.
_GGUF = re.compile(r"tokenizer\.ggml\.")
_FILE = re.compile(
    r"\.(py|md|json|jsonl|yaml|yml|txt|csv|gguf|safetensors|html|svg|pt|npz|parquet|bin|zst|gz)$"
)
_KEY = re.compile(rf"({'|'.join(n for n in Recipe.model_fields)})(\.[a-z_0-9]+)+(=.*)?")


def _shown(page: str, program: str) -> list[Shown]:
    return [shown for shown in commands(page) if shown.words[0] == program]


def _problem(shown: Shown) -> str | None:
    """Why the CLI would not take it; of a verb that is only mentioned, that there is none."""
    words = shown.words[1:]
    if "-m" in words:  # torchrun -m mule.cli.main train ...
        words = words[words.index("-m") + 2 :]
    if not words or words[0].startswith("-"):
        known = {name for param in root().params for name in param.opts} | {"--help"}
        return f"no option {words[0]}" if words and words[0] not in known else None
    name, command = verb(words)
    if command is None:
        return f"no verb {name}"
    try:
        parse(words)
    except NoSuchOption as error:
        return error.format_message()
    except (BadOptionUsage, MissingParameter, NoArgsIsHelpError) as error:
        return error.format_message() if shown.in_block else None
    except UsageError as error:
        return error.format_message()
    except SystemExit:
        return None
    except RuntimeError as error:  # typer.Exit, of --help
        return None if type(error).__name__ == "Exit" else str(error)
    return _setting_problem(name, words)


def _setting_problem(name: str, words: tuple[str, ...]) -> str | None:
    if name == "lab check":
        return None
    if name == "lab run":
        return _campaign_problem([word for word in words if "=" in word and word[0] != "-"])
    if name == "lab shapes":
        budget = [word.partition("=")[0] for word in words if re.match(r"\w+=", word)]
        unknown = set(budget) - BudgetSection.model_fields.keys()
        return f"no such keys of a budget: {unknown}" if unknown else None
    return "\n".join(setting_problems([word for word in words if is_setting(word)])) or None


def _campaign_problem(words: list[str]) -> str | None:
    try:
        load_campaign("lab/lab-10m", words)
    except ConfigError as error:
        return error.message
    return None


@pytest.mark.parametrize("page", [page for page in pages() if page != GENERATED])
def test_the_cli_takes_every_command(page: str) -> None:
    shown = _shown(page, "mule")
    shown += [one for one in _shown(page, "torchrun") if "mule.cli.main" in one.words]
    wrong = [f"{one}\n  {found}" for one in shown if (found := _problem(one))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mule train a.yaml train.stesp=3", "train.stesp"),
        ("mule train a.yaml train.steps=many", "train.steps"),
        ("mule train a.yaml --nam x", "--nam"),
        ("mule trian a.yaml", "no verb trian"),
        ("mule lab run x.yaml seeds=[0,0]", "twice"),
        ("mule lab shapes --active 10m num_layer=3", "num_layer"),
        ("mule --versoin", "no option --versoin"),
        ("mule merge", "adapter"),
        ("mule train a.yaml adapter.lora.r=16 --name b", None),
        ("mule export run --types q8_0 --imatrix", None),
        ("mule train --help", None),
        ("mule --version", None),
    ],
)
def test_the_test_sees_a_command_that_does_not_work(text: str, found: str | None) -> None:
    problem = _problem(Shown("page", 1, words_of(text), True))
    assert problem is None if found is None else problem is not None and found in problem


def test_a_verb_may_be_mentioned_without_what_it_needs() -> None:
    assert _problem(Shown("page", 1, ("mule", "merge"), False)) is None
    assert _problem(Shown("page", 1, ("mule", "lab"), False)) is None
    assert _problem(Shown("page", 1, ("mule", "lab", "rnu"), False)) == "no verb lab rnu"


@pytest.mark.parametrize("page", [page for page in pages() if page not in OTHER_KEYS])
def test_every_setting_that_is_named_exists(page: str) -> None:
    wrong = []
    for line, text in inline_code(page):
        words = text.split()
        if all(_KEY.fullmatch(word) for word in words):
            wrong += [f"{page}:{line}: {found}" for word in words if (found := _wrong(word))]
    assert not wrong, "\n".join(wrong)


def _wrong(text: str) -> str | None:
    """What is wrong with `section.key` or `section.key=value`, if it is a setting at all."""
    key, _, value = text.partition("=")
    section, _, name = key.partition(".")
    is_other = _WEIGHTS.match(text) or _FILE.search(text) or _GGUF.match(text)
    is_campaigns = section == "data" and name in HeldOutSection.model_fields
    is_entry = any(key.startswith(f"{owner}.") for owner, knob in knobs().items() if knob.is_map)
    if is_other or is_campaigns or is_entry or key in sections():
        return None
    if key not in knobs():
        return f"{text}: no such setting"
    is_meant = value and not re.fullmatch(r"[A-Z_.]+", value)  # RUN, FILE, ...
    return "\n".join(setting_problems([text])) or None if is_meant else None


# ---------------------------------------------------------------- recipes


def _yaml_blocks() -> list[Block]:
    found = []
    for page in pages():
        for block in parts(page)[1]:
            if block.language == "yaml":
                found.append(block)
            for match in re.finditer(r"cat > \S+\.yaml <<'END'\n(.*?)\nEND\n", block.text, re.S):
                found.append(Block(page, block.line, "yaml", tuple(match[1].split("\n"))))
    return found


@pytest.mark.parametrize("block", _yaml_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_every_recipe_and_campaign_loads(block: Block, tmp_path: Path) -> None:
    node = parse_yaml(block.text)
    assert node is not None
    keys = list(plain(node))
    if (block.page, keys[0]) in OTHER_YAML:
        return
    (file := tmp_path / "shown.yaml").write_text(block.text, encoding="utf-8")
    if set(keys) <= Recipe.model_fields.keys():
        load_recipe(file, complete=False)
    elif keys == ["variants"]:
        for variant in plain(node)["variants"].values():
            VariantSection.model_validate(variant)
    else:
        assert set(keys) <= CampaignFile.model_fields.keys() | Recipe.model_fields.keys()
        load_campaign(file)


def test_no_exception_is_left_over() -> None:
    first = {(block.page, next(iter(plain(parse_yaml(block.text))))) for block in _yaml_blocks()}
    assert OTHER_YAML.keys() <= first


# ---------------------------------------------------------------- other programs


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", [page for page in pages() if page not in OTHER_MAKE])
def test_every_make_target_exists(page: str) -> None:
    wrong = [str(one) for one in _shown(page, "make") if one.words[1] not in _targets()]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in pages() if page not in OTHER_PYTHON])
def test_every_python_file_module_and_test_exists(page: str) -> None:
    wrong = []
    for one in [*_shown(page, "python"), *_shown(page, "pytest")]:
        words = one.words[1:]
        if one.words[0] == "python" and words[0] == "-m":
            if words[1] != "pytest" and not _module(words[1]):
                wrong.append(str(one))
            words = words[2:]
        files = [word for word in words if re.fullmatch(r"(bench|tests|tools|mule)/\S+\.py", word)]
        wrong += [f"{one}: no {file}" for file in files if not list(ROOT.glob(file))]
    assert not wrong, "\n".join(wrong)


def _module(name: str) -> bool:
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", pages())
def test_every_extra_that_is_installed_exists(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {name for one in _shown(page, "pip") for name in re.findall(r"mule\[(\w+)\]", str(one))}
    assert named <= extras.keys()


_NAMED = re.compile(
    r"(?<![\w./])(?:model|data|train|optim|adapter|evaluate|checkpoint|tokenizer)"
    r"(?:\.[a-z_][a-z_0-9]*)+(?![\w(])"
)


@pytest.mark.parametrize("file", sorted((ROOT / "mule/doctor/rules").glob("d*.py")), ids=str)
def test_the_doctor_names_settings_that_exist(file: Path) -> None:
    named = set(_NAMED.findall(file.read_text(encoding="utf-8")))
    wrong = {key for key in named if key not in knobs() and key not in sections()}
    assert not {key for key in wrong if not _FILE.search(key) and not _WEIGHTS.match(key)}
