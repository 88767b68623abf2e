"""Every link to a place in the repository leads somewhere."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.docs.pages import PAGES, Page, read_page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_resolve(page: Page) -> None:
    wrong = []
    for line, target in page.links:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        place = (page.path.parent / path).resolve() if path else page.path
        there = place.exists() and place.is_relative_to(ROOT)
        if there and anchor:
            there = place.suffix == ".md" and anchor in read_page(place).anchors
        if not there:
            wrong.append(f"{page.name}:{line}: {target}")
    assert wrong == []


def test_the_index_names_every_page() -> None:
    index = next(page for page in PAGES if page.name == "docs/README.md")
    named = {target.partition("#")[0] for _, target in index.links}
    assert {page.path.name for page in PAGES if page.name.startswith("docs/")} - named == {
        "README.md"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_has_as_many_cells_in_each_row(page: Page) -> None:
    width = 0
    for number, line in page.prose:
        if not line.startswith("|"):
            width = 0
            continue
        cells = line.replace("\\|", "").count("|")
        width = width or cells
        assert cells == width, f"{page.name}:{number}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_and_tables_stand_apart(page: Page) -> None:
    """Without an empty line before it a table is text, and a block may belong to the list above."""
    lines = ["", *page.text.splitlines()]
    starts = [block.line for block in page.blocks]
    starts += [n for n, line in page.prose if line.startswith("|") and lines[n - 1][:1] != "|"]
    assert [f"{page.name}:{n}" for n in starts if lines[n - 1].strip()] == []
