"""The weights that an adapter is merged into, read a slab at a time from memory-mapped files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from workflow_scripts.merge import safetensors_stream
from workflow_scripts.merge.tensor_names import QUANTIZATION_BLOCK, Part, Slab, part, slabs
from workflow_scripts.models import checkpoint_files

# Of a layer's experts: their matrices alternate in the files.
SCALES_KEPT = 4


class BaseWeights:
    """A base as published, or as a training in 4 bits had it.

    Attributes:
        headers: shard → name of a tensor → its dtype, shape and offsets.
        parameters: of the model, by the names of PEFT and transformers.
    Args:
        checkpoint: folder of the base model.
        nf4_dtype: the dtype in which training quantized the base, and computed; its linear layers
            are then NF4, dequantized. None is the base as published.
    Raises:
        StageError: a shard is missing or damaged.
    """

    def __init__(self, checkpoint: Path, nf4_dtype: torch.dtype | None = None) -> None:
        self._nf4_dtype = nf4_dtype
        self._files: dict[str, Any] = {}
        self.headers: dict[Path, dict[str, safetensors_stream.Entry]] = {}
        self._names: dict[str, list[str]] = {}
        self._scales: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._scaling = threading.Lock()
        checkpoint_files.check_shards(checkpoint)
        for shard in checkpoint_files.weight_files(checkpoint):
            file = safe_open(shard, framework="pt")
            self.headers[shard] = safetensors_stream.read_header(shard)
            for name in self.headers[shard]:
                self._files[name] = file
                self._names.setdefault(part(name).parameter, []).append(name)
        self.parameters: set[str] = set(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor in the files."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """Type of a tensor in the files, as safetensors names it."""
        return self._files[name].get_slice(name).get_dtype()

    def slabs(self, name: str) -> Iterator[tuple[Slab, torch.Tensor]]:
        """`weight` of every slab of a tensor of the files, in its order."""
        for slab in slabs(name, self.shape(name)):
            yield slab, self.weight(name, slab)

    def weight(self, name: str, slab: Slab) -> torch.Tensor:
        """Rows of a tensor of the files; several threads may ask at once.

        Returns:
            (rows, in), in the file's dtype, or that of training where it is dequantized; not to be
            written to.
        """
        stored = self._stored(name, slab)
        if self._nf4_dtype is None:
            return stored
        # bitsandbytes takes seconds to import.
        from workflow_scripts.merge import nf4

        if not nf4.is_quantized(slab.part):
            return stored
        first = self._n_blocks_before(name, slab)
        n_blocks = -(-stored.numel() // QUANTIZATION_BLOCK)
        scales = self._scales_of(slab.part.parameter)[first : first + n_blocks]
        return nf4.dequantized(stored.to(self._nf4_dtype), scales)

    def _stored(self, name: str, slab: Slab) -> torch.Tensor:
        return self._files[name].get_tensor(name)[slab.place]

    def _scales_of(self, parameter: str) -> torch.Tensor:
        """Of all that lies in one parameter: training quantizes a layer's experts as one tensor."""
        from workflow_scripts.merge import nf4

        with self._scaling:
            if parameter not in self._scales:
                self._scales[parameter] = nf4.scales(
                    self._stored(name, slab).to(self._nf4_dtype)
                    for name in self.tensors_of(parameter)
                    for slab in slabs(name, self.shape(name))
                )
                if len(self._scales) > SCALES_KEPT:
                    self._scales.popitem(last=False)
            return self._scales[parameter]

    def tensors_of(self, parameter: str) -> list[str]:
        """The tensors that make up a parameter: expert by expert, the gate's half first."""

        def place(name: str) -> tuple[int, int]:
            lies: Part = part(name)
            return (lies.expert or 0, lies.half or 0)

        return sorted(self._names[parameter], key=place)

    def _n_blocks_before(self, name: str, slab: Slab) -> int:
        """Before a slab, in the parameter as training has it."""
        names = self.tensors_of(slab.part.parameter)
        n_elements = sum(
            torch.Size(self.shape(before)).numel() for before in names[: names.index(name)]
        )
        shape = self.shape(name)
        n_rows_before = slab.rows.start
        if len(shape) == 3:
            n_rows_before += (slab.part.expert or 0) * shape[1]
        return (n_elements + n_rows_before * shape[-1]) // QUANTIZATION_BLOCK
