from __future__ import annotations

import numpy as np
import pytest

from tests.facts import MISTRAL_7B
from workflow_scripts.quantize import compute_imatrix, imatrix
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

MODULE = "workflow_scripts.quantize.compute_imatrix"
CHUNK = 256  # of the fixture `imatrix_of`


@pytest.fixture
def facts(tmp_path):
    """Facts of a model whose context is one chunk of the reference."""
    path = tmp_path / "facts.json"
    MISTRAL_7B.changed(sliding_window=CHUNK, context_tokens=512).write(path)
    return path


@pytest.fixture
def nothing(write_documents, tmp_path):
    write_documents(tmp_path / "empty.arrow", [], [])
    return tmp_path / "empty.arrow"


@pytest.fixture
def compute(tmp_path, facts, as_json):
    def run(gguf, tokens, *texts, n_tokens=4 * CHUNK):
        path = tmp_path / "imatrix.gguf"
        arguments = ["--gguf", gguf, "--facts", facts, "--tokens", tokens, "--threads", 1]
        arguments += ["--settings", as_json(n_tokens=n_tokens), "--imatrix", path]
        arguments += ["--texts", *texts] if texts else []
        compute_imatrix.main([str(argument) for argument in arguments])
        return imatrix.read(path)

    return run


def chunks_of(text, gguf):
    """Tokens of the text, cut as in llama-imatrix."""
    with LlamaCppModel(gguf, context_tokens=16, n_threads=1) as model:
        tokens = model.tokenize(text.read_text(), adds_bos=True, parses_control=False)
    return [[1, *tokens[at * CHUNK + 1 : (at + 1) * CHUNK]] for at in range(4)]


def assert_close(found, expected):
    assert found.sums.keys() == expected.sums.keys()
    for name, sums in expected.sums.items():
        assert found.counts[name].tolist() == expected.counts[name].tolist()
        # float32 sums in another order, and float64 across batches: measured at most 7e-6.
        np.testing.assert_allclose(found.sums[name], sums, rtol=2e-5, atol=1e-6 * sums.max())


@pytest.mark.parametrize("model", ["mistral", "mixtral"])
def test_the_matrix_equals_llama_imatrixs_on_the_same_text(
    request, compute, chain, imatrix_of, nothing, text, model
):
    gguf = chain.gguf if model == "mistral" else request.getfixturevalue("mixtral_gguf")
    found, expected = compute(gguf, nothing, text), imatrix.read(imatrix_of(gguf))
    assert_close(found, expected)
    assert (found.n_chunks, found.chunk_tokens) == (4, CHUNK)
    assert (expected.n_chunks, expected.chunk_tokens) == (4, CHUNK)
    assert found.datasets == [str(nothing), str(text)]
    assert expected.datasets == [str(text)]


def test_chats_of_the_same_tokens_give_the_same_matrix(
    compute, chain, imatrix_of, write_documents, text, tmp_path
):
    tokens = chunks_of(text, chain.gguf)
    write_documents(tmp_path / "train.arrow", tokens, [[(1, CHUNK)]] * 4)
    found = compute(chain.gguf, tmp_path / "train.arrow")
    assert_close(found, imatrix.read(imatrix_of(chain.gguf)))
    assert found.datasets == [str(tmp_path / "train.arrow")]


def test_other_text_gives_another_matrix(compute, chain, random_documents, imatrix_of, tmp_path):
    random_documents(tmp_path / "train.arrow", [CHUNK] * 4, vocabulary=32_000)
    found = compute(chain.gguf, tmp_path / "train.arrow")
    with pytest.raises(AssertionError):
        assert_close(found, imatrix.read(imatrix_of(chain.gguf)))


def test_short_chats_are_all_used_up_to_the_requested_tokens(
    compute, chain, random_documents, tmp_path
):
    lengths = [3, 50, 7, 120, 300, 33] * 4
    random_documents(tmp_path / "train.arrow", lengths, vocabulary=32_000)
    for n_tokens, expected in ((10_000, sum(lengths)), (500, 500)):
        found = compute(chain.gguf, tmp_path / "train.arrow", n_tokens=n_tokens)
        assert {int(counts[0]) for counts in found.counts.values()} == {expected}
        assert found.n_chunks == expected // CHUNK


def test_experts_without_tokens_are_counted_and_have_importance_1(
    compute, mixtral_gguf, random_documents, tmp_path, caplog
):
    random_documents(tmp_path / "train.arrow", [2])
    found = compute(mixtral_gguf, tmp_path / "train.arrow")
    unused = sum(int((counts == 0).sum()) for counts in found.counts.values())
    assert unused and f"n_expert_matrices={unused} of " in caplog.text
    name = next(name for name, counts in found.counts.items() if 0 in counts)
    experts = found.importance()[name].reshape(len(found.counts[name]), -1)
    assert (experts[found.counts[name] == 0] == 1).all()


def test_without_any_text_there_is_no_matrix(compute, chain, nothing, tmp_path):
    with pytest.raises(Exception, match="no text to compute") as caught:
        compute(chain.gguf, nothing)
    assert str(nothing) in str(caught.value)
    assert not (tmp_path / "imatrix.gguf").exists()


def test_a_text_that_cannot_be_read_is_named(compute, chain, nothing, tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(Exception, match="cannot be read") as caught:
        compute(chain.gguf, nothing, tmp_path / "latin.txt")
    assert "latin.txt" in str(caught.value)


def test_it_runs_as_a_stage_on_the_tokens_of_the_chain(chain, run_stage, tmp_path):
    path = tmp_path / "imatrix.gguf"
    done = run_stage(
        MODULE,
        *("--gguf", chain.gguf, "--facts", chain.facts, "--tokens", chain.tokens),
        *("--settings", "{}", "--threads", 1, "--imatrix", path),
    )
    assert done.returncode == 0, done.stderr
    assert "computed n_matrices=14 " in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_help_starts_without_torch_or_llama_cpp(ask_for_help):
    done, imported = ask_for_help(MODULE)
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp", "gguf"}
