"""Plan the rows of training: which document, from which token, how many. Copies no token.

python -m workflow_scripts.packing.pack_sequences --tokens train.arrow --tokenizer tokenizer/
    --facts facts.json --settings '{"strategy": "best_fit"}' --plan plan.parquet
    --report packing_report.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.packing.long_documents import fit, supervised_tokens
from workflow_scripts.packing.packing import STRATEGIES, Pieces
from workflow_scripts.packing.packing_report import measure
from workflow_scripts.packing.plan import Plan, write_plan
from workflow_scripts.packing.splitting import TokenEnds
from workflow_scripts.settings import PackingSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

OUTPUT_VERSION = 3
logger = log.stage_logger("pack_sequences")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="documents of render_chats")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--facts", type=Path, required=True, help="model facts: shape and windows")
    parser.add_argument("--settings", required=True, help="JSON of `packings.<name>`")
    parser.add_argument("--plan", type=Path, required=True, help="to write: the packing plan")
    parser.add_argument("--report", type=Path, required=True, help="to write: fill and cost")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(PackingSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    if settings.row_tokens > facts.context_tokens:
        raise log.StageError(
            "a row of training is longer than the model's context",
            where="packings.<name>.row_tokens",
            found=settings.row_tokens,
            expected=f"at most {facts.context_tokens} ({arguments.facts})",
        )
    documents = Documents(arguments.tokens)
    if not len(documents):
        raise log.StageError(
            "there are no documents to pack",
            where=arguments.tokens,
            found="0 documents",
            to_fix="see rejected.parquet in the same folder, and datasets.<name>.rendering",
        )

    plan, counts = make_plan(documents, facts, settings, arguments.tokenizer)
    if not len(plan.rows):
        raise log.StageError(
            "no documents are left to pack",
            where="packings.<name>.long_documents",
            found=f"{settings.long_documents}; every document is longer than a row",
            to_fix="raise packings.<name>.row_tokens",
        )
    write_plan(arguments.plan, plan)
    report = measure(plan, documents, facts, counts)
    report.write(arguments.report)
    logger.info("packed %s", log.fields(report.content()))


def make_plan(
    documents: Documents, facts: ModelShape, settings: PackingSettings, tokenizer: Path
) -> tuple[Plan, Counter[str]]:
    """Return the plan, and what was cut or left out, by `long_documents.COUNTS`."""
    crosses_documents = settings.strategy == "concatenate"
    pieces, counts = Pieces.whole(documents.lengths), Counter[str]()
    if not crosses_documents:
        pieces, counts = fit(documents, settings, lambda: read_token_ends(tokenizer))
    n_copies = documents.n_copies[pieces.document]
    pieces = pieces.take(np.repeat(np.arange(pieces.n_pieces), n_copies))
    rows = STRATEGIES[settings.strategy](pieces, row_tokens=settings.row_tokens, seed=settings.seed)
    cost = CostModel.of(facts)
    n_supervised = supervised_tokens(documents, rows, crosses_documents=crosses_documents)
    pairs = cost.pairs(rows, crosses_documents=crosses_documents)
    plan = Plan(
        rows=rows,
        row_tokens=settings.row_tokens,
        strategy=settings.strategy,
        n_supervised=n_supervised,
        attention_pairs=pairs,
        training_flops=cost.training_flops(rows.n_tokens, n_supervised, pairs),
    )
    return plan, counts


def read_token_ends(tokenizer: Path) -> TokenEnds:
    """Return the ends of turns and sentences from the exported tokenizer."""
    official = load_mistral_tokenizer(tokenizer, for_training=True)
    return TokenEnds.of(official.instruct_tokenizer.tokenizer)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
