"""Logits on disk until they have been compared with another model's.

They stay in float32, as computed: half the space would cost as much accuracy as a good
quantization. At a logit of 20, float16 is off by up to 0.008, about 1e-5 nats of KL divergence;
Q8_0 costs no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BYTES_PER_LOGIT = 4


class ScratchLogits:
    """Blocks of logits, read in the order in which they were written. A context manager.

    The file has no name, so it disappears with the process, even if that is killed.

    Args:
        folder: on the disk that holds the file.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)
        self._n_blocks = 0

    def __enter__(self) -> ScratchLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, block: Tensor) -> None:
        """
        Args:
            block: (n, vocabulary) float32.
        """
        np.save(self._file, block.numpy())
        self._n_blocks += 1

    def read(self) -> Iterator[Tensor]:
        """Read the blocks from the first."""
        self._file.seek(0)
        for _ in range(self._n_blocks):
            yield torch.from_numpy(np.load(self._file))
