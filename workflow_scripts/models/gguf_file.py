"""A reader of GGUF files: metadata, and tensors as float32.

It supports what one small published model needs: little-endian version 3, and the types `F32`,
`Q8_0` and `Q4_1`. llama.cpp's own `gguf` package reads every type, but the environment that builds
base models has no llama.cpp.

Source: docs/gguf.md and ggml-quants.h of llama.cpp.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workflow_scripts.log import StageError

MAGIC, VERSION = b"GGUF", 3
HEADER = struct.Struct("<4sIQQ")  # magic, version, tensors, metadata values
BLOCK_VALUES = 32  # values in a quantized block
# Type of a metadata value → its format in `struct`; 8 is a string, 9 an array.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

Array = np.ndarray


@dataclass(frozen=True)
class Tensor:
    """Place and type of a stored tensor."""

    shape: tuple[int, ...]
    """In torch's order: the last dimension is contiguous."""
    type_id: int
    """ggml's number of the quantization type."""
    offset: int
    """First byte in the file."""


class GgufFile:
    """A memory-mapped GGUF file; each tensor is read on access."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            StageError: the file is not GGUF version 3.
        """
        self._path = path
        with path.open("rb") as file:
            header = file.read(HEADER.size).ljust(HEADER.size, b"\0")
        magic, version, n_tensors, n_values = HEADER.unpack(header)
        if magic != MAGIC or version != VERSION:
            raise StageError(
                "the file cannot be read as GGUF",
                where=path,
                found=f"{magic!r}, version {version}",
                expected=f"{MAGIC!r}, version {VERSION}",
            )
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        self._buffer = self._bytes.data
        self._position = HEADER.size
        # The program that wrote the file chooses the keys.
        self.metadata: Mapping[str, Any] = {self._string(): self._value() for _ in range(n_values)}
        self.tensors: Mapping[str, Tensor] = self._tensors(n_tensors)

    def read(self, name: str) -> Array:
        """Read a tensor as float32.

        Raises:
            StageError: its type is not one of `TYPES`.
        """
        tensor = self.tensors[name]
        if tensor.type_id not in TYPES:
            raise StageError(
                "a tensor of the GGUF file has an unsupported type",
                where=f"{self._path}, {name}",
                found=f"ggml type {tensor.type_id}",
                expected=f"one of {sorted(TYPES)}",
            )
        block_values, block_bytes, decode = TYPES[tensor.type_id]
        n_blocks = math.prod(tensor.shape) // block_values
        stored = self._bytes[tensor.offset : tensor.offset + n_blocks * block_bytes]
        return decode(stored.reshape(n_blocks, block_bytes)).reshape(tensor.shape)

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self._buffer, self._position)
        self._position += struct.calcsize("<" + form)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        start, self._position = self._position, self._position + length
        return str(self._buffer[start : self._position], "utf-8")

    def _value(self, kind: int | None = None) -> Any:
        kind = self._scalar("I") if kind is None else kind
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            kind, length = self._scalar("I"), self._scalar("Q")
            return [self._value(kind) for _ in range(length)]
        return self._scalar(SCALARS[kind])

    def _tensors(self, n_tensors: int) -> dict[str, Tensor]:
        described = []
        for _ in range(n_tensors):
            name, n_dimensions = self._string(), self._scalar("I")
            shape = tuple(self._scalar("Q") for _ in range(n_dimensions))[::-1]
            described.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._position // alignment) * alignment
        return {
            name: Tensor(shape, type_id, start + offset)
            for name, shape, type_id, offset in described
        }


def _float16(blocks: Array) -> Array:
    """(n, 2) bytes → (n, 1) float32."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _q8_0(blocks: Array) -> Array:
    """Scale, then 32 signed bytes."""
    return _float16(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q4_1(blocks: Array) -> Array:
    """Scale, minimum, then 32 half bytes; the low halves are the first 16 values."""
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return _float16(blocks[:, :2]) * halves + _float16(blocks[:, 2:4])


def _f32(blocks: Array) -> Array:
    return np.ascontiguousarray(blocks).view(np.float32).copy()


# ggml's type → values per block, bytes per block, and the decoder.
TYPES: dict[int, tuple[int, int, Callable[[Array], Array]]] = {
    0: (1, 4, _f32),
    3: (BLOCK_VALUES, 20, _q4_1),
    8: (BLOCK_VALUES, 34, _q8_0),
}
