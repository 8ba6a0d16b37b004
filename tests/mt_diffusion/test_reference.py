"""docs/commands.md and flags.json are what the parsers say now."""

from __future__ import annotations

import re

import pytest

from mt_diffusion import reference
from mt_diffusion.commands import COMMANDS


@pytest.fixture(scope="module")
def written():
    return reference.written()


def test_they_are_not_stale(written):
    for file, text in written.items():
        assert file.read_text(encoding="utf-8") == text, f"{file.name}: run `python -m mt_diffusion.reference`"


def test_links_lead_to_headings(written):
    page = written[reference.PAGE]
    headings = {reference._slug(line.lstrip("# ")) for line in page.splitlines() if line.startswith("#")}
    links = re.findall(r"\]\(#([^)]+)\)", page)
    assert len(links) > len(COMMANDS) and set(links) <= headings


def test_tables_are_whole(written):
    for line in written[reference.PAGE].splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5), line


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Data", ("Data", "")),
        ("Model (ADM's flags)", ("Model", "ADM's flags.")),
        ("Labels (--mt_task label). The rest", ("Labels", "--mt_task label. The rest.")),
    ],
)
def test_headings(title, expected):
    assert reference.heading(title) == expected
