"""SmolLM2 read from its GGUF, compared with llama.cpp running the same file."""

from __future__ import annotations

import pytest
import torch

from workflow_scripts.demo import smollm2, smollm2_wheel

TEXT = """Return the sorted list of 1234 items.

    key    a function of one argument, e.g. str.lower
    größe  naïve — “quotes” … 日本
"""


@pytest.fixture(scope="module")
def published():
    return smollm2.read(smollm2_wheel.unpacked(smollm2_wheel.GGUF))


@pytest.fixture(scope="module")
def llama():
    from llama_cpp import Llama

    model = Llama(
        str(smollm2_wheel.unpacked(smollm2_wheel.GGUF)), n_ctx=256, logits_all=True, verbose=False
    )
    yield model
    model.close()


@pytest.mark.parametrize("text", [TEXT, "x = 10\n\n\n\tpass", "<|im_start|>user\nHi<|im_end|>"])
def test_the_tokenizer_equals_llama_cpps(published, llama, text):
    expected = llama.tokenize(text.encode(), add_bos=False, special=True)
    assert published.tokenizer.encode(text).ids == expected
    assert published.tokenizer.decode(expected, skip_special_tokens=False) == text


def test_the_weights_predict_what_llama_cpp_predicts(published, llama):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**published.config, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    embeddings = published.weights["model.embed_tokens.weight"]
    model.load_state_dict(published.weights | {"lm_head.weight": embeddings})
    ids = published.tokenizer.encode(TEXT).ids
    with torch.no_grad():
        found = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    llama.reset()
    llama.eval(ids)
    expected = torch.tensor(llama.scores[: len(ids)]).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1)
    # llama.cpp quantizes activations to 8 bits: 0.003 nats measured. With heads that are not in
    # transformers' order: 4 nats or more.
    assert divergence.mean() < 0.02
