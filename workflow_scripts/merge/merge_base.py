"""The weights that the adapter of a 4-bit training is merged into: as published, or as training saw
them.

Neither is always better: the published weights lack the quantization error that the adapter learned
to correct, and the dequantized ones keep that error. `choose_merge_base` measures both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

from workflow_scripts import files
from workflow_scripts.handover.gates import MergeBase, MergeBaseChoice
from workflow_scripts.handover.provenance import GivenOrigin
from workflow_scripts.handover.training import TrainingManifest
from workflow_scripts.log import StageError

if TYPE_CHECKING:
    import torch

BASES: tuple[MergeBase, ...] = get_args(MergeBase)
HELP = "original, dequantized, or the JSON of choose_merge_base"


def chosen(argument: str) -> MergeBase:
    """The base that `--merge-base` names.

    Raises:
        StageError: the argument is neither a base nor a choice.
    """
    for base in BASES:
        if argument == base:
            return base
    try:
        return MergeBaseChoice.read(Path(argument)).merge_base
    except StageError as error:
        raise StageError(
            "there is no such base to merge into",
            where=f"--merge-base {argument}",
            found=" ".join(str(error).split()),
            expected=" or ".join(BASES),
        ) from error


def nf4_dtype(base: str, adapter: Path, checkpoint: Path) -> torch.dtype | None:
    """The dtype in which training quantized the base and computed; None for the original base.

    Args:
        adapter: its training manifest names the dtype; for an adapter trained elsewhere,
            source.json may. With neither, it is assumed that training used a GPU and the base's own
            dtype.
        checkpoint: folder of the base model.
    """
    if base == "original":
        return None
    # The programs import this module for their help text.
    import torch

    config = files.read_json(checkpoint / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    source, manifest = adapter / "source.json", adapter / "training_manifest.json"
    if source.is_file():
        dtype = GivenOrigin.read(source).compute_dtype or dtype
    if manifest.is_file():
        dtype = TrainingManifest.read(manifest).compute_dtype
    return getattr(torch, dtype)
