"""Write what is generated from the settings: the JSON schema, and the option tables of the README.

python -m workflow_scripts.settings_documents            (or: make schema)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.settings import config_schema, option_tables

SCHEMA = Path("config/config.schema.json")
README = Path("config/README.md")
BEGIN = "<!-- options: made by `make schema` from workflow_scripts/settings/ -->\n"
END = "<!-- options end -->\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.parse_args(argv)
    files.write_text(SCHEMA, schema_text())
    files.write_text(README, with_options(README.read_text(encoding="utf-8")))


def schema_text() -> str:
    return json.dumps(config_schema(), indent=2, ensure_ascii=False) + "\n"


def with_options(readme: str) -> str:
    """The README with its option tables as the settings have them now."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{option_tables()}\n{END}{after}"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
