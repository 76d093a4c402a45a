"""safetensors files written one slab of a tensor at a time: a slab is in memory, not a shard.

Format: 8 bytes little-endian header length, a JSON header of name → dtype, shape, offsets, the
data.
Source: https://huggingface.co/docs/safetensors (format specification).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from workflow_scripts import files, parallel

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SYNCED_BYTES = 2**26
# For larger writes the kernel needs neighbouring pages, and at times searches long for them (Linux
# 6.18, ext4: 0.3 s of processor time per GB up to this size, up to 2.4 s at 1 MiB).
WRITE_BYTES = 2**18
WRITES_WAITING = 8


# Name of a tensor → its shape and dtype, in the order of the data.
Shapes = Mapping[str, tuple[list[int], torch.dtype]]


def write(
    path: Path,
    shapes: Shapes,
    slabs: Callable[[str], Iterable[torch.Tensor]],
) -> int:
    """Write a file whose tensors are computed one after the other; it is synced to disk before it
    gets its name.

    Args:
        path: to write.
        shapes: of the tensors to write.
        slabs: called with a tensor's name; yields the tensor, of that shape and dtype, in runs of
            whole rows. These must not change afterwards: they are written while the next ones are
            computed.
    Returns:
        Bytes of tensor data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shapes.items():
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": shape,
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def contents() -> Iterator[bytes | memoryview]:
        yield len(encoded).to_bytes(8, "little") + encoded
        for name, (shape, dtype) in shapes.items():
            n_written = 0
            for rows in slabs(name):
                assert list(rows.shape[-1:]) == list(shape[-1:]) and rows.dtype == dtype, name
                yield rows.contiguous().reshape(-1).view(torch.uint8).numpy().data
                n_written += rows.numel()
            assert n_written == torch.Size(shape).numel(), name

    with files.atomic_file(path) as temporary, temporary.open("wb", buffering=0) as stream:
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as syncing:
            file = _SyncedFile(stream, syncing)
            for _ in parallel.ahead(writing, file.write, contents(), n_ahead=WRITES_WAITING):
                pass
        os.fsync(stream.fileno())
    return offset


class _SyncedFile:
    """A file that is synced to disk while it is written: the kernel would wait until gigabytes have
    accumulated, and the last sync would take as long as all of the work.

    Args:
        syncing: a pool of one thread.
    """

    def __init__(self, stream: FileIO, syncing: ThreadPoolExecutor) -> None:
        self._stream, self._syncing = stream, syncing
        self._sync: Future[None] | None = None
        self._n_unsynced_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        self._n_unsynced_bytes += len(content)
        while len(content):  # the kernel may take only a part, when the disk is nearly full
            content = content[self._stream.write(content[:WRITE_BYTES]) :]
        if self._n_unsynced_bytes >= SYNCED_BYTES and (self._sync is None or self._sync.done()):
            self._sync = self._syncing.submit(os.fdatasync, self._stream.fileno())
            self._n_unsynced_bytes = 0
