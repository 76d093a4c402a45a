"""Where a model comes from, in the words of those who read it: of the config, for the GGUF's
metadata and for the model card's front matter."""

from __future__ import annotations

from typing import Any

from workflow_scripts import __version__
from workflow_scripts.models import smollm2_wheel
from workflow_scripts.settings import HUB_ID, DatasetSettings, ModelSettings, RunSettings

HUB = "https://huggingface.co"


def published(
    run: RunSettings, model: ModelSettings, dataset: DatasetSettings, quantized_by: str | None
) -> dict[str, Any]:
    """What a stranger may be told; what is not known, or has no name but on this machine, is left
    out.

    Returns:
        JSON: base_model, base_model_relation, license, datasets, languages, quantized_by.
    """
    whole = run.merged if run.merged and HUB_ID.fullmatch(run.merged) else None
    source, license_name = model.source, model.license
    if model.transplant:
        source = smollm2_wheel.ORIGIN["base_model"]
        license_name = license_name or smollm2_wheel.ORIGIN["license"]
    base = whole or (source if source and HUB_ID.fullmatch(source) else None)
    known = {
        "base_model": base,
        # The Hub's terms: what was fine-tuned elsewhere is but quantized here.
        "base_model_relation": base and ("quantized" if whole else "finetune"),
        "license": license_name,
        "datasets": sorted({source.hub for source in dataset.all_sources.values() if source.hub}),
        "languages": dataset.cleaning.languages,
        "quantized_by": quantized_by,
    }
    return {key: value for key, value in known.items() if value}


def gguf_metadata(published: dict[str, Any]) -> dict[str, Any]:
    """The same as llama.cpp's converter takes it (`--metadata`), but for the licence.

    Source: gguf-py/gguf/metadata.py, `Metadata.load`.
    """
    described: dict[str, Any] = {"general.description": f"Made with Tramontane {__version__}"}
    for key in ("languages", "quantized_by"):
        if key in published:
            described[f"general.{key}"] = published[key]
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
