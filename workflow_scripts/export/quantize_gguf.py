"""Quantize the F16 GGUF with llama.cpp's own quantizer, through llama-cpp-python.

The file is llama-quantize's, bit for bit, with the importance matrix named in its metadata alike.

python -m workflow_scripts.export.quantize_gguf --gguf run-F16.gguf --settings '{"type": "Q4_K_M"}'
    --imatrix imatrix.gguf --threads 2 --quantized run-Q4_K_M.gguf
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files, log
from workflow_scripts.log import StageError
from workflow_scripts.settings import TENSORS_NEED_IMATRIX, MixSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

OUTPUT_VERSION = 1
# Rows of one tensor in memory at once: without, the experts of a layer of Mixtral are 3 GB.
BUFFER_BYTES = 512 * 2**20
TEXT_BYTES = 127  # of a metadata value that llama.cpp is handed
logger = log.stage_logger("quantize_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, help="F16 GGUF")
    parser.add_argument("--settings", required=True, help="JSON of `gguf.mixes.<name>`")
    parser.add_argument("--imatrix", type=Path, help="file of compute_imatrix; without, none")
    parser.add_argument("--threads", type=int, required=True, help="CPU threads")
    parser.add_argument("--quantized", type=Path, required=True, help="to write: GGUF")
    arguments = parser.parse_args(argv)
    mix = settings_from_json(MixSettings, arguments.settings)

    import llama_cpp

    importance: dict[str, np.ndarray] = {}
    overrides: list[tuple[str, Any]] = []
    if arguments.imatrix:
        from workflow_scripts.export import imatrix

        matrix = imatrix.read(arguments.imatrix)
        importance = matrix.importance()
        overrides = [
            ("quantize.imatrix.file", str(arguments.imatrix)),
            *(("quantize.imatrix.dataset", name) for name in matrix.datasets[:1]),
            ("quantize.imatrix.entries_count", len(importance)),
            *(("quantize.imatrix.chunks_count", n) for n in [matrix.n_chunks] if n),
        ]
    if mix.tensors:
        check_patterns(mix, tensor_names(arguments.gguf), arguments.gguf)

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type(mix.type)
    params.nthread = arguments.threads
    params.max_buf_size = BUFFER_BYTES
    if mix.output:
        params.output_tensor_type = tensor_type(mix.output)
    if mix.token_embd:
        params.token_embedding_type = tensor_type(mix.token_embd)
    # ctypes keeps what an array is made of, and the fields of a structure what they are set to.
    if mix.tensors:
        params.tt_overrides = tensor_overrides(mix.tensors)
    if importance:
        params.imatrix = imatrix_entries(importance)
        params.kv_overrides = metadata_overrides(overrides)
    with files.atomic_file(arguments.quantized) as temporary:
        code = llama_cpp.llama_model_quantize(
            str(arguments.gguf).encode(), str(temporary).encode(), ctypes.byref(params)
        )
        if code:
            raise StageError(
                "llama.cpp's quantizer failed",
                where=arguments.gguf,
                found=f"code {code}; its own message stands above",
            )
    logger.info(
        "quantized type=%s n_importances=%d size_bytes=%d path=%s",
        mix.type,
        len(importance),
        arguments.quantized.stat().st_size,
        arguments.quantized,
    )


def file_type(name: str) -> int:
    """llama.cpp's number of a quantization type."""
    import llama_cpp

    kind = "ALL" if name == "F32" else "MOSTLY"
    return getattr(llama_cpp, f"LLAMA_FTYPE_{kind}_{name}")


def tensor_type(name: str) -> int:
    """ggml's number of a tensor's type."""
    from llama_cpp import GGML_TYPE_COUNT
    from llama_cpp._ggml import libggml

    libggml.ggml_type_name.restype = ctypes.c_char_p
    names = [libggml.ggml_type_name(at).decode().upper() for at in range(GGML_TYPE_COUNT)]
    return names.index(name)


class _ReadingParameters(ctypes.Structure):
    _fields_ = [("leaves_data", ctypes.c_bool), ("context", ctypes.c_void_p)]


def tensor_names(path: Path) -> list[str]:
    """Of all tensors of a GGUF, by ggml: gguf-py takes seconds for the vocabulary before them.

    Raises:
        StageError: the file is no GGUF.
    """
    from llama_cpp._ggml import libggml

    libggml.gguf_init_from_file.restype = ctypes.c_void_p
    libggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, _ReadingParameters]
    libggml.gguf_get_n_tensors.restype = ctypes.c_int64
    libggml.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    libggml.gguf_get_tensor_name.restype = ctypes.c_char_p
    libggml.gguf_get_tensor_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    libggml.gguf_free.argtypes = [ctypes.c_void_p]
    file = libggml.gguf_init_from_file(str(path).encode(), _ReadingParameters(True, None))
    if not file:
        raise StageError("the GGUF cannot be read", where=path, to_fix="make it again")
    try:
        n = libggml.gguf_get_n_tensors(file)
        return [libggml.gguf_get_tensor_name(file, at).decode() for at in range(n)]
    finally:
        libggml.gguf_free(file)


def check_patterns(mix: MixSettings, names: Sequence[str], path: Path) -> None:
    """Every pattern finds a tensor, and asks for none that llama.cpp aborts at.

    llama.cpp would pass over a pattern that finds nothing. Output layer and embeddings have no
    importance, and there it is missed by an assertion alone; elsewhere the quantizer says so.
    """
    left = {"output.weight", "token_embd.weight"} - {
        f"{key}.weight" for key in ("output", "token_embd") if getattr(mix, key)
    }
    for pattern, kind in mix.tensors.items():
        found = {name for name in names if re.search(pattern, name)}
        where = f"gguf.mixes.<name>.tensors, {pattern}"
        if not found:
            raise StageError(
                "a pattern finds no tensor",
                where=where,
                expected=f"part of a name in {path}, such as {min(names)}",
            )
        if kind in TENSORS_NEED_IMATRIX and found & left:
            raise StageError(
                f"{kind} needs an importance matrix, which some tensors never have",
                where=where,
                found=", ".join(sorted(found & left)),
                to_fix="set `output` and `token_embd`, or name a narrower pattern",
            )
        left -= found


def tensor_overrides(patterns: Mapping[str, str]) -> ctypes.Array:
    import llama_cpp

    entry = llama_cpp.llama_model_tensor_override
    entries = [entry(pattern.encode(), tensor_type(name)) for pattern, name in patterns.items()]
    return (entry * (len(entries) + 1))(*entries)  # the last one, null, ends it


def imatrix_entries(importance: Mapping[str, np.ndarray]) -> ctypes.Array:
    import llama_cpp

    entry = llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        entry(name.encode(), values.ctypes.data_as(pointer), values.size)
        for name, values in importance.items()
    ]
    return (entry * (len(entries) + 1))(*entries)


def metadata_overrides(values: Sequence[tuple[str, str | int]]) -> ctypes.Array:
    import llama_cpp

    entries = (llama_cpp.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(entries, values, strict=False):
        entry.key = key.encode()
        if isinstance(value, int):
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
            entry.value.val_i64 = value
        else:
            entry.tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
            entry.value.val_str = value.encode()[:TEXT_BYTES]
    return entries


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
