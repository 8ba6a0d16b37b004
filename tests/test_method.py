"""docs/method.md is what the code's comments cite: every section that is cited exists, and nothing else is cited in its place."""

from __future__ import annotations

import re
import subprocess

import pytest
from tiny import ROOT

CITATION = re.compile(r"method\.md,?\s+(?:sections?\s+)?(\d+(?:\.\d+)*)")
PAGE = (ROOT / "docs" / "method.md").read_text()
SECTIONS = re.findall(r"^#+ (\d+(?:\.\d+)*)\.? ", PAGE, re.MULTILINE)


def texts() -> dict[str, str]:
    """{path: text} of the project's own text files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.md", "*.yaml", "*.sh", "*.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    names = listed.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.py")]  # not a clone
    return {name: (ROOT / name).read_text() for name in names if (ROOT / name).is_file()}


def test_every_citation_names_a_section_that_exists():
    cited = {(name, number) for name, text in texts().items() for number in CITATION.findall(text)}
    assert len(cited) > 15
    assert not {(name, number) for name, number in cited if number not in SECTIONS}


def test_no_citation_of_a_document_that_does_not_ship():
    assert not [name for name, text in texts().items() if re.search(r"\bDESIGN(\.md)?,? *\d", text)]


def test_sections_are_numbered_in_order():
    numbers = [tuple(int(part) for part in section.split(".")) for section in SECTIONS]
    assert numbers == sorted(set(numbers))
    assert all(int(number) in range(1, 11) for number in re.findall(r"\bsection (\d+)", PAGE))


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text()
    links = [target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if not target.startswith("http")]
    assert not [target for target in links if not (ROOT / page).parent.joinpath(target).exists()]
    folders = "guided_mt|latent_mt|evaluations|tests|reproduce|benchmarks|scripts|docs"
    files = re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", text)
    assert not [name for name in files if not (ROOT / name).exists()]


def test_the_table_of_contents_is_whole():
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^## (.+)", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) == anchors
