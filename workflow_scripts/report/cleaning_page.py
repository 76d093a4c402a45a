"""The page on a cleaned dataset: what was kept and what was rejected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from workflow_scripts import pages
from workflow_scripts.chats.rejections import RejectedRow
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.report.bars import Bar, first_bars, range_bars

N_SAMPLES = 10  # per reason
SAMPLE_CHARACTERS = 600


def funnel(report: CleaningReport) -> list[Bar]:
    """From all conversations read to the splits: each loss begins where the previous one ended."""
    left = report.n_read
    bars = [Bar("read", left, kind="whole")]
    for reason, n in report.rejected_by_reason.items():
        left -= n
        bars.append(Bar(reason, n, start=left, kind="lost"))
    bars.append(Bar("kept", report.n_kept, kind="kept"))
    bars.append(Bar("of these corrected", report.n_corrected, kind="part"))
    start = 0
    for split, n in report.n_by_split.items():
        bars.append(Bar(split, n, start=start, kind="part"))
        start += n
    return bars


def page(report: CleaningReport, rejected: Path, *, source: str) -> str:
    """The whole page, as HTML.

    Args:
        rejected: Parquet file of the rejected conversations.
        source: path of the report, for display.
    """
    histogram = report.characters_histogram
    return pages.render(
        "cleaning.html.j2",
        report=report,
        source=source,
        funnel=funnel(report),
        corrections=[Bar(correction, n) for correction, n in report.corrections.items()],
        lengths=range_bars(histogram.edges, histogram.counts),
        messages=first_bars(
            [Bar(str(number), n) for number, n in report.n_messages.items()], rest="more"
        ),
        roles=[Bar(role, n) for role, n in report.roles.items()],
        languages=first_bars(
            [Bar(language, n) for language, n in report.languages.items()], rest="others"
        ),
        samples=read_samples(rejected),
        sample_characters=SAMPLE_CHARACTERS,
    )


def read_samples(path: Path) -> dict[str, list[RejectedRow]]:
    """Up to ten rejected conversations per reason, spread evenly over the file."""
    samples: dict[str, list[RejectedRow]] = {}
    with parquet.ParquetFile(path, pre_buffer=False) as table:
        reasons = table.read(columns=["reason"])["reason"].combine_chunks().dictionary_encode()
        codes = reasons.indices.to_numpy()
        chosen = np.zeros(len(codes), dtype=bool)
        for code in range(len(reasons.dictionary)):
            places = np.flatnonzero(codes == code)
            n_samples = min(N_SAMPLES, len(places))
            chosen[places[np.arange(n_samples) * len(places) // n_samples]] = True
        start = 0
        for group in range(table.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            here = np.flatnonzero(chosen[start : start + n_rows])
            start += n_rows
            if len(here):  # the texts of other row groups are never read
                rows = table.read_row_group(group).take(pa.array(here))
                for row in rows.to_pylist():
                    samples.setdefault(row["reason"], []).append(RejectedRow(**row))
    return samples
