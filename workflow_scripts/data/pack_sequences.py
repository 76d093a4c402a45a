"""Plan the rows of training: which document, from which token, how many. Copies no token.

python -m workflow_scripts.data.pack_sequences --tokens train.arrow --facts facts.json
    --settings '{"strategy": "best_fit"}' --plan plan.parquet --report packing_report.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data import packing
from workflow_scripts.data.documents import Documents
from workflow_scripts.data.plan import Plan, write_plan
from workflow_scripts.settings import PackingSettings, settings_from_json

OUTPUT_VERSION = 2
logger = log.stage_logger("pack_sequences")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="documents of render_chats")
    parser.add_argument("--facts", type=Path, required=True, help="model facts: window and context")
    parser.add_argument("--settings", required=True, help="JSON of `packings.<name>`")
    parser.add_argument("--plan", type=Path, required=True, help="to write: the packing plan")
    parser.add_argument("--report", type=Path, required=True, help="to write: fill and cost")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(PackingSettings, arguments.settings)
    facts = files.read_json(arguments.facts)
    if settings.row_tokens > facts["context_tokens"]:
        raise log.StageError(
            "a row of training is longer than the model's context",
            where="packings.<name>.row_tokens",
            found=settings.row_tokens,
            expected=f"at most {facts['context_tokens']} ({arguments.facts})",
        )

    documents = Documents(arguments.tokens)
    if not len(documents):
        raise log.StageError(
            "there is nothing to pack",
            where=arguments.tokens,
            found="no document",
            to_fix="see rejected.parquet beside it, and datasets.<name>.rendering",
        )
    plan = Plan(
        rows=packing.plan_rows(
            documents.lengths,
            documents.n_copies,
            strategy=settings.strategy,
            row_tokens=settings.row_tokens,
            seed=settings.seed,
        ),
        row_tokens=settings.row_tokens,
        crosses_documents=settings.strategy == "concatenate",
    )
    n_supervised = [
        sum(
            int(
                documents[piece.document]
                .is_supervised[piece.start : piece.start + piece.length]
                .sum()
            )
            for piece in row
        )
        for row in plan.rows
    ]
    write_plan(arguments.plan, plan, window=facts["sliding_window"], n_supervised=n_supervised)
    pieces = [piece for row in plan.rows for piece in row]
    n_tokens = sum(piece.length for piece in pieces)
    window = facts["sliding_window"]
    report = {
        "strategy": settings.strategy,
        "row_tokens": settings.row_tokens,
        "sliding_window": window,
        "n_documents": len(documents),
        "n_documents_placed": int(documents.n_copies.sum()),
        "n_rows": len(plan.rows),
        "n_tokens": n_tokens,
        "n_supervised_tokens": sum(n_supervised),
        "fill_fraction": n_tokens / (len(plan.rows) * settings.row_tokens),
        "n_documents_cut": len({piece.document for piece in pieces if piece.start > 0}),
        "n_documents_beyond_window": int((documents.lengths > window).sum()) if window else 0,
        "attention_pairs": sum(
            packing.attention_pairs(length, window)
            for row in plan.rows
            for length in packing.attention_segments(row, crosses_documents=plan.crosses_documents)
        ),
    }
    files.write_json(arguments.report, report)
    logger.info("packed %s", log.fields(report))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
