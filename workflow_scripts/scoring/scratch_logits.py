"""Logits on disk for as long as it takes to compare them with another model's.

float32, as they were computed: half the room would cost more than a good quantization does. Where a
logit is 20, float16 is off by up to 0.008, about 1e-5 nats of KL divergence; Q8_0 costs as little.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BYTES_PER_LOGIT = 4


class ScratchLogits:
    """Blocks of logits, read in the order they were written. A context manager.

    The file has no name: it is gone when the process ends, however it ends.

    Args:
        folder: on the disk that is to hold it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._shapes: list[torch.Size] = []

    def __enter__(self) -> ScratchLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, block: Tensor) -> None:
        """
        Args:
            block: (n, vocabulary) float32.
        """
        self._file.write(np.ascontiguousarray(block.numpy()).data)
        self._shapes.append(block.shape)

    def read(self) -> Iterator[Tensor]:
        """The blocks from the first; each is valid until the next one is asked for."""
        import torch

        self._file.seek(0)
        room = np.empty(max(map(math.prod, self._shapes), default=0), np.float32)
        for shape in self._shapes:
            block = room[: math.prod(shape)]
            n_read = self._file.readinto(block.data.cast("B"))
            assert n_read == block.nbytes, (n_read, block.nbytes)
            yield torch.from_numpy(block.reshape(shape))
