"""The weights that an adapter is merged into, read a slab at a time."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import torch

from workflow_scripts.merge.stored_tensors import StoredTensors
from workflow_scripts.merge.tensor_names import (
    QUANTIZATION_BLOCK,
    Slab,
    is_quantized_in_training,
    slabs,
)

# The matrices of one layer's experts alternate in the files.
SCALES_KEPT = 4


class BaseWeights(StoredTensors):
    """A base model as published, or as 4-bit training saw it.

    Args:
        checkpoint: folder of the base model.
        nf4_dtype: the dtype in which training quantized the base and computed; the linear layers
            are then quantized to NF4 and dequantized. None is the base as published.
    Raises:
        StageError: a shard is missing or damaged.
    """

    def __init__(self, checkpoint: Path, nf4_dtype: torch.dtype | None = None) -> None:
        super().__init__(checkpoint)
        self._nf4_dtype = nf4_dtype
        self._scaling = threading.Lock()
        self._scales = lru_cache(SCALES_KEPT)(self._computed_scales)

    def weight(self, name: str, slab: Slab) -> torch.Tensor:
        """Rows of a tensor. Thread-safe.

        Returns:
            (rows, in), in the file's dtype, or in that of training where they are dequantized; not
            to be written to.
        """
        stored = self.rows(name, slab)
        if self._nf4_dtype is None or not is_quantized_in_training(slab.part):
            return stored
        # bitsandbytes takes two seconds to import, and a merge into the base as published does not
        # need it.
        from workflow_scripts.merge import nf4

        first = self._n_blocks_before(name, slab)
        n_blocks = -(-stored.numel() // QUANTIZATION_BLOCK)
        with self._scaling:
            scales = self._scales(slab.part.parameter)[first : first + n_blocks]
        return nf4.dequantized(stored.to(self._nf4_dtype), scales)

    def _computed_scales(self, parameter: str) -> torch.Tensor:
        """Scales of a whole parameter: training quantizes the experts of a layer as one tensor."""
        from workflow_scripts.merge import nf4

        return nf4.scales(
            self.rows(name, slab).to(self._nf4_dtype)
            for name in self.parameters[parameter]
            for slab in slabs(name, self.shape(name))
        )

    def _n_blocks_before(self, name: str, slab: Slab) -> int:
        """Quantization blocks of the parameter that come before a slab."""
        shape = self.shape(name)
        n_rows_before = slab.rows.start
        if len(shape) == 3:
            n_rows_before += (slab.part.expert or 0) * shape[1]
        return (self.n_elements_before(name) + n_rows_before * shape[-1]) // QUANTIZATION_BLOCK
