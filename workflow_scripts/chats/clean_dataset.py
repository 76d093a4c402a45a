"""Read chats, keep the usable ones, reject the rest with a reason, and split by a stable hash.

Writes one table a split, `rejected.parquet` (source, file, line, reason, detail, the row as read)
and a report with counts. Duplicates and training rows that overlap with held-out text go too. The
dataset is never held in memory: it passes by in chunks, and waits in scratch files for what only
the whole can tell. The files are the same, byte for byte, whatever the number of processes.

python -m workflow_scripts.chats.clean_dataset --source chats data/chats.jsonl --settings '{}'
    --clean clean/
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workflow_scripts import files, log
from workflow_scripts.chats import cleaning, conversations, languages, sources
from workflow_scripts.chats.cleaning import CleanedChunk, Cleaner, Shard, Task
from workflow_scripts.chats.cleaning_report import CleaningCounts
from workflow_scripts.chats.messages import SPLITS
from workflow_scripts.chats.rejections import check_rejected
from workflow_scripts.chats.selection import (
    EXACT_DUPLICATE,
    KEPT,
    NEAR_DUPLICATE,
    REASONS,
    Selection,
)
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.parallel import map_in_order
from workflow_scripts.settings import CleanDatasetSettings, ReadingSettings, settings_from_json

if TYPE_CHECKING:
    import pyarrow as pa

OUTPUT_VERSION = 3
# A dataset of many copies is clean once they are gone, and a weight is the user's own wish.
NOT_DAMAGE = (REASONS[EXACT_DUPLICATE], REASONS[NEAR_DUPLICATE], cleaning.LEFT_OUT)
logger = log.stage_logger("clean_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--source",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FILE"),
        help="name of a source and its files; once for each source",
    )
    parser.add_argument(
        "--fetched",
        nargs=2,
        action="append",
        default=[],
        metavar=("URL", "FILE"),
        help="where a file of a source that is a URL lies here; once for each",
    )
    parser.add_argument(
        "--evaluation-files", nargs="*", default=[], help="what training must not hold"
    )
    parser.add_argument("--settings", required=True, help="JSON: `cleaning`, and `sources` by name")
    parser.add_argument("--processes", type=int, default=1, help="that share the work")
    parser.add_argument("--clean", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(CleanDatasetSettings, arguments.settings)
    logger.info("started %s settings=%s", log.versions("ftfy", "rensa"), arguments.settings)

    check_languages(settings.cleaning.languages)
    scratch = arguments.clean / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir(parents=True)
    try:
        clean(arguments, settings, scratch)
    finally:
        shutil.rmtree(scratch)


def clean(arguments: argparse.Namespace, settings: CleanDatasetSettings, scratch: Path) -> None:
    """The stage, its scratch folder given."""
    cleaning_settings = settings.cleaning
    cleaned = map_in_order(
        _clean_chunk,
        tasks(arguments.source, dict(arguments.fetched), scratch),
        n_processes=arguments.processes,
        initializer=_start_cleaner,
        initial_arguments=(settings,),
    )
    cleaned = log.progress(
        cleaned,
        logger,
        total=total_bytes(
            [
                dict(arguments.fetched).get(path, path)
                for _, *paths in arguments.source
                for path in paths
            ]
        ),
        unit="bytes",
        size=lambda chunk: chunk.n_bytes,
    )
    chunks = list(cleaned)
    if not chunks:
        raise log.StageError(
            "the dataset holds no record",
            where=", ".join(path for _, *paths in arguments.source for path in paths),
            to_fix="put chats into these files; data/README.md tells their shape",
        )
    selection = Selection(chunks)
    logger.info("read n_kept=%d; looking for duplicates", len(selection.reasons))
    selection.drop_exact_duplicates()
    if cleaning_settings.near_duplicates is not None:
        selection.drop_near_duplicates(cleaning_settings.near_duplicates)
    if cleaning_settings.decontamination is not None:
        selection.drop_contaminated(
            cleaning_settings.decontamination,
            evaluation_texts=evaluation_texts(arguments.evaluation_files),
            scratch=scratch,
            n_processes=arguments.processes,
        )
    n_dropped = np.bincount(selection.reasons, minlength=len(REASONS) + 1).tolist()
    logger.info("dropped %s", {reason: n_dropped[code] for code, reason in REASONS.items()})
    weights = {
        name: settings.sources.get(name, ReadingSettings()).weight for name, *_ in arguments.source
    }
    counts = write_tables(arguments.clean, chunks, selection, weights)
    report = counts.report(
        {
            "validation": cleaning_settings.validation_fraction,
            "test": cleaning_settings.test_fraction,
        }
    )
    check(
        report, arguments.clean / "rejected.parquet", limit=cleaning_settings.max_rejected_fraction
    )
    report.write(arguments.clean / "cleaning_report.json")
    logger.info("cleaned %s", log.fields(report.content()))


def tasks(
    source_arguments: Sequence[Sequence[str]], fetched: dict[str, str], scratch: Path
) -> Iterator[Task]:
    """The chunks of all files, numbered in the order they are read.

    Args:
        fetched: of files that are URLs, the path here; their records keep the URL.
    """
    numbers = itertools.count()
    for name, *paths in source_arguments:
        for path in paths:
            for chunk in sources.read_chunks(fetched.get(path, path), name=path):
                yield Task(name, chunk, Shard(scratch, next(numbers)))


def check_languages(wanted: Sequence[str] | None) -> None:
    """A code that no text is ever identified as would reject every conversation.

    Raises:
        StageError: one of them is such.
    """
    unknown = sorted(set(wanted) - languages.known()) if wanted else []
    if unknown:
        raise log.StageError(
            "a language is unknown",
            where="datasets.<name>.cleaning.languages",
            found=", ".join(unknown),
            expected=f"ISO 639-1 codes: {' '.join(sorted(languages.known()))}",
        )


def total_bytes(paths: Sequence[str]) -> int | None:
    """Bytes to read, for the progress; None where compression hides how many they become."""
    formats = [sources.file_format(path) for path in paths]
    if any(compression or suffix == ".parquet" for suffix, compression in formats):
        return None
    return sum(Path(path).stat().st_size for path in paths)


_cleaner: Cleaner


def _start_cleaner(settings: CleanDatasetSettings) -> None:
    global _cleaner
    _cleaner = Cleaner(settings)


def _clean_chunk(task: Task) -> CleanedChunk:
    return _cleaner.clean(task)


def evaluation_texts(paths: Sequence[str]) -> Iterator[str]:
    """All the strings of each record of the evaluation files, whatever its shape."""
    for path in paths:
        for chunk in sources.read_chunks(path):
            for record in sources.records(chunk):
                yield record.raw if record.rejection else "\n".join(_strings(record.content))


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from itertools.chain.from_iterable(map(_strings, value.values()))
        case list():
            yield from itertools.chain.from_iterable(map(_strings, value))


def write_tables(
    folder: Path, chunks: Sequence[CleanedChunk], selection: Selection, weights: dict[str, float]
) -> CleaningCounts:
    """The splits and what was rejected, in the order they were read; returns their counts.

    A chunk at a time: memory holds no more of the dataset than one group of rows a file.
    """
    import pyarrow as pa

    schema = conversations.clean_schema()
    is_kept = selection.reasons == KEPT
    counts = CleaningCounts(weights, n_kept=int(is_kept.sum()))
    with contextlib.ExitStack() as open_files:

        def opened(name: str, schema: pa.Schema) -> Callable[[pa.Table], None]:
            return open_files.enter_context(
                files.parquet_stream(folder / f"{name}.parquet", schema)
            )

        write_split = {split: opened(split, schema) for split in SPLITS}
        write_rejected = opened("rejected", conversations.rejected_schema())
        for chunk, start in zip(chunks, selection.starts, strict=False):
            kept = files.read_arrow(chunk.shard.kept)
            here = slice(start, start + len(kept))
            for at, split in enumerate(SPLITS):
                mask = is_kept[here] & (selection.splits[here] == at)
                rows = kept.filter(pa.array(mask)).select(schema.names)
                write_split[split](rows)
                counts.count_kept(split, rows)
            rejected = rejected_of(chunk, kept, selection, start)
            write_rejected(rejected)
            counts.count_rejected(rejected)
            counts.count_chunk(
                chunk.source,
                n_read=chunk.n_read,
                n_characters=chunk.n_characters[is_kept[here]],
                personal_data=chunk.personal_data,
            )
    return counts


def rejected_of(chunk: CleanedChunk, kept: pa.Table, selection: Selection, start: int) -> pa.Table:
    """What of a chunk was rejected by itself, or dropped with a view of the whole, in its order.

    Args:
        start: index in the selection of the chunk's first kept conversation.
    """
    import pyarrow as pa

    rejected = files.read_arrow(chunk.shard.rejected)
    dropped = np.flatnonzero(selection.reasons[start : start + len(kept)])
    if len(dropped):
        rows = kept.select(["source", "source_file", "source_line", "position"]).take(dropped)
        reasons = [REASONS[int(selection.reasons[start + row])] for row in dropped]
        details = [selection.detail(start + row) for row in dropped]
        columns = {
            **{name: rows[name] for name in rows.column_names},
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.array(details, pa.string()),
            "raw": files.read_arrow(chunk.shard.raw)["raw"].take(dropped),
        }
        rows = pa.table({name: columns[name] for name in rejected.column_names})
        rejected = pa.concat_tables([rejected, rows]).sort_by("position")
    return rejected.drop_columns("position")


def check(report: CleaningReport, rejected: Path, *, limit: float) -> None:
    """Stop where more was rejected than the config accepts, or nothing is left to train on.

    Raises:
        StageError: with the first of the rejected, or the counts.
    """
    reasons = report.rejected_by_reason
    check_rejected(
        first_rejected(rejected),
        logger,
        n_read=report.n_read,
        n_rejected=sum(n for reason, n in reasons.items() if reason not in NOT_DAMAGE),
        limit=limit,
        key="datasets.<name>.cleaning.max_rejected_fraction",
    )
    if not report.n_train:
        by_reason = ", ".join(f"{n} {reason}" for reason, n in reasons.items()) or "none"
        raise log.StageError(
            "no conversation is left for training",
            where=rejected,
            found=f"{report.n_read} read; rejected: {by_reason}",
            to_fix="data/README.md tells what is accepted; see also the shares of the splits",
        )


def first_rejected(path: Path, n_rows: int = 1000) -> list[str]:
    """`file:line: reason: detail` of the first that are damage."""
    import pyarrow.compute as pc

    rows = files.read_parquet(path, columns=["source_file", "source_line", "reason", "detail"])
    damaged = rows.filter(~pc.field("reason").isin(NOT_DAMAGE)).slice(0, n_rows)
    return [
        f"{row['source_file']}:{row['source_line']}: "
        + ": ".join(part for part in (row["reason"], row["detail"]) if part)
        for row in damaged.to_pylist()
    ]


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
