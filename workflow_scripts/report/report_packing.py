"""Write the page on a packing plan: its rows, their cost, and what attention sees in a few of them.

python -m workflow_scripts.report.report_packing --plan plan.parquet
    --report packing_report.json --tokens tokens/train.arrow --facts facts.json
    --page packing.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.packing import PackingReport

OUTPUT_VERSION = 1
logger = log.stage_logger("report_packing")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="plan of pack_sequences")
    parser.add_argument(
        "--report", type=Path, required=True, help="its counts and costs, by pack_sequences"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="the documents it places")
    parser.add_argument("--facts", type=Path, required=True, help="facts.json of the base model")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    from workflow_scripts.packing.plan import read_plan
    from workflow_scripts.report import packing_page
    from workflow_scripts.tokens.documents import Documents

    report = PackingReport.read(arguments.report)
    layer_windows = Facts.read(arguments.facts).layer_windows
    plan = read_plan(arguments.plan)
    documents = Documents(arguments.tokens)
    for name, reported, found, path in (
        ("n_rows", report.n_rows, len(plan.rows), arguments.plan),
        ("n_documents", report.n_documents, len(documents), arguments.tokens),
    ):
        if reported != found:
            raise log.StageError(
                "the report describes another packing",
                where=arguments.report,
                found=f"{name}: {reported}",
                expected=f"{found} ({path})",
                to_fix="pass files that the same run of pack_sequences wrote",
            )
    page = packing_page.page(plan, report, documents, layer_windows, source=str(arguments.plan))
    files.write_text(arguments.page, page)
    logger.info("wrote n_rows=%d path=%s", len(plan.rows), arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
