"""Links of the guides lead to what is there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

GUIDES = sorted(
    str(path.relative_to(REPOSITORY))
    for depth in ("", "*/", "*/*/")
    for path in REPOSITORY.glob(f"{depth}README.md")
    if not path.relative_to(REPOSITORY).parts[0].startswith(".")
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def anchors(guide):
    """As GitHub makes them of headings: lower case, without punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.*)$", CODE.sub("", guide.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("guide", GUIDES)
def test_every_link_leads_somewhere(guide):
    folder = (REPOSITORY / guide).parent
    for path, anchor in LINK.findall(CODE.sub("", (REPOSITORY / guide).read_text("utf-8"))):
        target = folder / path if path else REPOSITORY / guide
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_the_readme_leads_to_every_guide():
    linked = {path for path, _ in LINK.findall((REPOSITORY / "README.md").read_text("utf-8"))}
    assert linked >= set(GUIDES) - {"README.md"}
