"""Origin of a model: from the config, for the GGUF's metadata and the model card's front matter."""

from __future__ import annotations

from typing import Any, TypedDict, cast

from workflow_scripts import __version__
from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.settings import HUB_ID, DatasetSettings, ModelSettings, RunSettings

HUB = "https://huggingface.co"


class Published(TypedDict, total=False):
    """Origin of a model as a release states it. A key is left out if its value is unknown, or is a
    name that only this machine knows."""

    base_model: str
    """Hub id."""
    base_model_relation: str
    """The Hub's term: `finetune`; `quantized` if someone else fine-tuned the model."""
    license: str
    datasets: list[str]
    """Hub ids."""
    languages: list[str]
    """ISO 639-1 codes."""
    quantized_by: str


def published(
    run: RunSettings, model: ModelSettings, dataset: DatasetSettings, quantized_by: str | None
) -> Published:
    """Return the origin without anything that names files of this machine."""
    whole = run.merged if run.merged and HUB_ID.fullmatch(run.merged) else None
    source, license_name = model.source, model.license
    if model.transplant:
        source = smollm2_wheel.ORIGIN.base_model
        license_name = license_name or smollm2_wheel.ORIGIN.license
    base = whole or (source if source and HUB_ID.fullmatch(source) else None)
    hubs = {source.hub for source in dataset.all_sources.values() if source.hub}
    found = {
        "base_model": base,
        "base_model_relation": base and ("quantized" if whole else "finetune"),
        "license": license_name,
        "datasets": sorted(hubs),
        "languages": dataset.cleaning.languages,
        "quantized_by": quantized_by,
    }
    return cast(Published, {key: value for key, value in found.items() if value})


def gguf_metadata(
    published: Published,
) -> dict[str, Any]:  # untyped: llama.cpp's metadata
    """Return the origin as `--metadata` of llama.cpp's converter, without the licence.

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
