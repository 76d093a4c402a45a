from __future__ import annotations

import numpy as np
import pytest

from workflow_scripts.log import StageError
from workflow_scripts.quantize import imatrix
from workflow_scripts.quantize.imatrix import Imatrix


@pytest.fixture
def matrix():
    generator = np.random.default_rng(0)
    return Imatrix(
        sums={
            "blk.1.ffn_up_exps.weight": generator.random((4, 256), dtype=np.float32),
            "blk.0.attn_q.weight": generator.random((1, 64), dtype=np.float32),
        },
        counts={
            "blk.1.ffn_up_exps.weight": np.array([3, 0, 1, 4]),
            "blk.0.attn_q.weight": np.array([123_456]),
        },
        datasets=["tokens/train.arrow", "über.txt"],
        chunk_tokens=512,
        n_chunks=241,
    )


def assert_equal(found, expected):
    assert found.datasets == expected.datasets
    assert (found.chunk_tokens, found.n_chunks) == (expected.chunk_tokens, expected.n_chunks)
    assert found.sums.keys() == found.counts.keys() == expected.sums.keys()
    for name in expected.sums:
        assert np.array_equal(found.sums[name], expected.sums[name])
        assert found.counts[name].tolist() == expected.counts[name].tolist()


def test_a_written_matrix_is_read_back(matrix, tmp_path):
    imatrix.write(tmp_path / "imatrix.gguf", matrix)
    assert_equal(imatrix.read(tmp_path / "imatrix.gguf"), matrix)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_llama_imatrix_reads_it_and_writes_the_same_bytes(matrix, llama_tool, tmp_path):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    # llama-imatrix counts the chunks again from the sums.
    longest = max(int(counts.max()) for counts in matrix.counts.values())
    matrix = Imatrix(**{**vars(matrix), "n_chunks": longest // 512})
    imatrix.write(ours, matrix)
    # It requires a model argument, but opens no model.
    llama_tool("imatrix", "-m", "none", "--in-file", ours, "-o", theirs, "-c", 512)
    assert theirs.read_bytes() == ours.read_bytes()


def test_importance_is_the_mean_square_and_1_without_inputs(matrix):
    importance = matrix.importance()
    sums = matrix.sums["blk.1.ffn_up_exps.weight"]
    experts = importance["blk.1.ffn_up_exps.weight"].reshape(4, 256)
    assert experts.dtype == np.float32
    for expert, count in enumerate([3, 0, 1, 4]):
        expected = sums[expert] / np.float32(count) if count else np.ones(256)
        assert experts[expert].tolist() == expected.tolist()


@pytest.mark.parametrize("content", [b"", b"GGUF" + bytes(40), b"not a gguf at all, but long"])
def test_a_file_that_is_not_a_gguf_is_a_stage_error(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(StageError, match="importance matrix") as caught:
        imatrix.read(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_a_stage_error(tmp_path):
    with pytest.raises(StageError, match="cannot be read"):
        imatrix.read(tmp_path / "missing.gguf")


def test_a_model_is_not_an_importance_matrix(chain):
    with pytest.raises(StageError, match="not an importance matrix") as caught:
        imatrix.read(chain.gguf)
    assert "in_sum2" in str(caught.value)
