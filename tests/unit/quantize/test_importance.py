from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.log import StageError
from workflow_scripts.quantize import importance
from workflow_scripts.quantize.importance import Collector
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

SEQUENCES = [
    np.random.default_rng(at).integers(3, 32_768, size=size) for at, size in enumerate([40, 90, 17])
]


def collected(gguf, batches):
    collector = Collector()
    with LlamaCppModel(
        gguf, context_tokens=256, n_threads=1, n_sequences=8, observe=collector
    ) as model:
        for batch in batches:
            model.decode_together(batch)
            collector.check()
    return collector


@given(seed=st.integers(0, 2**32 - 1), shares_input=st.booleans())
def test_sums_by_expert_equal_a_loop_over_tokens(seed, shares_input):
    generator = np.random.default_rng(seed)
    n_tokens, n_used, n_channels = 7, 2, 5
    inputs = generator.normal(size=(n_tokens, 1 if shares_input else n_used, n_channels))
    inputs = inputs.astype(np.float32)
    experts = np.stack([generator.permutation(4)[:n_used] for _ in range(n_tokens)])
    expected, n = np.zeros((4, n_channels)), np.zeros(4)
    for token in range(n_tokens):
        for use in range(n_used):
            expected[experts[token, use]] += inputs[token, use % inputs.shape[1]] ** 2.0
            n[experts[token, use]] += 1
    sums, counts = importance._by_expert(inputs, experts.astype(np.int32), n_experts=4)
    assert counts.tolist() == n.tolist()
    assert sums == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_every_matrix_of_every_layer_is_seen_and_the_output_layer_is_not(chain):
    collector = collected(chain.gguf, [SEQUENCES])
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = {f"blk.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    assert collector.sums.keys() == names
    assert {int(counts.sum()) for counts in collector.counts.values()} == {40 + 90 + 17}


def test_sequences_decoded_together_do_not_see_each_other(chain, mixtral_gguf):
    for gguf in (chain.gguf, mixtral_gguf):
        together = collected(gguf, [SEQUENCES])
        alone = collected(gguf, [[sequence] for sequence in SEQUENCES])
        for name, sums in alone.sums.items():
            assert together.counts[name].tolist() == alone.counts[name].tolist()
            # Keys and values are F16: measured at most 2e-3 of the largest sum.
            assert np.abs(together.sums[name] - sums).max() < 1e-2 * sums.max()


def test_a_sequence_that_sees_its_neighbour_changes_the_sums(chain):
    alone = collected(chain.gguf, [[SEQUENCES[0]], [SEQUENCES[1]]])
    joined = collected(chain.gguf, [[np.concatenate(SEQUENCES[:2])]])
    name = "blk.1.attn_output.weight"
    difference = np.abs(joined.sums[name] - alone.sums[name]).max()
    assert difference > 2e-2 * alone.sums[name].max()


def test_an_error_in_the_callback_is_raised_after_decoding(chain, monkeypatch):
    def fail(*_):
        raise StageError("a matrix of another form")

    monkeypatch.setattr(Collector, "_add", fail)
    with pytest.raises(StageError, match="another form"):
        collected(chain.gguf, [SEQUENCES])


def test_activations_that_are_not_finite_are_named():
    collector = Collector()
    collector.sums = {"blk.0.ffn_down.weight": np.array([[1.0, np.inf]])}
    with pytest.raises(StageError, match="not finite") as caught:
        collector.check()
    assert "blk.0.ffn_down.weight" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_k.weight", "CUDA0#blk.0.attn_k.weight#0", "CUDA0#blk.0.attn_k.weight"]
)
def test_a_schedulers_copy_has_the_tensors_own_name(name):
    tensor = SimpleNamespace(name=name.encode())
    assert importance._plain_name(tensor) == "blk.0.attn_k.weight"


def test_the_layout_of_a_tensor_equals_the_librarys():
    from llama_cpp._ggml import libggml

    # Tensors built by ggml itself show the layout.
    init = libggml.ggml_init
    init.restype = ctypes.c_void_p

    class Params(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
        ]  # fmt: skip

    init.argtypes = [Params]
    context = init(Params(1 << 16, None, False))
    libggml.ggml_new_tensor_2d.restype = ctypes.c_void_p
    libggml.ggml_new_tensor_2d.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    ]  # fmt: skip
    libggml.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    libggml.ggml_mul_mat.restype = ctypes.c_void_p
    libggml.ggml_mul_mat.argtypes = [ctypes.c_void_p] * 3
    libggml.ggml_get_data.restype = ctypes.c_void_p
    libggml.ggml_get_data.argtypes = [ctypes.c_void_p]
    a = libggml.ggml_new_tensor_2d(context, 0, 8, 3)
    b = libggml.ggml_new_tensor_2d(context, 0, 8, 5)
    libggml.ggml_set_name(a, b"weights")
    product = importance.Tensor.from_address(libggml.ggml_mul_mat(context, a, b))
    weights = importance.Tensor.from_address(a)
    assert weights.name == b"weights"
    assert weights.type == importance.F32
    assert list(weights.shape) == [8, 3, 1, 1]
    assert list(weights.strides) == [4, 32, 96, 96]
    assert weights.data == libggml.ggml_get_data(a)
    assert product.operation == importance.PRODUCT
    assert product.sources[:3] == [a, b, None]
    libggml.ggml_free.argtypes = [ctypes.c_void_p]
    libggml.ggml_free(context)
