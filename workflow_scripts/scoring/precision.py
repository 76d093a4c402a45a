"""The precision in which a link of the chain is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from workflow_scripts.models.checkpoint import (
    Precision,
    default_device,
    is_packed,
    native_precision,
)


def measured_precision(
    name: Literal["native", "int8", "nf4"], checkpoint: Path | None = None
) -> Precision:
    """The precision of a link's weights and arithmetic on this machine.

    Args:
        name: `precision` of the recipe.
        checkpoint: folder of the model, if it may be packed (quantize_awq).
    """
    if name != "native":
        return name
    if checkpoint is not None and is_packed(checkpoint):
        # Imports torch, and the programs import this module for their help text.
        from workflow_scripts.models import awq_weights

        return awq_weights.precision(default_device())
    return native_precision(default_device())
