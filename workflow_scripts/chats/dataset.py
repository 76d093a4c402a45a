"""A whole dataset, cleaned: its chunks in parallel, then what depends on all of them."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from workflow_scripts import files, log
from workflow_scripts.chats import chunks, languages, records, sources, tables
from workflow_scripts.chats.cleaning import LEFT_OUT, CleanedChunk, Cleaner, Shard, Task
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
from workflow_scripts.settings import CleanDatasetSettings, ReadingSettings

# Reasons that say nothing bad of a dataset: copies are gone now, and a weight is the user's choice.
NOT_DAMAGE = (REASONS[EXACT_DUPLICATE], REASONS[NEAR_DUPLICATE], LEFT_OUT)
logger = logging.getLogger("clean_dataset")


class SourceFile(NamedTuple):
    """One file of a source."""

    source: str
    name: str
    """The path or URL that its records keep as their `source_file`."""
    path: str
    """The path to read: that of the local copy, if the name is a URL."""


def clean(
    source_files: Sequence[SourceFile],
    settings: CleanDatasetSettings,
    *,
    evaluation_files: Sequence[str],
    n_processes: int,
    folder: Path,
) -> CleaningReport:
    """Clean a dataset, and write its tables and its report into a folder.

    Args:
        evaluation_files: files whose text training must not contain.
    Raises:
        StageError: no record, an unknown language, too many rejections, or nothing to train on.
    """
    languages.check_known(settings.cleaning.languages or ())
    scratch = folder / ".scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a run that was killed
    scratch.mkdir(parents=True)
    try:
        cleaned = _clean_chunks(source_files, settings, scratch, n_processes)
        selection = Selection(cleaned)
        logger.info("read n_kept=%d; looking for duplicates", len(selection.reasons))
        selection.drop_exact_duplicates()
        if settings.cleaning.near_duplicates is not None:
            selection.drop_near_duplicates(settings.cleaning.near_duplicates)
        if settings.cleaning.decontamination is not None:
            selection.drop_contaminated(
                settings.cleaning.decontamination,
                evaluation_texts=evaluation_texts(evaluation_files),
                scratch=scratch,
                n_processes=n_processes,
            )
        n_dropped = np.bincount(selection.reasons, minlength=len(REASONS) + 1).tolist()
        logger.info("dropped %s", {reason: n_dropped[code] for code, reason in REASONS.items()})
        weights = {
            file.source: settings.sources.get(file.source, ReadingSettings()).weight
            for file in source_files
        }
        counts = write_tables(folder, cleaned, selection, weights)
    finally:
        shutil.rmtree(scratch)
    report = counts.report(
        {
            "validation": settings.cleaning.validation_fraction,
            "test": settings.cleaning.test_fraction,
        }
    )
    check(report, folder / "rejected.parquet", limit=settings.cleaning.max_rejected_fraction)
    report.write(folder / "cleaning_report.json")
    return report


def _clean_chunks(
    source_files: Sequence[SourceFile],
    settings: CleanDatasetSettings,
    scratch: Path,
    n_processes: int,
) -> list[CleanedChunk]:
    """Clean the chunks of all files; return their summaries in the order they were read."""
    cleaned = log.progress(
        map_in_order(
            _clean_chunk,
            tasks(source_files, scratch),
            n_processes=n_processes,
            initializer=_start_cleaner,
            initial_arguments=(settings,),
        ),
        logger,
        total=sources.total_bytes([file.path for file in source_files]),
        unit="bytes",
        size=lambda chunk: chunk.n_bytes,
    )
    summaries = list(cleaned)
    if not summaries:
        raise log.StageError(
            "the dataset has no records",
            where=", ".join(file.name for file in source_files),
            to_fix="put chats into these files; data/README.md describes their form",
        )
    return summaries


def tasks(source_files: Sequence[SourceFile], scratch: Path) -> Iterator[Task]:
    """Yield the chunks of all files, numbered in the order they are read."""
    number = 0
    for file in source_files:
        for chunk in chunks.read_chunks(file.path, name=file.name):
            yield Task(file.source, chunk, Shard.of(scratch, number))
            number += 1


_cleaner: Cleaner


def _start_cleaner(settings: CleanDatasetSettings) -> None:
    global _cleaner
    _cleaner = Cleaner(settings)


def _clean_chunk(task: Task) -> CleanedChunk:
    return _cleaner.clean(task)


def evaluation_texts(paths: Sequence[str]) -> Iterator[str]:
    """Yield all the strings of each record of the evaluation files, whatever its shape."""
    for path in paths:
        for chunk in chunks.read_chunks(path):
            for record in records.parse_chunk(chunk):
                yield record.raw if record.rejection else "\n".join(_strings(record.content))


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _strings([*value.values()])
        case list():
            for item in value:
                yield from _strings(item)


def write_tables(
    folder: Path, cleaned: Sequence[CleanedChunk], selection: Selection, weights: dict[str, float]
) -> CleaningCounts:
    """Write the splits and the rejected records in the order they were read; return their counts.

    One chunk is read at a time, so that memory holds one group of rows per output file.
    """
    schema = tables.clean_schema()
    schemas = {**dict.fromkeys(SPLITS, schema), "rejected": tables.rejected_schema()}
    is_kept = selection.reasons == KEPT
    counts = CleaningCounts(weights, n_kept=int(is_kept.sum()))
    with contextlib.ExitStack() as open_files:
        write = {
            name: open_files.enter_context(files.parquet_stream(folder / f"{name}.parquet", schema))
            for name, schema in schemas.items()
        }
        for chunk, start in zip(cleaned, selection.starts, strict=False):
            kept = files.read_arrow(chunk.shard.kept)
            here = slice(start, start + len(kept))
            for at, split in enumerate(SPLITS):
                mask = is_kept[here] & (selection.splits[here] == at)
                rows = kept.filter(pa.array(mask)).select(schema.names)
                write[split](rows)
                counts.count_kept(split, rows)
            rejected = rejected_of(chunk, kept, selection, start)
            write["rejected"](rejected)
            counts.count_chunk(chunk, chunk.n_characters[is_kept[here]], rejected)
    return counts


def rejected_of(chunk: CleanedChunk, kept: pa.Table, selection: Selection, start: int) -> pa.Table:
    """Return the rejected rows of a chunk, in order: by cleaning, or by the selection.

    Args:
        start: index in the selection of the chunk's first kept conversation.
    """
    rejected = files.read_arrow(chunk.shard.rejected)
    dropped = np.flatnonzero(selection.reasons[start : start + len(kept)])
    if len(dropped):
        rows = kept.take(dropped)
        reasons = [REASONS[int(selection.reasons[start + row])] for row in dropped]
        details = [selection.detail(start + row) for row in dropped]
        columns = {
            **dict(zip(rows.column_names, rows.columns, strict=True)),
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.array(details, pa.string()),
            "raw": files.read_arrow(chunk.shard.raw)["raw"].take(dropped),
        }
        rows = pa.table(columns).select(rejected.column_names)
        rejected = pa.concat_tables([rejected, rows]).sort_by("position")
    return rejected.drop_columns("position")


def check(report: CleaningReport, rejected: Path, *, limit: float) -> None:
    """
    Raises:
        StageError: more was rejected than the config accepts, or nothing is left to train on.
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
            to_fix="data/README.md says which records are accepted; check the shares of the splits"
            " too",
        )


def first_rejected(path: Path, n_rows: int = 1000) -> list[str]:
    """Return `file:line: reason: detail` of the first rejected records that count as damage."""
    rows = files.read_parquet(path, columns=["source_file", "source_line", "reason", "detail"])
    damaged = rows.filter(~pc.field("reason").isin(NOT_DAMAGE)).slice(0, n_rows)
    return [
        f"{row['source_file']}:{row['source_line']}: "
        + ": ".join(part for part in (row["reason"], row["detail"]) if part)
        for row in damaged.to_pylist()
    ]
