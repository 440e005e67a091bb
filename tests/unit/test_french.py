"""French: the catalogues are whole and hold nothing idle, figures are written as French has them."""

from __future__ import annotations

import ast
import functools
import json
import string
from pathlib import Path
from typing import get_args

import pytest

from mule import fsio
from mule.compare.parameters import PARAMETERS
from mule.compare.verdict import Word
from mule.doctor.finding import ALL_KINDS, SEVERITIES
from mule.doctor.rules import all_rules
from mule.french import CATALOGUE, figure, retold, speaker
from mule.message import Message, joined
from mule.run import State
from tests.compare_case import write_run
from tests.doctor_case import history, run_folder
from tests.house.source import ROOT, Module

MULE = ROOT / "mule"
SOURCES = {
    "doctor": ("mule/doctor/", "mule/commands/doctor.py", "mule/cli/render_doctor.py"),
    "compare": ("mule/compare/", "mule/commands/compare.py", "mule/cli/render_compare.py"),
}
OTHERS = ("mule/compare/checks/", "mule/compare/dialects/")  # of mule recipe import


@functools.cache
def _modules(part: str) -> list[Module]:
    found = []
    for source in SOURCES[part]:
        place = ROOT / source
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            path = str(file.relative_to(ROOT))
            if not path.startswith(OTHERS):
                text = file.read_text(encoding="utf-8")
                found.append(Module(path, text, ast.parse(text)))
    return found


def _catalogue(part: str) -> dict[str, str]:
    sections = fsio.read_json(MULE / part / CATALOGUE)
    return {english: told for section in sections.values() for english, told in section.items()}


def _templates(part: str) -> set[str]:
    """Every template of a Message in the part's sources."""
    found = set()
    for module in _modules(part):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Message":
                first = node.args[0]
                assert isinstance(first, ast.Constant), f"{module.path}:{node.lineno}"
                found.add(str(first.value))
    return found


def _fixed(part: str) -> set[str]:
    """The words that are told without a template."""
    if part == "doctor":
        return {*(rule.title for rule in all_rules()), *SEVERITIES, *ALL_KINDS, *get_args(State)}
    return {*(parameter.label for parameter in PARAMETERS), *get_args(Word), *ALL_KINDS}


def _has_words(template: str) -> bool:
    literals = "".join(literal for literal, *_ in string.Formatter().parse(template))
    return any(word.isalpha() and len(word) > 1 for word in literals.replace(",", " ").split())


@pytest.mark.parametrize("part", SOURCES)
def test_every_sentence_has_its_french(part: str) -> None:
    wanted = {template for template in _templates(part) if _has_words(template)} | _fixed(part)
    assert not (missing := sorted(wanted - _catalogue(part).keys())), "\n".join(missing)


@pytest.mark.parametrize("part", SOURCES)
def test_no_french_is_idle(part: str) -> None:
    texts = {
        node.value
        for module in _modules(part)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    texts |= {text.strip() for text in texts} | {text.replace("_", " ") for text in texts}
    texts |= _fixed(part) | {"fine-tune, adapter", "{} and {}", "{} to {}"}
    published = "".join(f.read_text() for f in (MULE / "compare/published").glob("*.yaml"))
    idle = [key for key in _catalogue(part) if key not in texts and key not in published]
    assert not idle, "\n".join(idle)


@pytest.mark.parametrize("part", SOURCES)
def test_french_has_the_holes_of_the_english(part: str) -> None:
    for english, told in _catalogue(part).items():
        holes = [name for _, name, _, _ in string.Formatter().parse(english) if name is not None]
        filled = [name for _, name, _, _ in string.Formatter().parse(told) if name is not None]
        assert len(holes) == len(filled), english
        assert all(name == "" or int(name) < len(holes) for name in filled), told


@pytest.mark.parametrize("part", SOURCES)
def test_no_sentence_has_two_frenches(part: str) -> None:
    sections = fsio.read_json(MULE / part / CATALOGUE)
    seen: dict[str, str] = {}
    for section in sections.values():
        for english, told in section.items():
            assert seen.setdefault(english, told) == told, english


def test_rules_make_no_sentence_but_by_a_message() -> None:
    """An f-string of words would be told in English."""
    wrong = []
    for module in _modules("doctor"):
        if not module.path.startswith(("mule/doctor/rules/", "mule/doctor/experts.py")):
            continue
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.JoinedStr):
                continue
            text = "".join(
                str(part.value) for part in node.values if isinstance(part, ast.Constant)
            )
            if len([word for word in text.split() if word.isalpha()]) > 2 and "mule " not in text:
                wrong.append(f"{module.path}:{node.lineno}: {text}")
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- telling


@pytest.mark.parametrize(
    ("english", "french"),
    [
        ("1,234.5", "1\u202f234,5"),
        ("35%", "35\u202f%"),
        ("2e-5", "2e-5"),
        ("6.7B", "6,7B"),
        ("12 min", "12\u00a0min"),
        ("1.5 days", "1,5\u00a0jours"),
        ("3.2 GiB", "3,2\u00a0Gio"),
        ("0.5 ?", "0,5\u202f?"),
        ("-0.25", "-0,25"),
        ("v1.2 of it", "v1.2 of it"),
        ("optim.learning_rate=0.5", "optim.learning_rate=0.5"),
    ],
)
def test_figures(english: str, french: str) -> None:
    assert figure(english) == french


def test_a_message_keeps_what_it_was_made_of() -> None:
    inner = Message("{:,} rows", 1200)
    whole = "so: " + Message("{} and {:.0%}", inner, 0.5) + "."
    assert isinstance(whole, Message) and whole == "so: 1,200 rows and 50%."
    assert joined("; ", [inner, "x"]) == "1,200 rows; x" and not joined("; ", [])
    braces = Message("of {}", "{this}")
    assert braces + "!" == "of {this}!"


def test_sentences_are_told_with_french_figures_and_settings_as_they_are() -> None:
    say = speaker("fr", "doctor")
    template = "the run went back {} times, first from update {} to {}: {!s}"
    told = say(Message(template, 1, 2000, 3, "loss nan"))
    assert told.endswith("d'abord de la mise à jour 2000 à 3\u00a0: loss nan")
    told = say(Message("model.moe.aux_loss={:g}; or model.moe.balance=bias", 0.1))
    assert told == "model.moe.aux_loss=0.1\u202f; ou model.moe.balance=bias"
    assert say(Message("this {} has no French", 0.5)) == "this 0.5 has no French"
    assert say(joined(" and ", [Message("{} alarm", 1), Message("{} warnings", 1234)])) == (
        "1 alarme et 1234 avertissements"
    )


def test_a_result_is_retold_but_for_what_is_kept() -> None:
    say = speaker("fr", "compare")
    found = {"word": "ahead", "name": "ahead", "rows": [("1,000", 2)], "n": 1.5}
    assert retold(found, say, kept={"name"}) == {
        "word": "en avance",
        "name": "ahead",
        "rows": [["1\u202f000", 2]],
        "n": 1.5,
    }


# ---------------------------------------------------------------- the commands


NAN = {"kind": "update refused", "cause": "loss nan, gradient norm nan"}


def test_doctor_in_french(mule_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    case = history("fine-tune", events=[NAN | {"step": 40}, NAN | {"step": 90}])
    run = run_folder(tmp_path, case)
    code, text, _ = mule_cli("doctor", str(run.folder), "--lang", "fr")
    assert code == 1
    assert "case\u00a0: affinage, mise à jour 200 sur 200, terminé\u00a0: 1 alarme" in text
    assert "alarme  D101 valeur non numérique, depuis la mise à jour 40" in text
    assert "2 mises à jour sur 200 ont été refusées (loss nan, gradient norm nan)" in text
    assert "essayez  optim.learning_rate=0.0005" in text
    assert "examiné par" in text and "n'ont pas pu regarder, faute de" in text
    assert "ensuite\u00a0: mule doctor --explain D101" in text
    _, text, _ = mule_cli("doctor", str(run.folder), "--lang", "fr", "--json")
    found = json.loads(text.splitlines()[-1])
    assert found["verdict"] == "1 alarm" and found["fr"] == {"verdict": "1 alarme"}
    (finding,) = (f for f in found["findings"] if f["code"] == "D101")
    assert finding["title"] == "not a number" and finding["fr"]["title"] == "valeur non numérique"
    code, text, _ = mule_cli("doctor", "--rules", "--lang", "fr")
    assert code == 0 and "perte qui diverge" in text and "tout entraînement" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--explain", "D101"), "what --explain tells is in English only"),
        (("--env",), "what --env tells is in English only"),
        (("some-run", "--report"), "what --report tells is in English only"),
    ],
)
def test_what_is_told_in_english_only(words, message, mule_cli) -> None:  # type: ignore[no-untyped-def]
    code, _, err = mule_cli("doctor", *words, "--lang", "fr")
    assert code == 2 and message in err and "mule doctor RUN --lang fr" in err


def test_compare_in_french(mule_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "recipe.yaml").write_text(
        "name: mine\nmodel: {path: Qwen/Qwen2.5-0.5B-Instruct}\ndata: {train: [chats.jsonl]}\n"
        "optim: {learning_rate: 0.1}\ntrain: {epochs: 200, step_rows: 2}\n"
    )
    words = ("compare", "recipe.yaml", "--lang", "fr")
    code, text, _ = mule_cli(*words)
    assert code == 0
    for said in ("le vôtre", "taux d'apprentissage", "Points d'attention", "Le plus proche publié"):
        assert said in text, said
    assert "ensuite\u00a0: mule train recipe.yaml" in text
    code, text, _ = mule_cli(*words, "--json")
    found = json.loads(text.splitlines()[-1])
    assert found["fr"]["words"].startswith("Le plus proche publié")
    assert found["words"].startswith("Nearest published")
    rows = {row["key"]: row for row in found["fr"]["rows"]}
    assert rows["learning_rate"]["parameter"] == "taux d'apprentissage"
    code, text, _ = mule_cli("compare", "--list", "--lang", "fr")
    assert code == 0 and "Réglages publiés" in text
    code, _, err = mule_cli("compare", "recipe.yaml", "--out", "page.html", "--lang", "fr")
    assert code == 2 and "--lang cannot take effect on --out" in err


def test_runs_are_compared_in_french(mule_cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for seed, gain in enumerate((0.1, 0.11, 0.105)):
        losses = [3.0 - 0.1 * step + 0.3 * seed for step in range(8)]
        write_run(tmp_path / "runs", f"a{seed}", losses, seed=seed)
        better = [loss - gain for loss in losses]
        write_run(tmp_path / "runs", f"b{seed}", better, seed=seed, rate=1e-4)
    words = [f"{name}{seed}" for name in "ab" for seed in range(3)]
    code, text, _ = mule_cli("compare", *words, "--lang", "fr")
    assert code == 0
    for said in ("Entraînements côte à côte", "meilleure perte de validation", "réglage"):
        assert said in text, said
    assert "b0 contre a0\u00a0: perte de validation -0,1050 ± 0,0" in text
    assert "plus basse, au-delà de ce que font les graines" in text
    code, text, _ = mule_cli("compare", "a0", "b0", "--lang", "fr")
    assert code == 0 and "avec une seule graine" in text
