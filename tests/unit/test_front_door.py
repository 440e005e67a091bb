"""The front door: the citation, the table of what is proven, and the pages in French."""

from __future__ import annotations

from pathlib import Path

import pytest

import mule
from mule import fsio
from mule.commands import docs_proof
from mule.config.reader import parse_yaml, plain
from mule.data.sources import FORMATS
from tests.docs_pages import ROOT, inline_code, parts

RESULTS = ROOT / "bench" / "results"
FRENCH = {
    "README.fr.md": "README.md",
    "docs/fr/data.md": "docs/data.md",
    "docs/fr/fine-tune-on-your-laptop.md": "docs/fine-tune-on-your-laptop.md",
    "docs/fr/glossary.md": "docs/glossary.md",
}


def test_the_citation_names_this_version() -> None:
    found = plain(parse_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8")))
    assert found["version"] == mule.__version__
    assert {"cff-version", "message", "title", "authors"} <= found.keys()
    assert found["license"] == "Apache-2.0"


def test_security_says_where_and_how_soon() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert "within **7 days**" in text and "not in a public issue" in text


# ---------------------------------------------------------------- what is proven


def test_only_what_has_a_result_is_claimed(tmp_path: Path) -> None:
    assert len(docs_proof.proof_markdown(tmp_path).splitlines()) == 2  # no line but the head
    fsio.write_json(tmp_path / "plan.json", {"cases": [{"name": "half measured"}]})
    assert len(docs_proof.proof_markdown(tmp_path).splitlines()) == 2


def test_doctor_and_plan_have_their_lines_once_measured(tmp_path: Path) -> None:
    recall = {"found": 97, "runs": 100}
    healthy = {"runs": 60, "false_alarms": 1}
    found = {"held-out": {"recall": recall, "healthy": healthy}}
    fsio.write_json(tmp_path / "doctor.json", found)
    summary = {"memory": {"median_error": 0.034}, "time": {"median_error": 0.081}, "runs": 1200}
    found = {"cases": [{"error": {}}], "summary": {"held out": summary}}
    fsio.write_json(tmp_path / "plan.json", found)
    text = docs_proof.proof_markdown(tmp_path)
    assert "97 of 100 planted faults found, 1 of 60 healthy runs warned of" in text
    assert "memory off by 3.4% and time by 8.1% (medians) in 1,200 runs" in text
    assert "[accuracy](docs/accuracy.md)" in text
    told = docs_proof.proof_markdown(tmp_path, "fr")
    assert "97 défauts plantés sur 100 trouvés" in told
    assert "mémoire à 3,4\u202f% près et durée à 8,1\u202f% près" in told
    assert "[justesse](docs/accuracy.md)" in told


def test_the_table_of_today_is_the_same_in_french() -> None:
    """The same lines, the same figures, and no English among them."""
    english, french = (
        docs_proof.proof_markdown(RESULTS, language).splitlines() for language in ("en", "fr")
    )
    assert len(english) == len(french) > 5
    for line, told in zip(english[2:], french[2:]):
        figures = [c for c in line.split("|")[2] if c.isdigit()]
        assert figures == [c for c in told.split("|")[2] if c.isdigit()]
        assert line.split("|")[1:3] != told.split("|")[1:3]
        assert " of " not in told and " the " not in told, told


# ---------------------------------------------------------------- French pages


@pytest.mark.parametrize("page", FRENCH)
def test_languages_link_to_each_other(page: str) -> None:
    english = FRENCH[page]
    for one, other, words in ((page, english, "In English"), (english, page, "En français")):
        line = next(text for _, text in parts(one)[0] if words.lower() in text.lower())
        link = line.split("](")[1].split(")")[0]
        assert ((ROOT / one).parent / link).resolve() == ROOT / other


@pytest.mark.parametrize("page", [page for page in FRENCH if page.startswith("docs/")])
def test_french_pages_show_the_commands_of_the_english_ones(page: str) -> None:
    """Comments in a block are told in French; what is typed is the same."""

    def typed(name: str) -> set[str]:
        lines = [line for block in parts(name)[1] for line in block.lines]
        return {line.partition(" #")[0].strip() for line in lines}

    assert typed(page) <= typed(FRENCH[page])


def test_the_french_data_page_names_every_format() -> None:
    named = {text for _, text in inline_code("docs/fr/data.md")}
    assert not (missing := FORMATS.keys() - named), missing


def test_the_french_glossary_has_every_word() -> None:
    english, french = (
        [line for _, line in parts(page)[0] if line.startswith("##")]
        for page in ("docs/glossary.md", "docs/fr/glossary.md")
    )
    assert [len(line.split()[0]) for line in english] == [len(line.split()[0]) for line in french]
