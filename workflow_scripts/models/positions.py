"""Positions of a model: its config.json with the scaling of RoPE that it was trained with."""

from __future__ import annotations

from typing import Any

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.models.checkpoint import ConfigJson


def stretched_config(
    config: ConfigJson, facts: ModelShape
) -> dict[str, Any]:  # untyped: as `ConfigJson`
    """The base's config.json with the positions it was trained with.

    Args:
        config: of the base.
        facts: of `read_shape`.
    """
    if not facts.rope_scaling:
        return dict(config)
    # transformers 5 keeps all of it in rope_parameters; an older key beside it would win.
    kept = {key: config[key] for key in config if key not in ("rope_theta", "rope_scaling")}
    is_dynamic = facts.rope_parameters["rope_type"] == "dynamic"
    return kept | {
        "rope_parameters": facts.rope_parameters,
        # Dynamic NTK is reckoned from the context of the base, which it has nowhere else.
        "max_position_embeddings": (
            config["max_position_embeddings"] if is_dynamic else facts.context_tokens
        ),
        # A null, as Mixtral has it, stops transformers' YaRN and dynamic NTK.
        "head_dim": facts.head_dim,
    }
