"""safetensors files written a slab of a tensor at a time: memory is a slab, not a shard.

Format: 8 bytes little-endian header length, a JSON header of name → dtype, shape, offsets, the
data.
Source: https://huggingface.co/docs/safetensors (format specification).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

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


def read_header(path: Path) -> dict[str, Any]:
    """name → {dtype, shape, data_offsets}, in the file's order; `__metadata__` left out."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))


def write(
    path: Path,
    shapes: Mapping[str, tuple[list[int], torch.dtype]],
    slabs: Callable[[str], Iterable[torch.Tensor]],
) -> int:
    """Write a file whose tensors are made one after the other, synced to disk before it gets its
    name.

    Args:
        path: to write.
        shapes: name → shape and dtype, in the order of the data.
        slabs: makes the tensor of a name, of that shape and dtype, in runs of whole rows.
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
    with files.atomic_file(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        for name, (shape, dtype) in shapes.items():
            n_made = 0
            for made in slabs(name):
                assert list(made.shape[-1:]) == list(shape[-1:]) and made.dtype == dtype, name
                stream.write(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                n_made += made.numel()
            assert n_made == torch.Size(shape).numel(), name
        stream.flush()
        os.fsync(stream.fileno())
    return offset
