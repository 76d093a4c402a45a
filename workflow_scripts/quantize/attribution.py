"""Where a model comes from, in the words of those who read it: of the config, for the GGUF's
metadata and for the model card's front matter."""

from __future__ import annotations

from typing import Any, TypedDict

from workflow_scripts import __version__
from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.settings import HUB_ID, DatasetSettings, ModelSettings, RunSettings

HUB = "https://huggingface.co"


class Published(TypedDict, total=False):
    """What a release says of where it comes from. A key is left out where its value is not known,
    or has a name on this machine alone."""

    base_model: str
    """Hub id."""
    base_model_relation: str
    """The Hub's term: `finetune`; `quantized` where another fine-tuned the model."""
    license: str
    datasets: list[str]
    """Hub ids."""
    languages: list[str]
    """ISO 639-1 codes."""
    quantized_by: str


def published(
    run: RunSettings, model: ModelSettings, dataset: DatasetSettings, quantized_by: str | None
) -> Published:
    """What a stranger may be told."""
    whole = run.merged if run.merged and HUB_ID.fullmatch(run.merged) else None
    source, license_name = model.source, model.license
    if model.transplant:
        source = smollm2_wheel.ORIGIN.base_model
        license_name = license_name or smollm2_wheel.ORIGIN.license
    base = whole or (source if source and HUB_ID.fullmatch(source) else None)
    found: Published = {}
    if base:
        found["base_model"] = base
        found["base_model_relation"] = "quantized" if whole else "finetune"
    if license_name:
        found["license"] = license_name
    if hubs := sorted({source.hub for source in dataset.all_sources.values() if source.hub}):
        found["datasets"] = hubs
    if languages := dataset.cleaning.languages:
        found["languages"] = languages
    if quantized_by:
        found["quantized_by"] = quantized_by
    return found


def gguf_metadata(
    published: Published,
) -> dict[str, Any]:  # untyped: metadata of llama.cpp's
    """The same as llama.cpp's converter takes it (`--metadata`), but for the licence.

    Source: gguf-py/gguf/metadata.py, `Metadata.load`.
    """
    described: dict[str, Any] = {"general.description": f"Made with Tramontane {__version__}"}
    if "languages" in published:
        described["general.languages"] = published["languages"]
    if "quantized_by" in published:
        described["general.quantized_by"] = published["quantized_by"]
    if "base_model" in published:
        described["general.base_models"] = [_hub_entry(published["base_model"])]
    if "datasets" in published:
        described["general.datasets"] = [
            _hub_entry(name, kind="datasets/") for name in published["datasets"]
        ]
    return described


def _hub_entry(hub_id: str, *, kind: str = "") -> dict[str, str]:
    organization, _, name = hub_id.partition("/")
    return {
        "name": name,
        "organization": organization,
        "repo_url": f"{HUB}/{kind}{hub_id}",
    }
