"""Models whose perplexity is known in advance, scored in every way that links are scored."""

from __future__ import annotations

import math
import shutil
from fractions import Fraction

import numpy as np
import pytest

from workflow_scripts import files
from workflow_scripts.evaluate import evaluate_perplexity
from workflow_scripts.quantize import convert_gguf

VOCABULARY = 32_768
# Tokens of the unigram model. Their chances are powers of two, whose logarithms F16 can hold.
CHANCES = {
    300: Fraction(1, 2),
    301: Fraction(1, 4),
    302: Fraction(1, 8),
    303: Fraction(1, 16),
    304: Fraction(1, 16),
}
ENTROPY_NATS = 1.875 * math.log(2)  # ½·1 + ¼·2 + ⅛·3 + 2·1/16·4 bits


@pytest.fixture(scope="module")
def make_model(chain, make_checkpoint, tmp_path_factory):
    """`make_model(log2_chances)`: checkpoint and F16 GGUF of a model that expects every token with
    the same chance wherever it comes.

    Every token is the same vector, and no layer adds to it; the norm before the output layer makes
    it (16, 0, 0 …) × ln 2 ÷ 16, and the first column of the output layer does the rest.
    """

    def make(log2_chances):
        from safetensors.torch import load_file, save_file

        folder = tmp_path_factory.mktemp("known")
        checkpoint = make_checkpoint(
            folder / "checkpoint", dtype="float32", vocab_size=VOCABULARY, sliding_window=300
        )
        weights = load_file(checkpoint / "model.safetensors")
        for name, tensor in weights.items():
            if "o_proj" in name or "down_proj" in name or "embed" in name or "lm_head" in name:
                tensor.zero_()
        weights["model.embed_tokens.weight"][:, 0] = 16  # of 256 columns: a mean square of 1
        weights["model.norm.weight"].fill_(math.log(2) / 16)
        for token, log2_chance in enumerate(log2_chances):
            weights["lm_head.weight"][token, 0] = log2_chance
        save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
        shutil.copyfile(chain.tokenizer / "tokenizer.model.v3", checkpoint / "tokenizer.model.v3")
        gguf = folder / "known-F16.gguf"
        convert_gguf.main(
            ["--merged", str(checkpoint), "--tokenizer", str(chain.tokenizer)]
            + ["--facts", str(chain.facts), "--name", "known", "--gguf", str(gguf)]
        )
        return {"--checkpoint": checkpoint, "--gguf": gguf}

    return make


@pytest.fixture(scope="module")
def uniform(make_model):
    return make_model(np.zeros(VOCABULARY))


@pytest.fixture(scope="module")
def unigram(make_model):
    log2_chances = np.full(VOCABULARY, -1000.0)  # never
    for token, chance in CHANCES.items():
        log2_chances[token] = math.log2(chance)
    return make_model(log2_chances)


@pytest.fixture(scope="module")
def tokens(write_documents, tmp_path_factory):
    """Conversations longer than a piece; the frequency of each token equals its chance."""
    path = tmp_path_factory.mktemp("known") / "test.arrow"
    generator = np.random.default_rng(0)
    of_chances = [token for token, chance in CHANCES.items() for _ in range(int(640 * chance))]
    documents = [[1, *generator.permutation(of_chances)] for _ in range(3)]
    write_documents(path, documents, [[(1, 641)]] * 3)
    return path


def score(chain, tokens, link, path, tmp_path):
    scores = tmp_path / "scores.json"
    evaluate_perplexity.main(
        [link, str(path), "--facts", str(chain.facts), "--tokens", str(tokens), "--settings"]
        + ["{}", "--threads", "1", "--scores", str(scores), "--token-scores"]
        + [str(tmp_path / "scores.tokens.parquet")]
    )
    return files.read_json(scores)


@pytest.mark.parametrize("link", ["--checkpoint", "--gguf"])
def test_a_model_of_uniform_logits_has_the_vocabulary_as_perplexity(
    chain, uniform, tokens, tmp_path, link
):
    report = score(chain, tokens, link, uniform[link], tmp_path)
    assert report["n_scored_tokens"] == 3 * 640
    # The logarithm of 32,768 in float32: measured 1e-7.
    assert report["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    # All conversations are equally hard.
    assert report["loss_standard_error_nats_per_token"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("link", ["--checkpoint", "--gguf"])
def test_a_unigram_model_has_its_entropy_as_loss(chain, unigram, tokens, tmp_path, link):
    report = score(chain, tokens, link, unigram[link], tmp_path)
    assert report["n_scored_tokens"] == 3 * 640
    assert report["loss_nats_per_token"] == pytest.approx(ENTROPY_NATS, rel=1e-6)
    for part in ("", "full_length_"):
        if link == "--checkpoint" or not part:
            assert report[f"{part}perplexity"] == pytest.approx(2**1.875, rel=1e-6)


def test_uniform_from_unigram_diverges_by_the_logarithm_minus_the_entropy(
    chain, uniform, unigram, tokens, tmp_path
):
    path = tmp_path / "divergence.json"
    evaluate_perplexity.main(
        ["--reference", str(unigram["--gguf"]), "--gguf", str(uniform["--gguf"]), "--facts"]
        + [str(chain.facts), "--tokens", str(tokens), "--settings", "{}", "--threads", "1"]
        + ["--scores", str(tmp_path / "Q.json"), "--token-scores", str(tmp_path / "Q.parquet")]
        + ["--divergence", str(path)]
    )
    report = files.read_json(path)
    # llama.cpp rounds the input of the output layer, ln 2, to F16: 3.1e-4 more. The tokens are as
    # frequent as expected, so this does not change the loss, but it changes the entropy by 1.8e-5.
    expected = math.log(VOCABULARY) - ENTROPY_NATS
    for key in ("kl_divergence_nats", "median_kl_divergence_nats", "max_kl_divergence_nats"):
        assert report[key] == pytest.approx(expected, rel=3e-5), key
    # Change of the right token's probability: Σ chance · (1/32768 − chance).
    mean = sum(float(chance) * (1 / VOCABULARY - float(chance)) for chance in CHANCES.values())
    assert report["probability_change_fraction"] == pytest.approx(mean, rel=1e-3)
