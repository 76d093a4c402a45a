"""Datasets of the Hugging Face Hub, at one commit, from the Hub or from the cache."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi

from workflow_scripts import files, hub, log
from workflow_scripts.log import StageError

ROWS_PER_GROUP = 4096
COMMIT = re.compile("[0-9a-f]{40}")
logger = logging.getLogger("fetch_dataset")


@dataclass(frozen=True)
class HubDataset:
    """A dataset at one commit."""

    hub_id: str
    revision: str
    commit: str
    is_offline: bool
    """True if only the cache is available."""

    @classmethod
    def locate(cls, hub_id: str, revision: str) -> HubDataset:
        """Return the dataset at the commit that a revision names.

        When offline, and after any failed request, `datasets` takes the latest copy in its
        cache, of any revision (`CachedDatasetModuleFactory`). With one cache per commit it cannot
        take a wrong one.

        Raises:
            StageError: the Hub refuses access; or it does not answer, and the commit is not cached.
        """
        try:
            with _refusals_explained(hub_id, revision):
                published = HfApi().dataset_info(hub_id, revision=revision)
                if published.gated:
                    # Anyone may read about a gated dataset, but not its files.
                    HfApi().auth_check(hub_id, repo_type="dataset")
        except hub.HubUnreachable as error:
            return cls._locate_offline(hub_id, revision, error)
        script = hub_id.rpartition("/")[2] + ".py"
        if script in [file.rfilename for file in published.siblings or ()]:
            raise StageError(
                "the dataset needs a loading script, which `datasets` no longer runs",
                where=f"datasets.<name>.hub, {_page(hub_id)}",
                found=script,
                to_fix="set `revision: refs/convert/parquet`, the branch where the Hub keeps it as"
                " Parquet, then the commit that a warning names; or download files and set `files`",
            )
        assert published.sha is not None  # the Hub always returns it
        if published.sha != revision:
            logger.warning(
                "resolved hub=%s revision=%s commit=%s: set `revision` to the commit, the only name"
                " that cannot move",
                hub_id,
                revision,
                published.sha,
            )
        return cls(hub_id, revision, published.sha, is_offline=False)

    @classmethod
    def _locate_offline(cls, hub_id: str, revision: str, error: hub.HubUnreachable) -> HubDataset:
        if not COMMIT.fullmatch(revision):
            raise StageError(
                "offline, and only the Hub knows which commit a branch or tag names",
                where="datasets.<name>.revision",
                found=revision,
                expected="a commit, 40 hexadecimal digits",
                to_fix="set `revision` to the commit in the manifest of an earlier run",
            ) from error
        cached = cls(hub_id, revision, revision, is_offline=True)
        if not cached.cached_subsets():
            raise StageError(
                "offline, and the dataset is not in the cache at this revision",
                where=f"datasets.<name>.hub, {hub_id}, revision {revision}",
                found=f"nothing in {cached.cache} ({error.__cause__})".splitlines()[0],
                to_fix="fetch it by this command on a machine with a connection and copy its"
                " HF_HOME, or set `files`",
            ) from error
        logger.warning(
            "used the cache, because the Hub does not answer: hub=%s commit=%s path=%s",
            hub_id,
            revision,
            cached.cache,
        )
        # Without this, `datasets` tries a refused connection for 25 s before it reads the cache.
        datasets.config.HF_HUB_OFFLINE = True
        return cached

    @property
    def cache(self) -> Path:
        """Folder that holds only this dataset at this commit."""
        root = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
        return root / "by_commit" / self.hub_id / self.commit

    def cached_subsets(self) -> list[str]:
        """Return the subsets that are complete; `datasets` stores name/subset/version/commit."""
        return sorted({path.parts[-4] for path in self.cache.glob("*/*/*/*/dataset_info.json")})

    def read(self, subset: str | None, split: str) -> tuple[str, datasets.Dataset]:
        """Download what is not cached; return the subset's name and the rows, memory-mapped.

        Raises:
            StageError: no such subset or split, or no file that `datasets` can read.
        """
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        # Its warnings announce "the latest cached version", but the cache holds only one.
        datasets.logging.set_verbosity_error()
        with _refusals_explained(self.hub_id, self.revision), _failures_explained(self.hub_id):
            builder = self._builder(subset)
            # Before the download, because a split is often not called `train`, the default.
            splits = list(map(str, builder.config.data_files or builder.info.splits or ()))
            if split not in splits:
                raise StageError(
                    "the dataset has no such split",
                    where="datasets.<name>.split",
                    found=split,
                    expected=f"one of {', '.join(splits)}",
                )
            builder.download_and_prepare()
            return builder.config.name, builder.as_dataset(split=split)

    def _builder(self, subset: str | None) -> datasets.DatasetBuilder:
        try:
            return datasets.load_dataset_builder(
                self.hub_id, subset, revision=self.commit, cache_dir=str(self.cache)
            )
        except ValueError as error:
            known = self.cached_subsets()
            if not self.is_offline:
                known = datasets.get_dataset_config_names(self.hub_id, revision=self.commit)
            if subset in known:
                raise
            raise StageError(
                f"the {'cache' if self.is_offline else 'dataset'} has no such subset",
                where="datasets.<name>.subset",
                found=subset or "null, and there are several",
                expected=f"one of {', '.join(known)}",
            ) from error


def write_rows(path: Path, dataset: datasets.Dataset) -> None:
    """Write Parquet whose bytes depend only on the rows; columns that hold JSON become text.

    `datasets` stores values of one field as JSON if their types differ, each by itself: a list of
    messages becomes a list of texts. Readers of chats expect one text for the whole column value.
    """
    # Without the metadata, in which `datasets` repeats the schema.
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
    return isinstance(kind, pa.JsonType) or any(
        _holds_json(kind.field(at).type) for at in range(kind.num_fields)
    )


def _json_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _page(hub_id: str) -> str:
    return f"https://huggingface.co/datasets/{hub_id}"


def _refusals_explained(hub_id: str, revision: str) -> AbstractContextManager[None]:
    return hub.refusals_explained(
        "dataset",
        hub_id,
        page=_page(hub_id),
        key="datasets.<name>.hub",
        revision=revision,
        otherwise="download the dataset's files elsewhere and set `files`",
    )


@contextmanager
def _failures_explained(hub_id: str) -> Iterator[None]:
    """
    Raises:
        StageError: `datasets` cannot read the files.
    """
    try:
        yield
    except (DatasetsError, EmptyDatasetError) as error:
        raise StageError(
            "`datasets` cannot make a table of the dataset's files",
            where=f"datasets.<name>.hub, {_page(hub_id)}",
            found=str(error.__cause__ or error).strip().splitlines()[0],
            to_fix="download its files and set `files`; they are then read record by record",
        ) from error
