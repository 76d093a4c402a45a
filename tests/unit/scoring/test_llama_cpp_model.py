from __future__ import annotations

import numpy as np
import pytest
import torch

from workflow_scripts.log import StageError
from workflow_scripts.scoring.likelihood import divergence, negative_log_likelihoods
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.pieces import cut
from workflow_scripts.scoring.transformers_model import TransformersModel
from workflow_scripts.tokens.documents import Documents

TOKENS = np.random.default_rng(0).integers(3, 32_768, size=300).astype(np.int32)


@pytest.fixture(scope="module")
def model(chain):
    with LlamaCppModel(chain.gguf, context_tokens=300, n_threads=1, batch_tokens=256) as model:
        yield model


@pytest.fixture(scope="module")
def expected(chain):
    """(300, vocabulary) logits of the merged model, full causal attention."""
    merged = TransformersModel(chain.merged, window=None, precision="float32")
    return torch.cat(list(merged.logit_blocks(TOKENS, np.arange(300))))


def copied_blocks(model, input_ids, positions):
    """Copies, as a block is llama.cpp's own memory and valid until the next one."""
    return [block.clone() for block in model.logit_blocks(input_ids, positions)]


def test_logits_equal_the_merged_models_over_more_than_one_batch(model, expected):
    blocks = copied_blocks(model, TOKENS, np.arange(300))
    assert [len(block) for block in blocks] == [256, 44]
    kl, agrees = divergence(expected, torch.cat(blocks))
    # llama.cpp keeps keys and values in F16, so the divergence grows with the context: measured
    # 1e-6 in the mean and 1.2e-5 after 300 tokens.
    assert kl.mean() < 1e-5
    assert kl.max() < 1e-4
    assert agrees.double().mean() > 0.98


@pytest.mark.parametrize(
    "positions",
    [[0], [299], [0, 255, 256, 299], [256], [3, 4, 200], list(range(250, 262))],
    ids=str,
)
def test_logits_are_those_of_the_requested_positions_in_order(model, expected, positions):
    blocks = copied_blocks(model, TOKENS, np.array(positions))
    kl, _ = divergence(expected[positions], torch.cat(blocks))
    assert len(kl) == len(positions)
    assert kl.max() < 1e-4


def test_an_input_does_not_influence_the_next(model):
    (first,) = copied_blocks(model, TOKENS[:20], np.arange(20))
    copied_blocks(model, TOKENS[100:200], np.arange(100))
    (again,) = copied_blocks(model, TOKENS[:20], np.arange(20))
    assert torch.equal(first, again)


def test_an_input_that_begins_as_the_previous_one_is_resumed_and_scores_alike(model):
    generator = np.random.default_rng(1)
    inputs = [TOKENS]
    for n_shared in (290, 290, 260, 10, 1, 0):
        inputs.append(TOKENS.copy())
        inputs[-1][n_shared:] = generator.integers(3, 32_768, size=300 - n_shared)
    inputs += [TOKENS[:280], TOKENS, TOKENS]
    n_run = []
    run = model.decode

    def counted(tokens, **options):
        n_run.append(len(tokens))
        return run(tokens, **options)

    # Each is run from the first requested position, at the latest.
    positions = [np.arange(n - 9, n) for n in map(len, inputs)]
    expected = [
        torch.cat(copied_blocks(model, one, at)) for one, at in zip(inputs, positions, strict=True)
    ]
    model.forget()
    model.decode = counted
    try:
        for one, at, reference in zip(inputs, positions, expected, strict=True):
            blocks = [block.clone() for block in model.resumed_logit_blocks(one, at)]
            kl, _ = divergence(reference, torch.cat(blocks))
            # The same except for the order of sums: measured 2e-7.
            assert kl.max() < 1e-5
    finally:
        del model.decode
    assert sum(n_run) == 300 + 10 + 10 + 40 + 290 + 299 + 300 + 280 + 20 + 9


def test_a_forgotten_input_is_not_resumed(model):
    list(model.resumed_logit_blocks(TOKENS[:50], np.array([49])))
    copied_blocks(model, TOKENS[100:200], np.arange(100))
    (resumed,) = [one.clone() for one in model.resumed_logit_blocks(TOKENS[:50], np.array([49]))]
    (fresh,) = copied_blocks(model, TOKENS[:50], np.array([49]))
    assert torch.equal(resumed, fresh)


def test_scores_of_a_long_conversation_equal_the_merged_models(model, chain):
    merged = TransformersModel(chain.merged, window=300, precision="float32")
    pieces = list(cut(Documents(chain.tokens), piece_tokens=300))
    assert max(len(piece.input_ids) for piece in pieces) > 256
    for piece in pieces:
        found = negative_log_likelihoods(model, piece)
        reference = negative_log_likelihoods(merged, piece)
        assert len(found) == len(piece.scored)
        # Measured at most 0.009 nats for losses of 10.
        np.testing.assert_allclose(found, reference, atol=0.03)


@pytest.mark.parametrize(
    "text", ["What is a list?", " two  spaces\n\n\ttab", "Größe «日本» 🎉", ""]
)
def test_text_is_read_as_mistral_common_reads_it(model, chain, text):
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

    reference = load_mistral_tokenizer(chain.tokenizer, for_training=True)
    tokenizer = reference.instruct_tokenizer.tokenizer
    # SentencePiece adds a space in front, and so does mistral-common; llama.cpp does not.
    found = model.tokenize(" " + text, adds_bos=False, parses_control=False)
    assert found == tokenizer.encode(text or "", bos=False, eos=False) or text == ""
    with_bos = model.tokenize(" " + text, adds_bos=True, parses_control=False)
    assert with_bos == [1, *found]


def test_control_tokens_are_parsed_only_on_request(model):
    assert model.tokenize("[INST]", adds_bos=False, parses_control=True) == [3]
    spelled = model.tokenize("[INST]", adds_bos=False, parses_control=False)
    assert len(spelled) > 1 and 3 not in spelled


def test_metadata_and_control_texts_are_those_of_the_file(model):
    assert model.n_vocabulary == 32_768
    assert model.metadata("general.architecture") == "llama"
    assert model.metadata("general.name") == "run"
    assert (model.control_text("bos"), model.control_text("eos")) == ("<s>", "</s>")
    with pytest.raises(StageError, match="no.such.key"):
        model.metadata("no.such.key")


def test_a_file_that_is_not_a_gguf_is_a_stage_error(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StageError, match="cannot load the GGUF") as caught:
        LlamaCppModel(path, context_tokens=32, n_threads=1)
    assert str(path) in str(caught.value)
