"""The tensors of a checkpoint folder, read a slab at a time from memory-mapped files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from workflow_scripts.merge.tensor_names import Slab, part
from workflow_scripts.models import tensors
from workflow_scripts.models.checkpoint_files import weight_files


class StoredTensors:
    """The tensors of a checkpoint folder.

    Attributes:
        entries: tensor → its entry in a header; shard by shard, in the order of the data.
        parameters: parameter of the model → the tensors that hold it: expert by expert, the gate's
            half first.
    Raises:
        StageError: a shard is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        stored = tensors.stored(weight_files(folder))
        shards = {each.path for each in stored.values()}
        opened = {shard: safe_open(shard, framework="pt") for shard in shards}
        self.entries = dict(
            sorted(stored.items(), key=lambda item: (item[1].path, item[1].first_byte))
        )
        self._open = {name: opened[entry.path] for name, entry in self.entries.items()}
        self.parameters: dict[str, list[str]] = {}
        for name in sorted(stored, key=lambda name: (part(name).expert or 0, part(name).half or 0)):
            self.parameters.setdefault(part(name).parameter, []).append(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entries[name].shape

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in the file's dtype; not to be written to."""
        return self._open[name].get_tensor(name)

    def rows(self, name: str, slab: Slab) -> torch.Tensor:
        """Rows of a tensor in the file's dtype; not to be written to. Thread-safe."""
        return self.whole(name)[slab.place]

    def n_elements_before(self, name: str) -> int:
        """Elements of a tensor's parameter that other tensors hold, and that come before it."""
        names = self.parameters[part(name).parameter]
        return sum(math.prod(self.shape(before)) for before in names[: names.index(name)])
