"""Every link of the documentation leads somewhere: to a file of the checkout, and a heading in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_pages import ROOT, anchors, links, pages, parts


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_to_a_file_and_a_heading(page: str) -> None:
    wrong = []
    for line, target in links(page):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists():
            wrong.append(f"{page}:{line}: {target}: no such file")
        elif not file.resolve().is_relative_to(ROOT):
            wrong.append(f"{page}:{line}: {target}: outside of the checkout")
        elif anchor and anchor not in anchors(str(file.resolve().relative_to(ROOT))):
            wrong.append(f"{page}:{line}: {target}: no such heading")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", [page for page in pages() if page.startswith("docs/")])
def test_a_page_of_the_site_links_to_pages_of_the_site(page: str) -> None:
    """What lies outside of docs/ is not on the site."""
    inside = ROOT / "docs"
    wrong = [
        f"{page}:{line}: {target}"
        for line, target in links(page)
        if not target.startswith(("https://", "#"))
        and not ((ROOT / page).parent / target.partition("#")[0]).resolve().is_relative_to(inside)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_page_is_linked_from_another() -> None:
    linked: set[Path] = set()
    for page in pages():
        for _, target in links(page):
            linked.add(((ROOT / page).parent / target.partition("#")[0]).resolve())
    alone = [page for page in pages() if page.startswith("docs/") and ROOT / page not in linked]
    assert alone in ([], ["docs/index.md"])


def test_a_page_begins_with_its_title() -> None:
    for page in pages():
        if page.startswith("docs/"):
            first = next(line for _, line in parts(page)[0] if line.strip())
            assert first.startswith("# "), page
