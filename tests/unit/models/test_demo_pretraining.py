from __future__ import annotations

import re
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

from workflow_scripts.models import demo_pretraining as pretraining
from workflow_scripts.models.demo_pretraining import BEGIN_INST, BOS, END_INST, EOS, ROW_TOKENS

FIRST_LETTER = 10  # above the control tokens


def encode(text: str) -> list[int]:
    """A token a character: passages can be read back."""
    return [FIRST_LETTER + ord(character) for character in text]


def decode(token_ids) -> str:
    return "".join(chr(token - FIRST_LETTER) for token in token_ids)


documents = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=700), max_size=20)


@given(documents=documents)
def test_rows_are_the_documents_end_to_end(documents):
    tokens = [token for document in documents for token in document]
    rows = list(pretraining.rows(iter(documents)))
    assert [token for row in rows for token in row] == tokens[: len(rows) * ROW_TOKENS]
    assert all(len(row) == ROW_TOKENS for row in rows)
    assert len(tokens) - len(rows) * ROW_TOKENS < ROW_TOKENS


def test_every_passage_runs_from_bos_to_eos():
    for passage in islice(pretraining.passages(encode, seed=3), 300):
        assert passage[0] == BOS and passage[-1] == EOS
        control = [token for token in passage[1:-1] if token < FIRST_LETTER]
        assert control in ([], [BEGIN_INST, END_INST])


def test_every_recall_passage_holds_its_answer():
    n_recalled = 0
    for passage in islice(pretraining.passages(encode, seed=3), 300):
        if END_INST not in passage:
            continue
        end = passage.index(END_INST)
        asked = re.search(r"What is the code of (\w+)\?$", decode(passage[2:end]))
        if asked:
            answer = decode(passage[end + 1 : -1])
            assert f"The code of {asked[1]} is {answer}." in decode(passage[2:end])
            n_recalled += 1
    assert 10 <= n_recalled <= 60  # 10 % of 300


def test_passages_are_decided_by_the_seed():
    def first(seed):
        return list(islice(pretraining.passages(encode, seed=seed), 20))

    assert first(5) == first(5)
    assert first(5) != first(6)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
def test_a_muon_step_is_that_of_torch(shape):
    """torch multiplies in bfloat16; ours the same way, and in float32 to a rounding of bfloat16."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.randn((3, *shape), generator=torch.Generator().manual_seed(1))
    reference = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Muon(
        [reference], lr=0.02, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    ours = {dtype: torch.nn.Parameter(start.clone()) for dtype in (torch.bfloat16, torch.float32)}
    momenta = {dtype: torch.zeros(shape) for dtype in ours}
    for gradient in gradients:
        reference.grad = gradient.clone()
        optimizer.step()
        for dtype, weight in ours.items():
            weight.grad = gradient.clone()
            pretraining.muon_step([weight], [momenta[dtype]], learning_rate=0.02, dtype=dtype)
    moved = (reference - start).norm()
    # bfloat16: no difference. float32: 1.0 to 1.3 % of the way measured, torch's own rounding.
    assert (ours[torch.bfloat16] - reference).norm() < 1e-6 * moved
    assert (ours[torch.float32] - reference).norm() < 0.05 * moved


N_WORDS, WIDTH = 50, 8


def small_model() -> MistralForCausalLM:
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=N_WORDS, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, initializer_range=0.5,
        )
    )  # fmt: skip


@pytest.mark.parametrize("n_occurring", [1, 20, N_WORDS])
def test_words_that_do_not_occur_count_in_the_loss_as_those_that_do(n_occurring):
    """Against the whole output layer, the rows of the others moved by one vector each."""
    model = small_model()
    text = torch.randperm(N_WORDS)[:n_occurring]
    is_other = torch.ones(N_WORDS, dtype=torch.bool)
    is_other[text] = False
    with torch.no_grad():
        model.lm_head.weight[is_other] = 0  # where they begin is left out: it is nearly nothing
    words = pretraining.OccurringWords(model, text)
    with torch.no_grad():
        words.head.normal_()
    hidden = torch.randn(7, WIDTH, requires_grad=True)
    targets = text[torch.randint(n_occurring, (7,))]
    loss = words.loss(hidden, targets, torch.float32)
    loss.backward()
    found = hidden.grad.clone(), words.head.grad[:-1], words.head.grad[-1]

    words.write_back()
    hidden.grad = None
    head = model.lm_head.weight
    whole = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    head.grad = None
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    expected = hidden.grad, head.grad[text.sort().values], head.grad[is_other].sum(0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_was_learned_of_the_words_stands_in_the_model_and_nothing_else_moved():
    model = small_model()
    before = model.model.embed_tokens.weight.detach().clone()
    text = torch.tensor([[3, 1], [4, 1]])
    words = pretraining.OccurringWords(model, text)
    torch.testing.assert_close(words.embed(text), before[text])
    with torch.no_grad():
        words.embeddings += 1
    words.write_back()
    after = model.model.embed_tokens.weight
    assert (after - before).abs().sum(1).nonzero().flatten().tolist() == [1, 3, 4]
    torch.testing.assert_close(after[text], words.embed(text))
