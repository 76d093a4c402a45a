"""llama.cpp's quantizer and the tensor tables of its files, through llama-cpp-python: names of
types, parameters of a quantization, contents of a file."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

from workflow_scripts.log import StageError
from workflow_scripts.settings import MixSettings

TEXT_BYTES = 127  # longest text of a metadata value that llama.cpp takes


class _ReadingParameters(ctypes.Structure):
    _fields_ = [("leaves_data", ctypes.c_bool), ("context", ctypes.c_void_p)]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "gguf_init_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _ReadingParameters]),
    "gguf_get_n_tensors": (ctypes.c_int64, [ctypes.c_void_p]),
    "gguf_get_tensor_name": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_tensor_type": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_get_tensor_size": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_int64]),
    "gguf_free": (None, [ctypes.c_void_p]),
    "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
    "ggml_type_size": (ctypes.c_size_t, [ctypes.c_int]),
}
for _name, (_result, _arguments) in _SIGNATURES.items():
    _function = getattr(libggml, _name)
    _function.restype, _function.argtypes = _result, _arguments


def parameters(mix: MixSettings, *, n_threads: int = 1) -> Any:
    """Return the parameters of llama.cpp's quantizer, without an importance matrix.

    ctypes keeps the parts of an array and the values of a structure's fields alive.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type(mix.type)
    params.nthread = n_threads
    if mix.output:
        params.output_tensor_type = tensor_type(mix.output)
    if mix.token_embd:
        params.token_embedding_type = tensor_type(mix.token_embd)
    if mix.tensors:
        params.tt_overrides = tensor_overrides(mix.tensors)
    return params


def file_type(name: str) -> int:
    """Return llama.cpp's number of a quantization type."""
    kind = "ALL" if name == "F32" else "MOSTLY"
    return getattr(llama_cpp, f"LLAMA_FTYPE_{kind}_{name}")


def tensor_type(name: str) -> int:
    """Return ggml's number of a tensor type."""
    return _type_names().index(name)


@cache
def _type_names() -> list[str]:
    """Return ggml's names of tensor types, in the order of their numbers."""
    return [libggml.ggml_type_name(at).decode().upper() for at in range(llama_cpp.GGML_TYPE_COUNT)]


def block_size(name: str) -> int:
    """Return the number of weights in a block of a tensor type; rows must be multiples of it."""
    return libggml.ggml_blck_size(tensor_type(name))


class GgufTensor(NamedTuple):
    """Entry of a GGUF's tensor table."""

    type: str
    """ggml's name: `Q4_K`."""
    n_elements: int
    n_bytes: int


def tensor_table(path: Path) -> dict[str, GgufTensor]:
    """Return all tensors of a GGUF by name, read by ggml: gguf-py first takes seconds to read the
    vocabulary.

    Raises:
        StageError: the file is not a GGUF.
    """
    file = libggml.gguf_init_from_file(str(path).encode(), _ReadingParameters(True, None))
    if not file:
        raise StageError("the GGUF cannot be read", where=path, to_fix="build it again")
    try:
        table = {}
        for at in range(libggml.gguf_get_n_tensors(file)):
            kind = libggml.gguf_get_tensor_type(file, at)
            n_bytes = libggml.gguf_get_tensor_size(file, at)
            n_blocks = n_bytes // libggml.ggml_type_size(kind)
            table[libggml.gguf_get_tensor_name(file, at).decode()] = GgufTensor(
                _type_names()[kind], n_blocks * libggml.ggml_blck_size(kind), n_bytes
            )
        return table
    finally:
        libggml.gguf_free(file)


def tensor_overrides(patterns: Mapping[str, str]) -> ctypes.Array:
    entry = llama_cpp.llama_model_tensor_override
    entries = [entry(pattern.encode(), tensor_type(name)) for pattern, name in patterns.items()]
    return (entry * (len(entries) + 1))(*entries)  # a null entry ends it


def imatrix_entries(importance: Mapping[str, np.ndarray]) -> ctypes.Array:
    """Return an importance matrix for llama.cpp; the arrays must live until it has read them."""
    entry = llama_cpp.llama_model_imatrix_data
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [
        entry(name.encode(), values.ctypes.data_as(pointer), values.size)
        for name, values in importance.items()
    ]
    return (entry * (len(entries) + 1))(*entries)


def metadata_overrides(values: Sequence[tuple[str, str | int]]) -> ctypes.Array:
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
