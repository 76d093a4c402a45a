"""Kernels of a layer's small operations: Liger's in Triton where they run, else PyTorch's.

RMSNorm, RoPE and SwiGLU take a tenth of the time of the matrix products and keep half of the
activations. Liger's versions (arXiv:2410.10989) keep only their inputs. Loss and attention are
Tramontane's own, so nothing else of Liger is used.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from workflow_scripts import log
from workflow_scripts.log import StageError

logger = log.stage_logger("kernels")


def liger_runs(wanted: str) -> bool:
    """True if Liger's kernels are used.

    Args:
        wanted: `training.kernels`: auto, liger or torch.
    Raises:
        StageError: the setting requires them and they cannot run.
    """
    if wanted == "torch":
        return False
    missing = [
        reason
        for reason, holds in (
            ("no CUDA GPU", not torch.cuda.is_available()),
            ("liger-kernel is not installed", importlib.util.find_spec("liger_kernel") is None),
        )
        if holds
    ]
    if missing and wanted == "liger":
        raise StageError(
            "Liger's kernels cannot run",
            where="training.kernels",
            found=", ".join(missing),
            to_fix="pip install liger-kernel, on a machine with a CUDA GPU; or `kernels: auto`",
        )
    return not missing


def use_liger(model: Any) -> None:
    """Put Liger's RMSNorm, RoPE and SwiGLU into a loaded Mistral or Mixtral.

    Args:
        model: transformers' model, before PEFT wraps its layers.
    """
    # An optional package.
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    apply = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
    if apply is None:
        logger.warning("found no Liger kernels for model_type=%s: PyTorch's are used", kind)
        return
    apply(
        rope=True,
        rms_norm=True,
        swiglu=kind == "mistral",  # experts run in transformers' grouped products
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model,
    )
