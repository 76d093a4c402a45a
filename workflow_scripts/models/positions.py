"""Positions of a model: its config.json with the RoPE scaling that it was trained with."""

from __future__ import annotations

from typing import Any

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.models.checkpoint_files import ConfigJson


def stretched_config(
    config: ConfigJson, facts: ModelShape
) -> dict[str, Any]:  # untyped: as `ConfigJson`
    """Return the base model's config.json with the positions used in training.

    Args:
        config: content of the base model's config.json.
        facts: shape of the base model, with the scaling applied.
    """
    if not facts.rope_scaling:
        return dict(config)
    # transformers 5 uses rope_parameters only; an older key next to it would win.
    kept = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling")}
    is_dynamic = facts.rope_parameters["rope_type"] == "dynamic"
    return kept | {
        "rope_parameters": facts.rope_parameters,
        # Dynamic NTK scales from the base model's context, which is stored only here.
        "max_position_embeddings": (
            config["max_position_embeddings"] if is_dynamic else facts.context_tokens
        ),
        # transformers' YaRN and dynamic NTK fail on null, which Mixtral's file has.
        "head_dim": facts.head_dim,
    }
