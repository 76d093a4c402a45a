from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.evaluate import chunk_text, evaluate_perplexity
from workflow_scripts.evaluate.chunk_text import read_text
from workflow_scripts.evaluate.text_chunks import cut, encode_bare
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
from workflow_scripts.scoring.token_scores import TokenScores
from workflow_scripts.tokens.documents import Documents


def arguments(chain, text, tokens, settings='{"text_context_tokens": 256}'):
    return [
        *("--text", text, "--tokenizer", chain.tokenizer, "--facts", chain.facts),
        *("--settings", settings, "--tokens", tokens),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "What is a list?",
        " \n = Robert Boulter = \n \n Robert",
        "  two  spaces,\n\n\ttab  ",
        "\n\nGröße «日本» 🎉 e\u0301",
        "[INST] spelled [/INST]</s>",
        "a a a aa aaa the the",
        "▁marks▁ as they are",
        "",
    ],
)
def test_a_text_gets_the_token_ids_of_llama_cpp(chain, text):
    official = load_mistral_tokenizer(chain.tokenizer, for_training=True)
    found = encode_bare(text, official.instruct_tokenizer.tokenizer).tolist()
    with LlamaCppModel(chain.gguf, context_tokens=16, n_threads=1) as model:
        assert found == model.tokenize(text, adds_bos=False, parses_control=False)


def test_a_tekken_text_gets_the_token_ids_of_the_library(exported_tokenizer):
    official = load_mistral_tokenizer(exported_tokenizer("tekken"), for_training=True)
    tokenizer = official.instruct_tokenizer.tokenizer
    for text in ("\n a text", "a text\n\nof lines ", "Größe 日本"):
        expected = tokenizer.encode(text, bos=False, eos=False)
        assert encode_bare(text, tokenizer).tolist() == expected


@given(n_tokens=st.integers(0, 200), context_tokens=st.integers(2, 40))
def test_chunks_follow_each_other_with_bos_in_place_of_their_first_token(n_tokens, context_tokens):
    token_ids = np.arange(100, 100 + n_tokens, dtype=np.int32)
    chunks = cut(token_ids, 1, context_tokens=context_tokens)
    assert len(chunks) == (n_tokens + 1) // context_tokens
    for number, chunk in enumerate(chunks.tolist()):
        # BOS also comes before the whole text, so token 100 is the second.
        start = number * context_tokens
        expected = [99 + at for at in range(start, start + context_tokens)]
        assert chunk == [1, *expected[1:]]


def test_the_second_half_of_a_chunk_is_scored_except_its_first_token(peaked):
    documents = Documents(peaked.chunks)
    assert [document.id for document in documents][:2] == ["repeated/0", "repeated/1"]
    for document in documents:
        assert len(document.input_ids) == 256
        assert np.flatnonzero(document.is_supervised).tolist() == list(range(129, 256))
    assert documents.n_supervised.tolist() == [127] * len(documents)


@pytest.fixture(scope="module")
def score(chain, tmp_path_factory):
    """`score(tokens, *model)`: JSON of evaluate_perplexity, and the scores of the tokens."""

    def run(tokens, *model):
        folder = tmp_path_factory.mktemp("scores")
        evaluate_perplexity.main(
            [*map(str, model), "--facts", str(chain.facts), "--tokens", str(tokens)]
            + ["--settings", "{}", "--threads", "1", "--scores", str(folder / "scores.json")]
            + ["--token-scores", str(folder / "scores.tokens.parquet")]
        )
        found = TokenScores.read(folder / "scores.tokens.parquet")
        return files.read_json(folder / "scores.json"), found

    return run


def final_estimate(llama_tool, gguf, text, *options):
    """Perplexity and its error by llama-perplexity, over all chunks of 256."""
    arguments = ["-m", gguf, "-f", text, "-c", 256, "-t", 1, "-ngl", 0, *options]
    done = llama_tool("perplexity", *arguments)
    pattern = r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)"
    ((perplexity, error),) = re.findall(pattern, done.stdout + done.stderr)
    return float(perplexity), float(error)


@pytest.mark.parametrize(
    ("model", "kind", "options", "tolerance"),
    [
        # One chunk per batch, as here: measured 1e-7, the printed precision.
        ("peaked", "F16", ("-b", 256), 1e-6),
        ("flat", "F16", ("-b", 256), 1e-6),
        # Weights are repacked for kernels that compute four rows at a time.
        ("flat", "Q4_K_M", ("-b", 256), 1e-6),
        ("flat", "Q8_0", ("-b", 256), 1e-6),
        # The default is eight chunks per batch. This changes llama-perplexity's own result, because
        # flash attention adds in another order: by 1.8e-5 for the other model, 5e-9 for this one.
        ("flat", "F16", (), 1e-6),
    ],
)
def test_perplexity_equals_llama_perplexitys(
    chain, peaked, text, chunk, score, quantize, llama_tool, model, kind, options, tolerance
):
    gguf, raw = {"peaked": (peaked.gguf, peaked.text), "flat": (chain.gguf, text)}[model]
    if kind != "F16":
        gguf = quantize(gguf, kind)
    report, scores = score(chunk(raw), "--gguf", gguf)
    perplexity, error = final_estimate(llama_tool, gguf, raw, *options)
    assert report["perplexity"] == pytest.approx(perplexity, rel=tolerance)
    # Its error assumes independent tokens; ours is over chunks.
    independent = scores.nats.astype(float).std() / np.sqrt(len(scores.nats) - 1)
    assert independent * perplexity == pytest.approx(error, rel=1e-4)


def test_a_checkpoint_scores_the_same_tokens_as_its_gguf(chain, text, chunk, score):
    merged, merged_scores = score(chunk(text), "--checkpoint", chain.merged)
    gguf, gguf_scores = score(chunk(text), "--gguf", chain.gguf)
    assert gguf_scores.scores_the_same(merged_scores)
    # Measured: 3e-5 of 11 nats.
    assert gguf["loss_nats_per_token"] == pytest.approx(merged["loss_nats_per_token"], abs=5e-4)


def test_the_line_end_that_closes_a_file_is_not_scored(tmp_path):
    (tmp_path / "text.txt").write_bytes(b"a\r\n\nb\n\n")
    assert read_text(tmp_path / "text.txt") == "a\r\n\nb\n"


@pytest.mark.parametrize(
    ("content", "settings", "parts"),
    [
        (b"too short", {}, ["too short to be scored", "2 tokens", "at least 512"]),
        (b"word " * 600 + b"\xff", {}, ["not UTF-8", "0xff"]),
        (None, {}, ["a text to score is missing", "evaluation.texts"]),
        (b"word " * 600, {"text_context_tokens": 301}, ["every link", "301", "at most 300"]),
    ],
    ids=["short", "not UTF-8", "missing", "beyond the window"],
)
def test_a_text_that_cannot_be_scored_is_a_stage_error(
    chain, tmp_path, as_json, ends_with_message, content, settings, parts
):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    settings = as_json(**{"text_context_tokens": 256, **settings})
    argv = arguments(chain, path, tmp_path / "text.arrow", settings)
    message = ends_with_message(chunk_text.main, argv)
    for part in parts:
        assert part in message
    assert not (tmp_path / "text.arrow").exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.evaluate.chunk_text")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "llama_cpp"}


def test_the_logits_of_a_chunk_are_computed_with_its_last_token_to_the_bit(
    chain, text, chunk, quantize
):
    """Kernels for repacked weights compute four rows at a time and round the remaining rows
    differently: without its last row, a chunk would differ from llama-perplexity's."""
    gguf = quantize(chain.gguf, "Q4_K_M")
    document = Documents(chunk(text))[0]
    positions = np.flatnonzero(document.is_supervised) - 1
    with LlamaCppModel(gguf, context_tokens=256, n_threads=1) as model:
        blocks = [
            block.numpy().copy() for block in model.logit_blocks(document.input_ids, positions)
        ]
        model.forget()
        wants_logits = np.arange(256) >= positions[0]
        rows = model.decode(document.input_ids, first=0, wants_logits=wants_logits)
        assert len(rows) == len(positions) + 1
        np.testing.assert_array_equal(np.concatenate(blocks), rows[:-1])
