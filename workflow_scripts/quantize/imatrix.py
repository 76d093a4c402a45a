"""The importance matrix as a file: mean squared input of each channel of each matrix.

The file is a GGUF that llama.cpp's own tools read and write. `general.type` is imatrix; every
matrix has `<tensor>.in_sum2` (sums of squared inputs) and `<tensor>.counts` (number of inputs
summed); the metadata names the texts it was computed on.
Source: llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workflow_scripts import files
from workflow_scripts.log import StageError
from workflow_scripts.quantize import llama_cpp_source

SUMS, COUNTS = ".in_sum2", ".counts"
_NUMBERS = ("chunk_count", "chunk_size")


@dataclass(frozen=True)
class Imatrix:
    """Sums and counts by tensor name, such as `blk.0.attn_q.weight`."""

    sums: dict[str, np.ndarray]
    """(n_matrices, n_channels) float32; one matrix, or one per expert."""
    counts: dict[str, np.ndarray]
    """(n_matrices,) integer: number of inputs summed; 0 for an expert that no token was sent to."""
    datasets: list[str]
    """Paths of the texts."""
    chunk_tokens: int
    """Longest sequence that was decoded."""
    n_chunks: int
    """Inputs of a matrix ÷ `chunk_tokens`."""

    def importance(self) -> dict[str, np.ndarray]:
        """Return the mean square of each channel, (n_matrices · n_channels,) float32, by tensor.

        The division is in float32, as in llama-quantize, so that the quantizer gets the same
        bits. An expert without inputs has importance 1 everywhere.
        """
        means = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].astype(np.float32)[:, None]
            with np.errstate(invalid="ignore", divide="ignore"):
                means[name] = np.where(counts > 0, sums / counts, np.float32(1)).ravel()
        return means


def write(path: Path, imatrix: Imatrix) -> None:
    gguf = llama_cpp_source.gguf_package()
    with files.atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch="")  # llama-imatrix sets none
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", imatrix.datasets)
        writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_tokens)
        for name in sorted(imatrix.sums):
            sums = np.ascontiguousarray(imatrix.sums[name], dtype=np.float32)
            counts = imatrix.counts[name].astype(np.float32)
            is_one = len(counts) == 1  # ggml writes no trailing dimension of 1
            writer.add_tensor(name + SUMS, sums[0] if is_one else sums)
            writer.add_tensor(name + COUNTS, counts if is_one else counts[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: Path) -> Imatrix:
    """Read an importance matrix, ours or llama-imatrix's.

    Raises:
        StageError: the file is not a GGUF, or not an importance matrix.
    """
    gguf = llama_cpp_source.gguf_package()
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise StageError("the importance matrix cannot be read", where=path, found=error) from error
    # One matrix is (n_channels), several (n_matrices, n_channels).
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    sums = {
        name.removesuffix(SUMS): np.atleast_2d(values)
        for name, values in tensors.items()
        if name.endswith(SUMS)
    }
    counts = {
        name.removesuffix(COUNTS): values.reshape(-1).round().astype(np.int64)
        for name, values in tensors.items()
        if name.endswith(COUNTS)
    }
    keys = {key: reader.get_field(f"imatrix.{key}") for key in ("datasets", *_NUMBERS)}
    if not sums or sums.keys() != counts.keys() or None in keys.values():
        raise StageError(
            "the file is not an importance matrix",
            where=path,
            found=f"{len(tensors)} tensors",
            expected=f"imatrix.datasets, and pairs of <tensor>{SUMS} and <tensor>{COUNTS}",
        )
    n_chunks, chunk_tokens = (int(keys[key].contents()) for key in _NUMBERS)
    return Imatrix(sums, counts, list(keys["datasets"].contents()), chunk_tokens, n_chunks)
