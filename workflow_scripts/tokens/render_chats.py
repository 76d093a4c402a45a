"""Render conversations to token ids with mistral-common, and mark what training may learn from.

Answers are supervised with their closing EOS; questions, system prompts, tool results and control
tokens are not. Of a plain text, every token is.

Conversations stream through in batches of a fixed size, spread over processes and written in their
order, so the files are the same bytes however many processes there are.

python -m workflow_scripts.tokens.render_chats --clean clean/ --tokenizer tokenizer/ --settings '{}'
    --processes 2 --tokens tokens/
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from workflow_scripts import files, log, parallel
from workflow_scripts.chats import held_out
from workflow_scripts.chats.messages import SPLITS, Message
from workflow_scripts.chats.rejections import check_rejected
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.handover.tokens import RenderingReport, SplitTokens
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import RenderingSettings, settings_from_json
from workflow_scripts.tokens.documents import documents_schema
from workflow_scripts.tokens.rendering import CannotRender, Renderer, Rendering

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

OUTPUT_VERSION = 2
BATCH_CONVERSATIONS = 1000
N_REJECTIONS_LOGGED = 1000  # the rest is in rejected.parquet alone
logger = log.stage_logger("render_chats")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--clean", type=Path, required=True, help="folder of clean_dataset")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--settings", required=True, help="JSON of `datasets.<name>.rendering`")
    parser.add_argument("--processes", type=int, default=1, help="processes to spread work over")
    parser.add_argument("--tokens", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(RenderingSettings, arguments.settings)

    logger.info("started %s settings=%s", log.versions("mistral-common"), arguments.settings)
    started = time.monotonic()
    paths = {split: arguments.clean / f"{split}.parquet" for split in SPLITS}
    check_splits(arguments.clean / "cleaning_report.json")
    n_by_split = {split: n_rows(path) for split, path in paths.items()}
    n_conversations = sum(n_by_split.values())
    batches = parallel.map_in_order(
        render_batch,
        clean_batches(paths),
        n_processes=arguments.processes,
        initializer=load_renderer,
        initial_arguments=(arguments.tokenizer, settings),
    )
    batches = log.progress(
        batches, logger, total=n_conversations, unit="conversations", size=lambda one: one.n_read
    )
    totals = {split: Totals() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(arrow_writer(arguments.tokens / f"{split}.arrow"))
            for split in SPLITS
        }
        rejected = []
        for batch in batches:
            writers[batch.split].write_batch(batch.documents)
            rejected.append(batch.rejected)
            totals[batch.split].add(batch)
        table = rejected_table(rejected)
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


@dataclass(frozen=True)
class CleanBatch:
    """Conversations of `clean_schema`, of one split."""

    split: str
    rows: pa.RecordBatch


@dataclass(frozen=True)
class RenderedBatch:
    """What became of a `CleanBatch`."""

    split: str
    n_read: int
    documents: pa.RecordBatch
    rejected: pa.RecordBatch


@dataclass
class Totals:
    """Sums over one split."""

    n_documents: int = 0
    n_tokens: int = 0
    n_supervised_tokens: int = 0
    n_by_length: Counter[int] = field(default_factory=Counter)
    """Documents by the power of two that their length in tokens does not pass."""

    def add(self, batch: RenderedBatch) -> None:
        lengths = batch.documents.column("n_tokens").to_numpy()
        self.n_documents += len(lengths)
        self.n_tokens += int(lengths.sum())
        self.n_supervised_tokens += int(
            batch.documents.column("n_supervised_tokens").to_numpy().sum()
        )
        self.n_by_length.update(1 << (int(length) - 1).bit_length() for length in lengths)


def check_splits(cleaning_report: Path) -> None:
    """Before anything is rendered: no split that the config holds out is empty.

    A report of an older version says nothing of shares, and a folder of the user's may have none.

    Raises:
        StageError: as `held_out.check_splits`.
    """
    if cleaning_report.is_file():
        report = CleaningReport.read(cleaning_report)
        for warning in held_out.check_splits(report, cleaning_report):
            logger.warning("%s", warning)


def n_rows(path: Path) -> int:
    from pyarrow import parquet

    return parquet.read_metadata(path).num_rows


def clean_batches(paths: Mapping[str, Path]) -> Iterator[CleanBatch]:
    """The conversations of all splits, read as they are asked for."""
    from pyarrow import parquet

    columns = ["id", "messages", "tools", "n_copies", "source", "source_file", "source_line"]
    for split, path in paths.items():
        # pre_buffer would hold a whole row group, which may be the whole file.
        with parquet.ParquetFile(path, pre_buffer=False) as table:
            for rows in table.iter_batches(BATCH_CONVERSATIONS, columns=columns):
                yield CleanBatch(split, rows)


@contextlib.contextmanager
def arrow_writer(path: Path) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """Arrow IPC written batch by batch, under its name only once it is whole."""
    import pyarrow as pa

    with files.atomic_file(path) as temporary, pa.OSFile(str(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, documents_schema()) as writer:
            yield writer


@dataclass(frozen=True)
class Stage:
    """What a process keeps from batch to batch."""

    renderer: Renderer
    settings: RenderingSettings


_loaded: Stage | None = None


def load_renderer(tokenizer: Path, settings: RenderingSettings) -> None:
    """Called once in each process: a tokenizer takes a second to load."""
    global _loaded
    official = load_mistral_tokenizer(tokenizer, for_training=True)
    _loaded = Stage(Renderer(official, supervise=settings.supervise), settings)


def render_batch(batch: CleanBatch) -> RenderedBatch:
    """One batch, in a process that `load_renderer` prepared."""
    import pyarrow as pa

    assert _loaded is not None
    kept: list[int] = []
    renderings: list[Rendering] = []
    rejected: list[tuple[int, CannotRender]] = []
    tools = batch.rows.column("tools").to_pylist()
    conversations = list(read_messages(batch.rows.column("messages")))
    contents = (message["content"] for messages in conversations for message in messages)
    _loaded.renderer.encode_ahead(filter(None, contents))
    for row, messages in enumerate(conversations):
        try:
            rendering = _loaded.renderer.render(messages, tools[row])
            check_length(len(rendering.input_ids), _loaded.settings.max_document_tokens)
        except CannotRender as cannot:
            rejected.append((row, cannot))
            continue
        kept.append(row)
        renderings.append(rendering)
    places = [row for row, _ in rejected]
    columns = batch.rows.take(pa.array(places, pa.int64())).select(list(REJECTED_ORIGIN))
    reasons = {
        "reason": pa.array([cannot.reason for _, cannot in rejected], pa.string()),
        "detail": pa.array([cannot.detail for _, cannot in rejected], pa.string()),
    }
    return RenderedBatch(
        split=batch.split,
        n_read=batch.rows.num_rows,
        documents=document_batch(batch.rows.take(pa.array(kept, pa.int64())), renderings),
        rejected=pa.RecordBatch.from_arrays(
            [*columns.columns, *reasons.values()], schema=rejected_schema()
        ),
    )


def check_length(n_tokens: int, limit: int | None) -> None:
    if limit is not None and n_tokens > limit:
        raise CannotRender("too many tokens", f"{n_tokens} tokens, at most {limit} wanted")


def read_messages(column: pa.ListArray) -> Iterator[list[Message]]:
    """The messages of each conversation of a batch.

    Column by column: `to_pylist` makes an object of every null of every message, and takes longer
    than the rendering. What only tool calls need is read where there are some.
    """
    flat = column.flatten()
    fields = ["role", "content", "weight"]
    fields += [
        name
        for name in ("tool_calls", "tool_call_id", "name")
        if flat.field(name).null_count < len(flat)
    ]
    values = [flat.field(name).to_pylist() for name in fields]
    rows = [dict(zip(fields, one, strict=True)) for one in zip(*values, strict=True)]
    messages = cast("list[Message]", rows)
    offsets = column.offsets.to_pylist()
    first = offsets[0] if offsets else 0
    for start, end in zip(offsets, offsets[1:], strict=False):
        yield messages[start - first : end - first]


def document_batch(rows: pa.RecordBatch, renderings: Sequence[Rendering]) -> pa.RecordBatch:
    """Renderings as a batch of `documents_schema`, without an object a token."""
    import numpy as np
    import pyarrow as pa

    schema = documents_schema()
    lengths = np.array([len(one.input_ids) for one in renderings], dtype=np.int32)
    n_positions = np.array([2 * len(one.supervised_spans) for one in renderings], dtype=np.int32)
    spans = np.array(
        [place for one in renderings for span in one.supervised_spans for place in span], np.int32
    )
    token_ids = np.concatenate(
        [np.zeros(0, np.int32), *(one.input_ids for one in renderings)], dtype=np.int32
    )
    return pa.RecordBatch.from_arrays(
        [
            rows.column("id"),
            pa.LargeListArray.from_arrays(
                pa.array(offsets(lengths, np.int64)), pa.array(token_ids)
            ),
            pa.ListArray.from_arrays(pa.array(offsets(n_positions, np.int32)), pa.array(spans)),
            pa.array(lengths),
            pa.array([one.n_supervised_tokens for one in renderings], pa.int32()),
            rows.column("n_copies"),
        ],
        schema=schema,
    )


def offsets(lengths: np.ndarray, dtype: type) -> np.ndarray:
    """Where each list of a flat column begins, and the end of the last."""
    import numpy as np

    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


REJECTED_ORIGIN = ("id", "source", "source_file", "source_line")


def rejected_schema() -> pa.Schema:
    """A conversation without tokens: a `reason` to count by, and a `detail` of this one."""
    import pyarrow as pa

    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("source_file", pa.string()),
            ("source_line", pa.int64()),
            ("reason", pa.string()),
            ("detail", pa.string()),
        ]
    )


def rejected_table(batches: Sequence[pa.RecordBatch]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches(batches, schema=rejected_schema()).combine_chunks()


def summary(totals: Mapping[str, Totals], rejected: pa.Table) -> RenderingReport:
    """What the report says: sums, then each split, then why conversations were left out."""
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
