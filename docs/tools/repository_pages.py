"""Pages of the site for files outside `docs/` that a page links to.

The pages are also read as plain Markdown, where `[train.smk](../rules/train.smk)` leads to the file
in the repository. In the site the same link leads to a page with that file: Markdown as it is, any
other file as its text. mkdocs calls the functions `on_…` (`hooks` in mkdocs.yml).
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "repository"
"""Folder of these pages in the site."""
ROOTS = ("CHANGELOG.md", "data/README.md", "tests/benchmarks/README.md")
"""Files that the menu names."""
# Code is matched first, so that a link in it stays as it is.
CODE_OR_LINK = re.compile(r"^```.*?^```$|`[^`\n]+`|\]\((?!\w+:|#)([^)#\s]+)", re.M | re.S)
LANGUAGES = {".py": "python", ".smk": "python", ".yaml": "yaml", ".json": "json"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give headings the anchors that code hosts give them, so that a link works in both places."""
    config.mdx_configs["toc"]["slugify"] = _anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file that `docs/` links to, and for those that these link to."""
    texts = {
        f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()
    } | {root: (REPOSITORY / root).read_text(encoding="utf-8") for root in ROOTS}
    new = list(ROOTS)
    while texts:
        place, text = texts.popitem()
        for target in sorted(_targets(place, text) - set(new)):
            new.append(target)
            if target.endswith(".md"):
                texts[target] = (REPOSITORY / target).read_text(encoding="utf-8")
    for target in new:
        files.append(File.generated(config, _page(target), content=_content(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files outside `docs/` at their pages."""
    place = page.file.src_uri
    in_repository = (
        place.removeprefix(f"{FOLDER}/") if place.startswith(FOLDER) else f"docs/{place}"
    )

    def to_page(target: str) -> str:
        path = _resolve(in_repository, target)
        inside = path.removeprefix("docs/") if path.startswith("docs/") else _page(path)
        return posixpath.relpath(inside, posixpath.dirname(place))

    return _with_links(markdown, to_page)


def _anchor(heading: str, separator: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", separator)


def _with_links(markdown: str, replace: Callable[[str], str]) -> str:
    def replaced(found: re.Match[str]) -> str:
        return f"]({replace(found[1])}" if found[1] else found[0]

    return CODE_OR_LINK.sub(replaced, markdown)


def _targets(place: str, markdown: str) -> set[str]:
    """The files outside `docs/` that a page links to, as paths from the top of the repository."""
    paths = {_resolve(place, link) for link in CODE_OR_LINK.findall(markdown) if link}
    found = {path for path in paths if not path.startswith("docs/")}
    if missing := [path for path in found if not (REPOSITORY / path).is_file()]:
        raise PluginError(f"{place} links to what is not a file: {', '.join(sorted(missing))}")
    return found


def _resolve(place: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _page(path: str) -> str:
    return f"{FOLDER}/{path}" if path.endswith(".md") else f"{FOLDER}/{path}.md"


def _content(path: str) -> str:
    text = (REPOSITORY / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    fence = f"```{LANGUAGES.get(Path(path).suffix, 'text')}"
    return f"# {path}\n\n{fence}\n{text.rstrip()}\n```\n"
