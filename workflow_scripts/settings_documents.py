"""Write the documents that are generated from the settings: the JSON schema and the options page.

python -m workflow_scripts.settings_documents            (or: make schema)
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.settings import config_schema, option_tables

SCHEMA = Path("config/config.schema.json")
PAGE = Path("docs/options.md")
TOP = "Top level"
INTRODUCTION = """\
<!-- made by `make schema` from workflow_scripts/settings/ -->
# Options

Every option of a config, with its default. `<name>` stands for a name that you choose.
[Run, and run again](running.md#how-configs-are-layered) explains how configs are layered, and
[what re-runs](running.md#what-re-runs-when-a-value-changes) when a value changes.
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.parse_args(argv)
    files.write_text(SCHEMA, schema_text())
    files.write_text(PAGE, page())


def schema_text() -> str:
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def page() -> str:
    """Markdown: every option, one table per settings class."""
    sections = option_tables().split("### ")[1:]
    return "\n".join([INTRODUCTION, *map(_section, sections)]).replace("\n\n\n", "\n\n")


def _section(section: str) -> str:
    """A table of options, each of which that is a table itself links to its own section."""
    title, _, text = section.partition("\n\n")
    path = "" if title == TOP else re.sub(r"[^\w-]", "", title.lower())
    text = re.sub(r"\| `(\w+)` \| see below", rf"| `\1` | [see below](#{path}\1)", text)
    return f"## {title}\n\n{text[0].upper()}{text[1:]}"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
