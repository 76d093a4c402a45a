"""Bring a dataset of the Hugging Face Hub into the workflow: one split at one commit, as Parquet.

What `datasets` prepares lies in its cache (HF_DATASETS_CACHE), in a folder for each commit. Without
a connection, or with HF_HUB_OFFLINE=1, what an earlier run left there is used. Set HF_TOKEN for
gated datasets, HF_HOME and HF_ENDPOINT as usual.

python -m workflow_scripts.chats.fetch_dataset
    --settings '{"hub": "owner/name", "revision": "<commit>", "subset": null, "split": "train"}'
    --rows results/data/d/hub/s/rows.parquet --manifest results/data/d/hub/s/manifest.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts import files, hub, log
from workflow_scripts.handover.origin import HubRows
from workflow_scripts.log import StageError
from workflow_scripts.settings import SourceSettings, settings_from_json

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, DatasetBuilder

OUTPUT_VERSION = 1
ROWS_PER_GROUP = 4096
COMMIT = re.compile("[0-9a-f]{40}")
logger = log.stage_logger("fetch_dataset")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of the source: hub, revision, …")
    parser.add_argument("--rows", type=Path, required=True, help="to write: the split, Parquet")
    parser.add_argument("--manifest", type=Path, required=True, help="to write: what it came from")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(SourceSettings, arguments.settings)
    if settings.hub is None:
        raise StageError("no dataset to fetch", where="--settings, hub", found=settings.hub)

    import datasets

    logger.info("started %s settings=%s", log.versions("datasets"), arguments.settings)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Its warnings tell of "the latest cached version"; which one is used, `locate` decides.
    datasets.logging.set_verbosity_error()
    origin = locate(settings)
    builder = open_builder(settings, origin)
    dataset = prepare(settings, builder)
    write_rows(arguments.rows, dataset)
    manifest = HubRows(
        hub=settings.hub,
        revision=settings.revision,
        commit=origin.commit,
        subset=builder.config.name,
        split=settings.split,
        n_rows=len(dataset),
        columns=tuple(dataset.column_names),
        datasets_version=datasets.__version__,
        sha256=files.sha256(arguments.rows),
    )
    manifest.write(arguments.manifest)
    logger.info("wrote path=%s %s", arguments.rows, log.fields(manifest.content()))


class Origin(NamedTuple):
    """Where a dataset comes from, once the Hub was asked."""

    commit: str
    cache: Path
    """Holds this dataset at this commit and nothing else."""
    is_offline: bool
    """Only what is in the cache can be had."""


def locate(settings: SourceSettings) -> Origin:
    """The commit that the revision names.

    Offline, and after any failed request, `datasets` takes what is latest in its cache, whatever
    its revision (`CachedDatasetModuleFactory`). A cache for each commit leaves it no wrong one.

    Raises:
        StageError: the Hub refuses; or it does not answer and the commit is not in the cache.
    """
    import datasets
    from huggingface_hub import HfApi

    hub_id = _hub_id(settings)
    root = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "by_commit" / hub_id
    try:
        with _refusals_explained(settings):
            published = HfApi().dataset_info(hub_id, revision=settings.revision)
            if published.gated:
                # Anyone may read about a gated dataset; its files are what is refused.
                HfApi().auth_check(hub_id, repo_type="dataset")
    except hub.HubUnreachable as error:
        return _locate_offline(settings, root, error)
    _refuse_script(settings, [file.rfilename for file in published.siblings or ()])
    assert published.sha is not None  # the Hub always says it
    if published.sha != settings.revision:
        logger.warning(
            "resolved hub=%s revision=%s commit=%s: set `revision` to the commit, the only name"
            " that cannot move",
            settings.hub,
            settings.revision,
            published.sha,
        )
    return Origin(published.sha, root / published.sha, is_offline=False)


def _locate_offline(settings: SourceSettings, root: Path, error: hub.HubUnreachable) -> Origin:
    import datasets

    commit = settings.revision
    assert commit is not None  # SourceSettings demands one with `hub`
    if not COMMIT.fullmatch(commit):
        raise StageError(
            "offline, and only the Hub knows which commit a branch or tag names",
            where="datasets.<name>.revision",
            found=commit,
            expected="a commit, 40 hexadecimal digits",
            to_fix="set `revision` to the commit in the manifest of an earlier run",
        ) from error
    origin = Origin(commit, root / commit, is_offline=True)
    if not _cached_subsets(origin.cache):
        raise StageError(
            "offline, and the dataset is not in the cache at this revision",
            where=f"datasets.<name>.hub, {settings.hub}, revision {commit}",
            found=f"nothing in {origin.cache} ({error.__cause__})".splitlines()[0],
            to_fix="fetch it on a machine with a connection by this command and bring its HF_HOME,"
            " or set `files`",
        ) from error
    logger.warning(
        "used the cache, because the Hub does not answer: hub=%s commit=%s path=%s",
        settings.hub,
        commit,
        origin.cache,
    )
    # Ask no more: a connection that is refused is tried for 25 s before the cache is.
    datasets.config.HF_HUB_OFFLINE = True
    return origin


def _cached_subsets(cache: Path) -> list[str]:
    """Subsets prepared to the end; `datasets` files them as name/subset/version/commit."""
    return sorted({path.parts[-4] for path in cache.glob("*/*/*/*/dataset_info.json")})


def _refuse_script(settings: SourceSettings, names: Sequence[str]) -> None:
    script = _hub_id(settings).rpartition("/")[2] + ".py"
    if script in names:
        raise StageError(
            "the dataset is made by a loading script, which `datasets` no longer runs",
            where=f"datasets.<name>.hub, {_page(settings)}",
            found=script,
            to_fix="set `revision: refs/convert/parquet`, the branch where the Hub keeps it as"
            " Parquet, then the commit that a warning names; or download files and set `files`",
        )


def open_builder(settings: SourceSettings, origin: Origin) -> DatasetBuilder:
    """The builder of one subset; no file of rows is downloaded yet.

    Raises:
        StageError: no such subset or split, or no file that `datasets` reads.
    """
    import datasets

    with _refusals_explained(settings), _failures_explained(settings):
        try:
            builder = datasets.load_dataset_builder(
                settings.hub, settings.subset, revision=origin.commit, cache_dir=str(origin.cache)
            )
        except ValueError as error:
            if origin.is_offline:
                known = _cached_subsets(origin.cache)
            else:
                known = datasets.get_dataset_config_names(settings.hub, revision=origin.commit)
            if settings.subset in known:
                raise
            raise StageError(
                f"the {'cache' if origin.is_offline else 'dataset'} has no such subset",
                where="datasets.<name>.subset",
                found=settings.subset or "null, and there are several",
                expected=f"one of {', '.join(known)}",
            ) from error
    # Before the download: `train`, the default, is often not what a split is called.
    splits = list(map(str, builder.config.data_files or builder.info.splits or ()))
    if settings.split not in splits:
        raise StageError(
            "the dataset has no such split",
            where="datasets.<name>.split",
            found=settings.split,
            expected=f"one of {', '.join(splits)}",
        )
    return builder


def prepare(settings: SourceSettings, builder: DatasetBuilder) -> Dataset:
    """The rows of the split, downloaded where they are not cached, mapped into memory."""
    with _refusals_explained(settings), _failures_explained(settings):
        builder.download_and_prepare()
        return builder.as_dataset(split=settings.split)


def write_rows(path: Path, dataset: Dataset) -> None:
    """Parquet whose bytes follow from the rows; columns that hold JSON become its text.

    Where values of one field differ in type, `datasets` stores them as JSON, each in itself: a list
    of messages becomes a list of texts. A whole column of text is what readers of chats expect.
    """
    import pyarrow as pa

    # Without the metadata, in which `datasets` repeats the schema in its own words.
    stored = dataset.features.arrow_schema.remove_metadata()
    json_columns = [field.name for field in stored if _holds_json(field.type)]
    schema = pa.schema(
        field.with_type(pa.large_string()) if field.name in json_columns else field
        for field in stored
    )
    batches = dataset.with_format("arrow").iter(batch_size=ROWS_PER_GROUP)
    with files.parquet_stream(path, schema, rows_per_group=ROWS_PER_GROUP) as write:
        for table in log.progress(batches, logger, total=len(dataset), unit="rows", size=len):
            for name in json_columns:
                values = dataset.features.decode_column(table[name].to_pylist(), name)
                at = table.schema.get_field_index(name)
                texts = pa.array(map(_json_text, values), pa.large_string())
                table = table.set_column(at, schema.field(name), texts)
            write(table.cast(schema).combine_chunks())


def _holds_json(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return isinstance(kind, pa.JsonType) or any(
        _holds_json(kind.field(at).type) for at in range(kind.num_fields)
    )


def _json_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _hub_id(settings: SourceSettings) -> str:
    assert settings.hub is not None  # `main` refuses a source without one
    return settings.hub


def _page(settings: SourceSettings) -> str:
    return f"https://huggingface.co/datasets/{settings.hub}"


def _refusals_explained(settings: SourceSettings) -> AbstractContextManager[None]:
    return hub.refusals_explained(
        "dataset",
        _hub_id(settings),
        page=_page(settings),
        key="datasets.<name>.hub",
        revision=settings.revision,
        otherwise="set `files` to the dataset's files, downloaded elsewhere",
    )


@contextmanager
def _failures_explained(settings: SourceSettings) -> Iterator[None]:
    """Turn what `datasets` cannot read into a message."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, EmptyDatasetError) as error:
        raise StageError(
            "`datasets` cannot make a table of the dataset's files",
            where=f"datasets.<name>.hub, {_page(settings)}",
            found=str(error.__cause__ or error).strip().splitlines()[0],
            to_fix="download its files and set `files`, which are read record by record",
        ) from error


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
