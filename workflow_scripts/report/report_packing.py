"""Show how a plan packs: what lies in its rows, what that saves, and what attention sees.

python -m workflow_scripts.report.report_packing --plan plan.parquet
    --report packing_report.json --tokens tokens/train.arrow --facts facts.json
    --page packing.html
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.packing.plan import read_plan
from workflow_scripts.report.packing_page import (
    STRATEGY_TEXTS,
    cost_html,
    histograms_html,
    masks_html,
    rows_html,
)
from workflow_scripts.tokens.documents import Documents

OUTPUT_VERSION = 1
logger = log.stage_logger("report_packing")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="plan of pack_sequences")
    parser.add_argument("--report", type=Path, required=True, help="its counts and costs")
    parser.add_argument("--tokens", type=Path, required=True, help="the documents it places")
    parser.add_argument("--facts", type=Path, required=True, help="model facts: the windows")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

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
                "the report is of another packing",
                where=arguments.report,
                found=f"{name}: {reported}",
                expected=f"{found} ({path})",
                to_fix="give the files of one run of pack_sequences",
            )
    sections = {
        "Rows": rows_html(report),
        "Cost": cost_html(report),
        "Lengths and fill": histograms_html(plan, documents, report.sliding_window),
        "What attention sees": masks_html(plan, documents, layer_windows),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{section}" for title, section in sections.items())
    intro = (
        f"<p>{STRATEGY_TEXTS[plan.strategy]}</p>"
        f'<p class="quiet">{pages.visible(str(arguments.plan))}</p>'
    )
    files.write_text(arguments.page, pages.page("Packing of the training rows", intro + body))
    logger.info("wrote n_rows=%d path=%s", len(plan.rows), arguments.page)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
