"""What drives each matrix: sums of squared inputs, taken while llama.cpp decodes.

llama.cpp calls back for every node of its graph; at each product of a weight matrix with
activations the squares of these are summed by channel, as tools/imatrix does. Values are read where
they lie, as NumPy views, and only from another device's memory by a copy.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

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


class _Ggml:
    """The few functions of ggml that llama-cpp-python does not wrap."""

    def __init__(self) -> None:
        from llama_cpp._ggml import libggml

        pointer = ctypes.c_void_p
        self.tensor_bytes = _function(libggml.ggml_nbytes, ctypes.c_size_t, pointer)
        self.is_host = _function(libggml.ggml_backend_buffer_is_host, ctypes.c_bool, pointer)
        self.read = _function(
            libggml.ggml_backend_tensor_get,
            None,
            *(pointer, pointer, ctypes.c_size_t, ctypes.c_size_t),
        )
        name_of = _function(libggml.ggml_op_name, ctypes.c_char_p, ctypes.c_int)
        operations: dict[str, int] = {}
        while "MUL_MAT_ID" not in operations:  # beyond the last there is no name to ask for
            operations[name_of(len(operations)).decode()] = len(operations)
        self.product = operations["MUL_MAT"]
        self.expert_product = operations["MUL_MAT_ID"]
        # 32 bytes are ggml's own record of an object.
        overhead = _function(libggml.ggml_tensor_overhead, ctypes.c_size_t)()
        assert overhead == ctypes.sizeof(Tensor) + 32, "ggml_tensor has another layout"


def _function(function: Any, result: Any, *arguments: Any) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


@cache
def _ggml() -> _Ggml:
    return _Ggml()


class Collector:
    """A `cb_eval` of llama.cpp that sums.

    Attributes:
        sums: (n_matrices, n_channels) float64 by tensor name.
        counts: (n_matrices,) int64 by tensor name: inputs summed.
    """

    def __init__(self) -> None:
        self._ggml = _ggml()
        self.sums: dict[str, np.ndarray] = {}
        self.counts: dict[str, np.ndarray] = {}
        self._error: Exception | None = None

    def __call__(self, address: int, is_question: bool, _: object = None) -> bool:
        """Asked before a node is computed whether it is wanted, then shown it computed."""
        node = Tensor.from_address(address)
        if is_question:
            return self._is_wanted(node)
        try:
            self._add(node)
        except Exception as error:  # ctypes would print it and go on
            self._error = error
            return False
        return True

    def check(self) -> None:
        """What went wrong in the callback, which cannot raise through llama.cpp.

        Raises:
            StageError: a matrix has another form than expected, or inputs that are not finite.
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
        if node.operation == self._ggml.expert_product:
            return True
        if node.operation != self._ggml.product:
            return False
        weight, inputs = (Tensor.from_address(node.sources[at]) for at in (0, 1))
        # Attention's own products are of activations, and the output layer is quantized without:
        # llama-imatrix leaves both out.
        return inputs.type == F32 and _plain_name(weight).startswith("blk.")

    def _add(self, node: Tensor) -> None:
        weight, inputs = (Tensor.from_address(node.sources[at]) for at in (0, 1))
        name = _plain_name(weight)
        values = self._values(inputs, np.float32)  # (…, rows, channels)
        n_channels = values.shape[-1]
        if node.operation == self._ggml.expert_product:
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
        """(d3, d2, d1, d0): the tensor where it lies, or its copy out of a device's memory."""
        n_bytes = self._ggml.tensor_bytes(ctypes.addressof(tensor))
        # A view (which experts a token was sent to) lies in another tensor's memory.
        owner = Tensor.from_address(tensor.view_source) if tensor.view_source else tensor
        if self._ggml.is_host(owner.buffer):
            memory = (ctypes.c_char * n_bytes).from_address(tensor.data)
        else:
            memory = ctypes.create_string_buffer(n_bytes)
            self._ggml.read(ctypes.addressof(tensor), memory, 0, n_bytes)
        return np.ndarray(
            tuple(tensor.shape)[::-1], kind, buffer=memory, strides=tuple(tensor.strides)[::-1]
        )


def _plain_name(tensor: Tensor) -> str:
    """`CUDA0#blk.0.attn_k.weight#0`, the scheduler's copy, is `blk.0.attn_k.weight`."""
    name = tensor.name.decode()
    return name.split("#")[1] if "#" in name else name


def _sum_of_squares(rows: np.ndarray) -> np.ndarray:
    """(n_channels,) of (n_rows, n_channels)."""
    return np.einsum("rc,rc->c", rows, rows)


def _by_expert(
    inputs: np.ndarray, experts: np.ndarray, *, n_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of a product with the experts' matrices.

    Args:
        inputs: (n_tokens, 1 or n_used, n_channels); 1 where a token's experts share their input.
        experts: (n_tokens, n_used): which experts a token was sent to.
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
