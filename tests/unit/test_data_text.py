"""Text files: documents, long ones in pieces, and WikiText's articles."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mule.data.sources import Document, ReadOptions, detect, read, scan, text
from mule.data.sources.wikitext import cleaned, is_wikitext
from mule.errors import DataError

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
CLEAN = ReadOptions.make(wikitext="clean")
WIKI = """ 
 = Homarus gammarus = 
 
 A " <unk> " ( or " lobster " ) , of 1 @,@ 000 – 2 @,@ 000 kg and 0 @.@ 7 m ; red @-@ blue . 
 
 = = Ecology of <unk> = = 
 
 It doesn 't eat . It 's John 's ! [ 1 ] costs $ 5 or 3 % ?
 = = = Deep = = = 
 = Second <unk> = 
 
 Two = 2 . 
"""


def _documents(found: Iterable[object]) -> list[Document]:
    everything = list(found)
    documents = [item for item in everything if isinstance(item, Document)]
    assert len(documents) == len(everything)
    return documents


# ---------------------------------------------------------------- documents


def _split(content: str, size: int) -> list[tuple[str, int, bool]]:
    """The documents of a text that comes in parts of `size` characters, cut behind lines."""
    parts, start = [], 0
    while start < len(content):
        end = content.find("\n", start + size) + 1 or len(content)
        parts.append((content[start:end], 1 + content.count("\n", 0, start)))
        start = end
    return [(d.text, d.line, d.ends) for d in text.documents("f", parts)]


def test_stories_between_marks() -> None:
    content = "\n\none\n\n <|endoftext|> \n\n<|endoftext|>\nsay <|endoftext|>\ntwo\n<|endoftext|>"
    for size in (1, 5, 100):
        found = _split(content, size)
        assert found == [("one", 3, True), ("say <|endoftext|>\ntwo", 8, True)]


@given(
    st.text("ab \n", max_size=60).map(lambda t: t.replace("a", "<|endoftext|>")), st.integers(1, 9)
)
def test_parts_do_not_matter(content: str, size: int) -> None:
    assert _split(content, size) == _split(content, 10_000)


_WORDS = st.lists(st.text("ab \n.", min_size=1, max_size=9), max_size=12).map(" ".join)


@given(_WORDS, st.integers(1, 20))
def test_pieces_of_a_long_document_join_to_it(content: str, limit: int) -> None:
    whole = _split(content, 4)
    before, text.MAX_CHARS = text.MAX_CHARS, limit
    try:
        pieces = _split(content, 4)
    finally:
        text.MAX_CHARS = before
    assert "".join(piece for piece, _, _ in pieces) == "".join(piece for piece, _, _ in whole)
    assert [ends for _, _, ends in pieces] == [False] * (len(pieces) - 1) + [True] * bool(pieces)
    line = 1
    for n, (piece, at, _) in enumerate(pieces):
        assert at == line
        line += piece.count("\n")
        begins_well = piece[:1] == " " and piece[1:2].strip()
        assert n == 0 or begins_well or pieces[n - 1][0][-1] == "\n"


def test_a_long_file_comes_in_pieces_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "MAX_CHARS", 1_000_000)
    file = tmp_path / "long.txt"
    file.write_text("".join(f"{n} lines of words,\n" for n in range(250_000)))
    found = _documents(read([file]))
    assert [d.ends for d in found] == [False] * 5 + [True]
    assert all(1_000_000 <= len(d.text) < 1_000_100 for d in found[:-1])
    assert "".join(d.text for d in found) == file.read_text()
    assert all(d.text[0] == " " and d.text[1] != " " for d in found[1:])


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.tokens", "a.txt.gz"])
def test_the_kinds_of_text_files(tmp_path: Path, name: str) -> None:
    content = b"# Title\n\nwords\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name[-2:] == "gz" else content)
    found = _documents(read([tmp_path / name]))
    assert [d.text for d in found] == [content.decode()]
    assert detect(tmp_path / name) == "text"


# ---------------------------------------------------------------- WikiText


def test_articles_kept_and_cleaned(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(WIKI)
    assert detect(file) == "wikitext"
    kept = _documents(read([file]))
    assert "".join(d.text for d in kept) == WIKI.removeprefix(" \n")
    assert [(d.line, d.text.split("\n")[0]) for d in kept] == [
        (2, " = Homarus gammarus = "),
        (10, " = Second <unk> = "),
    ]
    first, second = _documents(read([file], CLEAN))
    assert first.text == (
        "Homarus gammarus\n\n"
        'A "" (or "lobster"), of 1,000–2,000 kg and 0.7 m; red-blue.\n\n'
        "Ecology of\n\n"
        "It doesn't eat. It's John's! [1] costs $5 or 3%?\n"
        "Deep\n"
    )
    assert second.text == "Second\n\nTwo = 2.\n"
    assert len(_documents(read([file], ReadOptions("text")))) == 1


@pytest.mark.parametrize(
    ("start", "is_wiki"),
    [
        (" \n = A = \n \n", True),
        (" = A b = ", True),
        (" = = A = = \n", False),
        ("= A =\n", False),
        (" = A \n", False),
        ("words\n = A = \n", False),
        ("", False),
    ],
)
def test_what_is_wikitext(start: str, is_wiki: bool) -> None:
    assert is_wikitext(start) == is_wiki


def test_wikitext_by_name_only_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("plain\n")
    with pytest.raises(DataError, match=r"a\.txt: not WikiText(.|\n)*data.format=text"):
        list(read([file], ReadOptions("wikitext")))


@given(st.text(" =<>@-,.'\"([)]ab\n", max_size=50))
def test_cleaning_twice_changes_no_word(dirty: str) -> None:
    assert "<unk>" not in cleaned(f"{dirty} <unk> ")
    kept = [c for c in cleaned(dirty) if c in "ab"]
    assert kept == [c for c in dirty if c in "ab"]


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="needs the development data")
@pytest.mark.parametrize("name", ["wikitext-2/valid.txt", "wikitext-103/wiki.valid.tokens"])
def test_published_wikitext(name: str) -> None:
    file = SHARED / "wikitext" / name
    published = file.read_text().replace("\r\n", "\n").removeprefix(" \n")
    assert "".join(d.text for d in _documents(scan(file))) == published
    clean = [d.text for d in _documents(scan(file, CLEAN))]
    assert len(clean) == 60 and clean[0].startswith("Homarus gammarus\n\nHomarus gammarus, known")
    for mark in ("<unk>", " ,", "@-@", "@,@", "( ", " )", "= =", "  "):
        assert not any(mark in article for article in clean), mark
