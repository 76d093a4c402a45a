"""Sums of squared inputs of each matrix, collected while llama.cpp decodes.

llama.cpp calls back for every node of its graph. At each product of a weight matrix with
activations, the squared activations are summed by channel, as tools/imatrix does. Values are NumPy
views of llama.cpp's memory; only values in another device's memory are copied.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llama_cpp._ggml import libggml

from workflow_scripts.log import StageError

N_DIMENSIONS, N_SOURCES, NAME_BYTES, PARAMETER_BYTES = 4, 10, 64, 64
F32 = 0


class Tensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h, in the version that requirements.lock pins."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * N_DIMENSIONS),  # innermost first
        ("strides", ctypes.c_size_t * N_DIMENSIONS),  # bytes
        ("operation", ctypes.c_int),
        ("parameters", ctypes.c_char * PARAMETER_BYTES),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * N_SOURCES),
        ("view_source", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * NAME_BYTES),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """Return one of the functions of ggml that llama-cpp-python does not wrap."""
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments
    return function


_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_tensor_bytes = _function("ggml_nbytes", _SIZE, _POINTER)
_is_host = _function("ggml_backend_buffer_is_host", ctypes.c_bool, _POINTER)
_read = _function("ggml_backend_tensor_get", None, _POINTER, _POINTER, _SIZE, _SIZE)
_name_of = _function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
_operations: dict[str, int] = {}
while "MUL_MAT_ID" not in _operations:  # ggml has no name to ask for beyond the last one
    _operations[_name_of(len(_operations)).decode()] = len(_operations)
PRODUCT, EXPERT_PRODUCT = _operations["MUL_MAT"], _operations["MUL_MAT_ID"]
# ggml's own record of an object has 32 bytes.
assert _function("ggml_tensor_overhead", _SIZE)() == ctypes.sizeof(Tensor) + 32, "another layout"


class Collector:
    """A `cb_eval` of llama.cpp that sums squared inputs.

    Attributes:
        sums: (n_matrices, n_channels) float64 by tensor name.
        counts: (n_matrices,) int64 by tensor name: number of inputs summed.
    """

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._error: Exception | None = None

    def __call__(self, address: int, is_question: bool, _: object = None) -> bool:
        """Say before a node is computed if it is wanted; add its inputs after it is computed."""
        node = Tensor.from_address(address)
        if is_question:
            return self._is_wanted(node)
        try:
            self._add(node)
        except Exception as error:  # ctypes would print it and continue
            self._error = error
            return False
        return True

    def check(self) -> None:
        """Raise the error of the callback, which cannot raise through llama.cpp.

        Raises:
            StageError: a matrix has an unexpected shape, or inputs that are not finite.
        """
        if self._error is not None:
            raise self._error
        broken = [name for name, sums in self.sums.items() if not np.isfinite(sums).all()]
        if broken:
            raise StageError(
                "activations are not finite",
                where=", ".join(sorted(broken)[:10]),
                to_fix="check the merged model: with such activations no quantization works",
            )

    def _is_wanted(self, node: Tensor) -> bool:
        if node.operation == EXPERT_PRODUCT:
            return True
        if node.operation != PRODUCT:
            return False
        weight, inputs = (Tensor.from_address(node.sources[at]) for at in (0, 1))
        # llama-imatrix leaves out attention's own products, which are of activations, and the
        # output layer, which is quantized without importance.
        return inputs.type == F32 and _plain_name(weight).startswith("blk.")

    def _add(self, node: Tensor) -> None:
        weight, inputs = (Tensor.from_address(node.sources[at]) for at in (0, 1))
        name = _plain_name(weight)
        values = self._values(inputs, np.float32)  # (…, rows, channels)
        n_channels = values.shape[-1]
        if node.operation == EXPERT_PRODUCT:
            experts = self._values(Tensor.from_address(node.sources[2]), np.int32)[0, 0]
            sums, counts = _by_expert(values[0], experts, n_experts=weight.shape[2])
        elif weight.shape[2] * weight.shape[3] == 1:
            rows = values.reshape(-1, n_channels)
            sums, counts = _sum_of_squares(rows)[None], np.array([len(rows)])
        else:
            raise StageError("a weight has more than two dimensions", where=name)
        if name not in self.sums:
            self.sums[name] = np.zeros(sums.shape)
            self.counts[name] = np.zeros(len(counts), dtype=np.int64)
        self.sums[name] += sums
        self.counts[name] += counts

    def _values(self, tensor: Tensor, kind: type[np.generic]) -> np.ndarray:
        """Return (d3, d2, d1, d0): a view of the tensor, or a copy from another device's memory."""
        n_bytes = _tensor_bytes(ctypes.addressof(tensor))
        # A view (the experts that a token was sent to) is in another tensor's memory.
        owner = Tensor.from_address(tensor.view_source) if tensor.view_source else tensor
        if _is_host(owner.buffer):
            memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
        else:
            memory = ctypes.create_string_buffer(n_bytes)
            _read(ctypes.addressof(tensor), memory, 0, n_bytes)
        return np.ndarray(
            tuple(tensor.shape)[::-1], kind, buffer=memory, strides=tuple(tensor.strides)[::-1]
        )


def _plain_name(tensor: Tensor) -> str:
    """Return `blk.0.attn_k.weight` for `CUDA0#blk.0.attn_k.weight#0`, the scheduler's copy."""
    name = tensor.name.decode()
    return name.split("#")[1] if "#" in name else name


def _sum_of_squares(rows: np.ndarray) -> np.ndarray:
    """Return (n_channels,) for (n_rows, n_channels)."""
    return np.einsum("rc,rc->c", rows, rows)


def _by_expert(
    inputs: np.ndarray, experts: np.ndarray, *, n_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums and counts of a product with the experts' matrices.

    Args:
        inputs: (n_tokens, 1 or n_used, n_channels); 1 where a token's experts share their input.
        experts: (n_tokens, n_used): experts that each token was sent to.
    Returns:
        (n_experts, n_channels) and (n_experts,).
    """
    is_sent = experts[:, :, None] == np.arange(n_experts)  # (token, use, expert)
    counts = is_sent.sum(axis=(0, 1))
    if inputs.shape[1] == 1:
        is_sent = is_sent.sum(axis=1, keepdims=True)
    rows = inputs.reshape(-1, inputs.shape[-1])
    chosen = is_sent.reshape(len(rows), n_experts).astype(np.float32)
    return chosen.T @ np.square(rows), counts
