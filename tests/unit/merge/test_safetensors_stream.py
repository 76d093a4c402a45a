from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from workflow_scripts.merge import safetensors_stream
from workflow_scripts.merge.stored_tensors import StoredTensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "b": torch.randn(3, 5).to(torch.bfloat16),
        "a.weight": torch.randn(7),
        "half": torch.randn(2, 3, 4).half(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "long": torch.arange(5),
        "int": torch.arange(6, dtype=torch.int32),
        "byte": torch.arange(7, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "transposed": torch.randn(4, 6).T,
    }


def write(path, tensors):
    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return safetensors_stream.write(path, shapes, lambda name: [tensors[name]])


def test_safetensors_reads_back_every_type_and_shape(tmp_path, tensors):
    n_bytes = write(tmp_path / "model.safetensors", tensors)
    assert n_bytes == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == tensors.keys()
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), name


def test_the_tensors_of_a_folder_are_in_the_order_of_the_data(tmp_path, tensors):
    del tensors["empty"]  # shares its offset with the next
    write(tmp_path / "model.safetensors", tensors)
    assert list(StoredTensors(tmp_path).entries) == list(tensors)


def test_the_types_are_those_that_safetensors_itself_writes(tmp_path, tensors):
    tensors["transposed"] = tensors["transposed"].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = StoredTensors(tmp_path).entries
    assert entries.keys() == tensors.keys()
    for name, entry in entries.items():
        assert entry.shape == tensors[name].shape
        assert safetensors_stream.DTYPES[entry.dtype] == tensors[name].dtype
    offsets = [entry.first_byte for entry in entries.values()]
    assert offsets == sorted(offsets)


def test_the_data_begins_on_eight_bytes(tmp_path):
    for length in range(1, 10):
        path = tmp_path / f"{length}.safetensors"
        write(path, {"x" * length: torch.ones(3)})
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        assert torch.equal(load_file(path)["x" * length], torch.ones(3))


def test_an_exception_leaves_no_new_file_and_keeps_the_old_one(tmp_path, tensors):
    def fails_at_the_third(name):
        if name == "half":
            raise RuntimeError("the disk is full")
        return [tensors[name]]

    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with pytest.raises(RuntimeError):
        safetensors_stream.write(tmp_path / "model.safetensors", shapes, fails_at_the_third)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "model.safetensors", {"old": torch.ones(1)})
    with pytest.raises(RuntimeError):
        safetensors_stream.write(tmp_path / "model.safetensors", shapes, fails_at_the_third)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert list(load_file(tmp_path / "model.safetensors")) == ["old"]


@pytest.mark.parametrize(
    "made",
    [torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 3)],
    ids=["shape", "dtype", "rows"],
)
def test_a_tensor_of_another_shape_or_dtype_than_announced_is_an_assertion_error(tmp_path, made):
    shapes = {"w": ([2, 3], torch.float32)}
    with pytest.raises(AssertionError, match="w"):
        safetensors_stream.write(tmp_path / "model.safetensors", shapes, lambda _: [made])
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_requested_one_after_the_other_in_order(tmp_path, tensors):
    asked = []

    def make(name):
        asked.append(name)
        return [tensors[name]]

    shapes = {name: (list(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    safetensors_stream.write(tmp_path / "model.safetensors", shapes, make)
    assert asked == list(tensors)
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert list(header) == ["__metadata__", *tensors]


def test_a_tensor_written_in_slabs_of_rows_is_the_tensor(tmp_path):
    whole = torch.arange(35.0).reshape(7, 5)
    shapes = {"w": ([7, 5], torch.float32)}
    path = tmp_path / "model.safetensors"
    safetensors_stream.write(path, shapes, lambda _: whole.split(3))
    assert torch.equal(load_file(path)["w"], whole)
