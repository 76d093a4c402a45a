from __future__ import annotations

import logging

import torch
from transformers import MistralConfig, MistralForCausalLM

from workflow_scripts.demo import healing, stdlib_docs
from workflow_scripts.demo.healing import BOS, ROW_TOKENS


def encode(text: str) -> list[int]:
    """Return one token per character, so that rows can be decoded."""
    return [10 + ord(character) for character in text]


def decode(row) -> str:
    return "".join(chr(token - 10) for token in row.tolist() if token != BOS)


def test_rows_are_consecutive_texts_and_begin_with_bos():
    rows = healing.read_rows(encode, n_rows=6, seed=3)
    assert rows.shape == (6, ROW_TOKENS)
    assert (rows[:, 0] == BOS).all()
    assert (rows == BOS).sum() == 6
    found, texts = "".join(map(decode, rows)), stdlib_docs.unlisted_docstrings()
    n_texts = 0
    while text := next((text for text in texts if found.startswith(text + "\n\n")), None):
        found, n_texts = found.removeprefix(text + "\n\n"), n_texts + 1
    assert n_texts >= 3
    assert any(
        text.startswith(found[:100]) for text in texts
    )  # truncated by the end of the last row


def test_rows_are_decided_by_the_seed():
    first, again, other = (healing.read_rows(encode, n_rows=4, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def small_model(window: int | None) -> MistralForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    config = MistralConfig(vocab_size=2_000, **shape, **heads, sliding_window=window)
    return MistralForCausalLM(config)


def test_a_cpu_limited_to_avx2_does_not_multiply_in_bfloat16(run_python):
    code = (
        "import torch; from workflow_scripts.demo.healing import product_dtype;"
        "print(product_dtype(torch.device('cpu')))"
    )
    done = run_python(code, ATEN_CPU_CAPABILITY="avx2")
    assert done.stdout.strip() == "torch.float32", done.stderr


def test_the_model_learns_and_keeps_its_window():
    rows = healing.read_rows(lambda text: [ord(c) % 2_000 for c in text], n_rows=30, seed=0)
    for window in (None, 1024):
        model = small_model(window)
        losses = healing.heal(
            model,
            rows,
            learning_rate=0.01,
            share_of_change=1,
            logger=logging.getLogger("test_healing"),
        )
        assert len(losses) == 30
        assert losses[-1] < losses[0] - 2  # a guess costs 7.6 nats; 4 measured
        assert model.config.sliding_window == window


def test_training_uses_a_window_of_half_a_row():
    """The first loss is that of the model with the training window, not with its own window."""
    rows = healing.read_rows(lambda text: [ord(c) % 2_000 for c in text], n_rows=1, seed=0)
    model = small_model(None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # makes attention matter
    expected = {}
    for window in (None, healing.WINDOW):
        model.config.sliding_window = window
        expected[window] = model(input_ids=rows, labels=rows, use_cache=False).loss.item()
    model.config.sliding_window = None
    logger = logging.getLogger("test")
    (found,) = healing.heal(model, rows, learning_rate=1e-9, share_of_change=1, logger=logger)
    assert abs(found - expected[healing.WINDOW]) < abs(found - expected[None])


def test_the_requested_share_of_the_change_is_kept():
    rows = healing.read_rows(lambda text: [ord(c) % 2_000 for c in text], n_rows=3, seed=0)

    def healed(share: float) -> list[torch.Tensor]:
        model = small_model(None)
        logger = logging.getLogger("test")
        healing.heal(model, rows, learning_rate=0.01, share_of_change=share, logger=logger)
        return list(model.parameters())

    start, part, whole = healed(0), healed(2 / 3), healed(1)
    for before, found, after in zip(start, part, whole, strict=True):
        assert not torch.equal(before, after)
        torch.testing.assert_close(found, before + (after - before) * 2 / 3)
    for before, found in zip(start, small_model(None).parameters(), strict=True):
        torch.testing.assert_close(before, found, rtol=0, atol=0)
