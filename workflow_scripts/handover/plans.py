"""Files that a build will write, predicted before anything large is made (`plan_disk`,
`plan_quantizations`), and what a GGUF holds."""

from __future__ import annotations

from pydantic import ConfigDict, RootModel

from workflow_scripts.handover.record import Record


class DiskPlan(Record):
    """`disk_plan.json`: the large files of all runs, against the room on the disk."""

    needed_bytes: int
    """Size of the files that are not there yet, with a margin."""
    free_bytes: int
    planned_bytes: dict[str, int]
    """Path below `results/` → size; it names files that are there already, too."""


class TensorTypes(Record):
    """The types of a quantization's tensors, against what its name means."""

    fallback_fraction: float
    """Share of the weights whose type differs from the one that they would have if every row fitted
    the blocks of that type."""
    type_fractions: dict[str, float]
    """Type → its share of the weights, the most frequent first."""
    fallbacks: dict[str, int]
    """Number of tensors by change; a key is `type asked → type made`."""


class GgufSize(Record):
    """Weights of a GGUF and the bits that they take."""

    n_weights: int
    bits_per_weight: float


class GgufContents(TensorTypes, GgufSize):
    """Contents of a GGUF, from its own table of tensors. The fields of `GgufSize` come first."""


class QuantizationPlan(Record, RootModel[dict[str, TensorTypes]]):
    """`quantization_plan.json`: name of a quantization → the types that llama.cpp will give it."""

    # Pydantic allows no `extra` where the top level is a mapping of names.
    model_config = ConfigDict(extra=None)
