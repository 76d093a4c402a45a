"""Origin of a release (`package_release`), and the files of it that are on storage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from workflow_scripts.handover.facts import FileFacts
from workflow_scripts.handover.gates import GgufCheck, GivenMergedCheck, MergedCheck
from workflow_scripts.handover.origin import Origin
from workflow_scripts.handover.plans import GgufContents
from workflow_scripts.handover.record import LEFT_OUT, Record
from workflow_scripts.handover.scores import Scores

# The manifest of a training as it was found.
AnyManifest = dict[str, Any]  # untyped: another version of Tramontane may have written it


class GivenOrigin(Origin):
    """`adapter/source.json`, `merged/source.json`: where an adapter or a merged model that was made
    elsewhere comes from (`fetch_adapter`, `fetch_merged`)."""

    compute_dtype: str | None = LEFT_OUT
    """Dtype in which the adapter's training computed; left out where it is not known."""
    training: AnyManifest | None = LEFT_OUT
    """Manifest of the adapter's training; left out where it has none."""


class Hardware(Record):
    """The machine that a release was packaged on."""

    architecture: str
    cpu: str | None
    """Name of the processor; None where the system does not tell it."""
    n_cpus: int | None
    memory_bytes: int


class Gates(Record):
    """Measurements of the gates of the export."""

    merged_check: GivenMergedCheck | MergedCheck
    gguf_check: GgufCheck


class Provenance(Record):
    """`provenance.json`: settings, hashes, figures, versions, machine and durations of a release.

    It names no folder of the machine it was made on: of an absolute path it holds the name alone.
    """

    run: str
    model: str
    dataset: str
    packing: str | None
    recipe: str | None
    adapter: str | None
    merged: str | None
    revision: str | None
    precision: Literal["native", "int8", "nf4"]
    merge_base: Literal["original", "dequantized", "auto"]
    context_tokens: int
    """Context that the GGUFs are served with."""
    # Tables of the config, which change from version to version.
    config: dict[str, Any]
    """The entries that the run combines, and `gguf` and `evaluation`."""
    base: Origin
    base_files: dict[str, FileFacts]
    dataset_files: dict[str, FileFacts]
    """The cleaned splits."""
    given: GivenOrigin | None = LEFT_OUT
    """What the run began with; left out where it was trained here."""
    training: AnyManifest | None
    """Manifest of the training; None where it is not known."""
    gguf_contents: dict[str, GgufContents]
    """GGUF → what it holds."""
    gates: Gates
    scores: dict[str, Scores]
    """Link → its scores on the test split."""
    packages: dict[str, str]
    """Package → version, of those that decide a release's numbers."""
    python: str
    git_revision: str | None
    """Commit of the workflow, `-dirty` where tracked files differ from it; None outside of git."""
    hardware: Hardware
    duration_seconds: dict[str, float]
    """Step → wall time."""


class ReleasedRun(Record):
    """`provenance.json`: the keys that later programs read.

    Another version of the workflow may have written the file: it may have other keys, or lack some.
    """

    model_config = ConfigDict(extra="ignore")

    run: str
    model: str | None = LEFT_OUT
    dataset: str | None = LEFT_OUT
    packing: str | None = LEFT_OUT
    recipe: str | None = LEFT_OUT
    # Tables of the config, which change from version to version.
    config: dict[str, dict[str, Any]] = {}
    """The entries that the run combines."""


class StoredRelease(Record):
    """`stored.json`: the files of a release that were sent to storage."""

    url: str
    """Folder on storage."""
    files: dict[str, str]
    """Name → SHA-256 of what was sent."""
