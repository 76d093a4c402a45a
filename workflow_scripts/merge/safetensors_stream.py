"""safetensors files written a slab of a tensor at a time: memory is a slab, not a shard.

Format: 8 bytes little-endian header length, a JSON header of name → dtype, shape, offsets, the
data.
Source: https://huggingface.co/docs/safetensors (format specification).
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any, TypedDict

import torch

from workflow_scripts import files

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
# For more at once the kernel wants neighbouring pages, and at times seeks them for long (Linux
# 6.18, ext4: 0.3 s of processor time a GB up to here, up to 2.4 s at 1 MiB).
WRITE_BYTES = 2**18
WRITES_WAITING = 8


# Name of a tensor → its shape and dtype, in the order of the data.
Shapes = Mapping[str, tuple[list[int], torch.dtype]]


class Entry(TypedDict):
    """What a header says of a tensor."""

    dtype: str
    """As safetensors names it."""
    shape: list[int]
    data_offsets: list[int]
    """First byte of its data, and the byte behind the last."""


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors by name, in the file's order; `__metadata__` is left out."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))


def write(
    path: Path,
    shapes: Shapes,
    slabs: Callable[[str], Iterable[torch.Tensor]],
) -> int:
    """Write a file whose tensors are made one after the other, synced to disk before it gets its
    name.

    Args:
        path: to write.
        shapes: of the tensors to write.
        slabs: makes the tensor of a name, of that shape and dtype, in runs of whole rows; they stay
            as they are: they are written while the next are made.
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
    with files.atomic_file(path) as temporary, temporary.open("wb", buffering=0) as stream:
        with _Writer(stream) as writer:
            writer.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, (shape, dtype) in shapes.items():
                n_made = 0
                for made in slabs(name):
                    assert list(made.shape[-1:]) == list(shape[-1:]) and made.dtype == dtype, name
                    writer.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                    n_made += made.numel()
                assert n_made == torch.Size(shape).numel(), name
        os.fsync(stream.fileno())
    return offset


class _Writer:
    """Writes while the next slabs are made, and has the disk begin before the end: the kernel alone
    would wait for gigabytes to gather, and the last sync would take as long as all of the work.

    Use as a context manager: at its end all is handed to the kernel.
    """

    def __init__(self, stream: FileIO) -> None:
        self._stream = stream
        self._writing = ThreadPoolExecutor(1)
        self._syncing = ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._sync: Future[None] | None = None
        self._n_unsynced_bytes = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._writes and kind is None:
                self._writes.popleft().result()
        finally:
            self._writing.shutdown(cancel_futures=True)
            self._syncing.shutdown()

    def write(self, content: bytes | memoryview) -> None:
        """
        Args:
            content: stays as it is until the end, or until so many more are asked for.
        Raises:
            OSError: of a write before.
        """
        self._writes.append(self._writing.submit(self._write, content))
        if len(self._writes) > WRITES_WAITING:
            self._writes.popleft().result()

    def _write(self, content: bytes | memoryview) -> None:
        self._n_unsynced_bytes += len(content)
        while len(content):  # the kernel may take a part, of the last of a disk
            content = content[self._stream.write(content[:WRITE_BYTES]) :]
        if self._n_unsynced_bytes >= SYNCED_BYTES and (self._sync is None or self._sync.done()):
            self._sync = self._syncing.submit(os.fdatasync, self._stream.fileno())
            self._n_unsynced_bytes = 0
