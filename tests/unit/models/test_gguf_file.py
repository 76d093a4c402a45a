"""Compared with llama.cpp's GGUF package, on files that it writes and on the demo's weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.log import StageError
from workflow_scripts.models.gguf_file import GgufFile
from workflow_scripts.quantize import llama_cpp_source

gguf = llama_cpp_source.gguf_package()


def write(path, *, tensors=(), kind=gguf.GGMLQuantizationType.F32, **metadata):
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float64}
        add |= {list: writer.add_array, bool: writer.add_bool}
        add[type(value)](name, value)
    for name, values in tensors:
        packed = gguf.quantize(values, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@given(
    text=st.text(min_size=1), number=st.integers(0, 2**32 - 1), truth=st.booleans(),
    share=st.floats(allow_nan=False), words=st.lists(st.text(), min_size=1),
)  # fmt: skip
def test_metadata_reads_back_as_written(  # llama.cpp's writer omits empty texts
    tmp_path_factory, text, number, truth, share, words
):
    path = tmp_path_factory.mktemp("gguf") / "file.gguf"
    values = {"text": text, "number": number, "truth": truth, "share": share, "words": words}
    found = GgufFile(write(path, **values)).metadata
    assert {name: found[name] for name in values} == values
    assert found["general.architecture"] == "llama"


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_tensors_equal_those_of_llama_cpps_reader(tmp_path, kind):
    generator = np.random.default_rng(0)
    tensors = [
        (name, generator.normal(size=shape).astype(np.float32))
        for name, shape in (("a", (3, 64)), ("b", (5, 96)))
    ]
    kind = gguf.GGMLQuantizationType[kind]
    path = write(tmp_path / "file.gguf", tensors=tensors, kind=kind)
    file = GgufFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read(tensor.name), expected)


def test_the_demos_weights_equal_those_of_llama_cpps_reader():
    path = smollm2_wheel.unpacked(smollm2_wheel.GGUF)
    file = GgufFile(path)
    tensors = gguf.GGUFReader(path).tensors
    assert [tensor.name for tensor in tensors] == list(file.tensors)
    for tensor in tensors[:12]:  # one of each kind
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.read(tensor.name), expected)


def test_an_unsupported_type_is_named(tmp_path):
    values = np.ones((2, 64), np.float32)
    kind = gguf.GGMLQuantizationType.Q5_0
    file = GgufFile(write(tmp_path / "file.gguf", tensors=[("a", values)], kind=kind))
    with pytest.raises(StageError, match="an unsupported type") as error:
        file.read("a")
    assert "ggml type 6" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"version https://git-lfs" * 5])
def test_a_file_that_is_not_gguf_is_refused(tmp_path, content):
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    with pytest.raises(StageError, match="cannot be read as GGUF"):
        GgufFile(path)
