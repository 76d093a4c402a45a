"""The documentation is right about the repository: links, files, programs and drawings."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess

import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY
from workflow_scripts.settings import config_schema

PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "*/*.md", "*/*/*.md", "config/*/*/*.md", ".github/*.md")
    for path in REPOSITORY.glob(pattern)
    if path.relative_to(REPOSITORY).parts[0] == ".github"
    or not path.relative_to(REPOSITORY).parts[0].startswith((".", "site", "results"))
)
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
# Files in `config/` are left out: a guide also names those that its reader writes.
NAMED_FILE = re.compile(
    r"(?<![\w/.])((?:docs|envs|profiles|rules|tests|workflow_scripts)/[\w./-]+)"
)
PROGRAM = re.compile(r"python -m (workflow_scripts(?:\.\w+)+)")
MADE_BY_READERS = {
    "envs/tramontane.sif",
    "tests/benchmarks/results/data_stages.json",
    "tests/benchmarks/results/packed_training_gpu.json",
}
# These name files that were there once.
HISTORY = {"CHANGELOG.md"}


def text_of(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


def anchors(page):
    """As code hosts make them of headings: lower case, without punctuation, hyphens for blanks."""
    fenced = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", fenced.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    folder = (REPOSITORY / page).parent
    for path, anchor in LINK.findall(CODE.sub("", text_of(page))):
        target = folder / path if path else REPOSITORY / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", sorted({*PAGES} - HISTORY))
def test_every_file_and_program_that_a_page_names_is_there(page):
    text = text_of(page)
    named = {path.rstrip(".") for path in NAMED_FILE.findall(text)} - MADE_BY_READERS
    assert not {path for path in named if not (REPOSITORY / path).exists()}
    modules = set(PROGRAM.findall(text))
    assert not {name for name in modules if importlib.util.find_spec(name) is None}


@pytest.mark.parametrize("page", [page for page in PAGES if "\n```yaml\n" in text_of(page)])
def test_a_config_in_a_page_has_options_that_there_are(page):
    schema = config_schema()
    for table in schema["$defs"].values():
        table.pop("required", None)  # a page shows only what an overlay changes
    configs = re.findall(r"^```yaml\n(.*?)^```$", text_of(page), re.MULTILINE | re.DOTALL)
    for config in map(yaml.safe_load, configs):
        jsonschema.validate(config or {}, schema)


def test_the_code_in_the_contributing_guide_is_that_of_the_files_it_links():
    text = text_of("docs/contributing.md")
    _, examples = text.split("## One example of each kind of file")
    examples, _ = examples.split("## Tests")
    for example in examples.split("### ")[1:]:
        (source,) = re.findall(r"\]\(\.\./([^)]+)\)", example)[:1]
        lines = {line.strip() for line in text_of(source).splitlines()}
        (excerpt,) = re.findall(r"^```python\n(.*?)^```$", example, re.MULTILINE | re.DOTALL)
        assert not {line.strip() for line in excerpt.splitlines()} - lines, source


def test_the_readme_leads_to_every_page_of_the_documentation():
    """In two steps at most: through the start page."""
    linked = {
        path
        for start in ("README.md", "docs/index.md", "docs/running.md", "docs/contributing.md")
        for path in re.findall(r"\]\((?:docs/|\.\./)?([^)#]+\.md)", text_of(start))
    }
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert linked >= pages


def test_the_menu_of_the_site_has_every_page():
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    menu = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8").partition("\nvalidation:")[0]
    assert set(re.findall(r": ([\w-]+\.md)$", menu, re.MULTILINE)) == pages


def test_the_drawings_are_those_of_their_program(tmp_path):
    shutil.copytree(REPOSITORY / "docs" / "tools", tmp_path / "docs" / "tools")
    program = tmp_path / "docs" / "tools" / "drawings.py"
    subprocess.run(["python", program], check=True)
    drawn = {path.name: path.read_text("utf-8") for path in (tmp_path / "docs/images").iterdir()}
    assert drawn.keys() == {"packed-row.svg", "steps.svg"}
    for name, drawing in drawn.items():
        repair = "run `python docs/tools/drawings.py` and commit what it wrote"
        assert (REPOSITORY / "docs" / "images" / name).read_text("utf-8") == drawing, repair


@pytest.mark.parametrize(
    "form", sorted(path.name for path in (REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"))
)
def test_a_form_for_issues_has_what_the_host_asks_for(form):
    found = yaml.safe_load((REPOSITORY / ".github/ISSUE_TEMPLATE" / form).read_text("utf-8"))
    if form != "config.yml":
        assert {"name", "description", "body"} <= found.keys()
        assert all({"type", "id", "attributes"} <= part.keys() for part in found["body"])
