"""Render conversations to token ids with mistral-common, and mark the supervised tokens.

Answers are supervised with their closing EOS; questions, system prompts, tool results and control
tokens are not. In a plain text every token is supervised.

Conversations are streamed in batches of a fixed size, rendered by several processes and written in
order, so the bytes of the files do not depend on the number of processes.

python -m workflow_scripts.tokens.render_chats --clean clean/ --tokenizer tokenizer/ --settings '{}'
    --processes 2 --tokens tokens/
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log, parallel
from workflow_scripts.chats import held_out
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.chats.rejections import check_rejected
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.handover.tokens import RenderingReport, SplitTokens
from workflow_scripts.settings import RenderingSettings, settings_from_json

if TYPE_CHECKING:
    import pyarrow as pa

    from workflow_scripts.tokens.rendered_batches import Totals

OUTPUT_VERSION = 2
N_REJECTIONS_LOGGED = 1000  # the others are in rejected.parquet only
logger = log.stage_logger("render_chats")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean_dataset")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.rendering`")
    parser.add_argument("--processes", type=int, default=1, help="number of processes")
    parser.add_argument("--tokens", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(RenderingSettings, arguments.settings)

    import pyarrow as pa
    from pyarrow import parquet

    from workflow_scripts.tokens import rendered_batches

    logger.info("started %s settings=%s", log.versions("mistral-common"), arguments.settings)
    started = time.monotonic()
    paths = {split: arguments.clean / f"{split}.parquet" for split in SPLITS}
    check_splits(arguments.clean / "cleaning_report.json")
    n_by_split = {split: parquet.read_metadata(path).num_rows for split, path in paths.items()}
    n_conversations = sum(n_by_split.values())
    batches = parallel.map_in_order(
        rendered_batches.render_batch,
        rendered_batches.clean_batches(paths),
        n_processes=arguments.processes,
        initializer=rendered_batches.load_renderer,
        initial_arguments=(arguments.tokenizer, settings),
    )
    batches = log.progress(
        batches, logger, total=n_conversations, unit="conversations", size=lambda one: one.n_read
    )
    totals = {split: rendered_batches.Totals() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                rendered_batches.arrow_writer(arguments.tokens / f"{split}.arrow")
            )
            for split in SPLITS
        }
        rejected = []
        for batch in batches:
            writers[batch.split].write_batch(batch.documents)
            rejected.append(batch.rejected)
            totals[batch.split].add(batch)
        table = pa.Table.from_batches(
            rejected, schema=rendered_batches.REJECTED_SCHEMA
        ).combine_chunks()
        check_rejected(
            [
                f"{row['source_file']}:{row['source_line']}: {row['reason']}: {row['detail']}"
                for row in table.slice(0, N_REJECTIONS_LOGGED).to_pylist()
            ],
            logger,
            n_rejected=len(table),
            n_read=n_conversations,
            limit=settings.max_rejected_fraction,
            key="datasets.<name>.rendering.max_rejected_fraction",
        )
        held_out.check_rendered(
            n_by_split,
            {split: total.n_supervised_tokens for split, total in totals.items()},
            arguments.tokens / "rejected.parquet",
        )
        files.write_parquet(arguments.tokens / "rejected.parquet", table)
    report = summary(totals, table)
    report.write(arguments.tokens / "rendering_report.json")
    duration = time.monotonic() - started
    measured = {**report.content(), "tokens_per_second": report.n_tokens / duration}
    logger.info("rendered %s", log.fields(measured))


def check_splits(cleaning_report: Path) -> None:
    """Check, before rendering, that no split that the config holds out is empty.

    A report of an older version lacks the shares, and a user's own folder may have no report.

    Raises:
        StageError: as `held_out.check_splits`.
    """
    if cleaning_report.is_file():
        report = CleaningReport.read(cleaning_report)
        for warning in held_out.check_splits(report, cleaning_report):
            logger.warning("%s", warning)


def summary(totals: Mapping[str, Totals], rejected: pa.Table) -> RenderingReport:
    """Make the report: totals, counts per split, and rejections by reason."""
    counts = Counter(rejected["reason"].to_pylist())
    return RenderingReport(
        n_documents=sum(total.n_documents for total in totals.values()),
        n_rejected=len(rejected),
        n_tokens=sum(total.n_tokens for total in totals.values()),
        n_supervised_tokens=sum(total.n_supervised_tokens for total in totals.values()),
        splits={
            split: SplitTokens(
                n_documents=total.n_documents,
                n_tokens=total.n_tokens,
                n_supervised_tokens=total.n_supervised_tokens,
                n_documents_up_to_tokens=dict(sorted(total.n_by_length.items())),
            )
            for split, total in totals.items()
        },
        n_rejected_by_reason=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
