from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from workflow_scripts.train.batches import IGNORED
from workflow_scripts.train.loss import CHUNK_ELEMENTS, sum_loss, summed_cross_entropy

VOCABULARY = 32_768
CHUNK_TOKENS = CHUNK_ELEMENTS // VOCABULARY
HIDDEN = 16


def example(n_tokens, *, vocabulary=VOCABULARY, dtype=torch.float32, weight_dtype=None):
    generator = torch.Generator().manual_seed(n_tokens)
    hidden = torch.randn(n_tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, HIDDEN, generator=generator).to(weight_dtype or dtype)
    targets = torch.randint(vocabulary, (n_tokens,), generator=generator)
    return hidden, weight, targets


@pytest.mark.parametrize(
    "n_tokens", [1, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 3]
)
def test_loss_and_gradient_equal_cross_entropy_in_float32(n_tokens):
    hidden, weight, targets = example(n_tokens)
    loss = summed_cross_entropy(hidden, weight, targets)
    (found,) = torch.autograd.grad(loss / 7, hidden)
    reference = cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(reference / 7, hidden)
    assert loss.dtype == torch.float32
    # Measured 3e-7, against sums in float64.
    torch.testing.assert_close(loss.double(), reference, rtol=3e-6, atol=0)
    # Measured 8e-6 of the largest entry.
    bound = 4e-5 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("n_tokens", [1, CHUNK_TOKENS, CHUNK_TOKENS + 1])
def test_loss_and_gradient_equal_cross_entropy_in_bfloat16(n_tokens):
    hidden, weight, targets = example(n_tokens, dtype=torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, targets)
    (found,) = torch.autograd.grad(loss, hidden)
    reference = cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
    (expected,) = torch.autograd.grad(reference, hidden)
    assert found.dtype == torch.bfloat16
    # The same bfloat16 logits on both sides: only the sum's order differs.
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    # One rounding to bfloat16 is 2⁻⁸ = 0.004; measured 0.004 of the largest entry.
    bound = 0.012 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_hidden_states_of_another_type_than_the_weight_get_a_gradient_of_their_own_type():
    hidden, weight, targets = example(5, weight_dtype=torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, targets)
    (found,) = torch.autograd.grad(loss, hidden)
    logits = (hidden.to(torch.bfloat16) @ weight.T).float()
    reference = cross_entropy(logits, targets, reduction="sum")
    assert found.dtype == torch.float32 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)


def test_the_chunk_changes_nothing():
    """131,072 words make chunks of 32 tokens: 33 tokens are two, and equal 33 times one."""
    hidden, weight, targets = example(33, vocabulary=131_072)
    whole = summed_cross_entropy(hidden, weight, targets)
    parts = [
        summed_cross_entropy(hidden[at : at + 1], weight, targets[at : at + 1]) for at in range(33)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-6, atol=0)


def test_a_micro_batch_without_supervised_tokens_has_no_loss_and_a_zero_gradient():
    hidden, weight, targets = example(4)
    loss = summed_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_without_a_gradient_to_make_the_loss_is_the_same():
    hidden, weight, targets = example(6)
    with torch.no_grad():
        found = summed_cross_entropy(hidden, weight, targets)
    assert torch.equal(found, summed_cross_entropy(hidden, weight, targets).detach())
    assert not found.requires_grad


def test_an_output_layer_that_trains_is_refused():
    hidden, weight, targets = example(3, vocabulary=10)
    with pytest.raises(ValueError, match="output layer trains"):
        summed_cross_entropy(hidden, weight.requires_grad_(), targets)


def test_logits_of_the_whole_micro_batch_are_never_held(run_python):
    """16,384 tokens × 32,768 words would be 2 GiB in float32 for the logits alone."""
    done = run_python(
        "import resource, torch\n"
        "from workflow_scripts.train.loss import summed_cross_entropy\n"
        "hidden = torch.zeros(16_384, 8, requires_grad=True)\n"
        "weight, targets = torch.zeros(32_768, 8), torch.zeros(16_384, dtype=torch.int64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "summed_cross_entropy(hidden, weight, targets).backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 256  # MiB


@pytest.fixture
def model_and_batch(checkpoint):
    from workflow_scripts.models.checkpoint import load_model

    model = load_model(checkpoint, window=8, precision="float32").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (1, 30), generator=generator)
    labels = tokens.where(torch.rand(1, 30, generator=generator) < 0.5, IGNORED)
    assert 5 < (labels[0, 1:] != IGNORED).sum() < 25
    return model, {"input_ids": tokens, "labels": labels}


def test_the_models_forward_pass_sums_the_loss_of_its_labels(model_and_batch):
    model, batch = model_and_batch
    logits = model(batch["input_ids"], use_cache=False).logits
    wanted = batch["labels"][0, 1:]
    expected = cross_entropy(logits[0, :-1], wanted, ignore_index=IGNORED, reduction="sum")
    sum_loss(model)
    found = model(**batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    assert found.logits is None


def test_without_labels_the_model_gives_logits_as_before(model_and_batch):
    model, batch = model_and_batch
    expected = model(batch["input_ids"], use_cache=False).logits
    sum_loss(model)
    assert torch.equal(model(batch["input_ids"], use_cache=False).logits, expected)


def test_a_batch_without_a_label_has_no_loss_and_gradients_of_zero(model_and_batch):
    model, batch = model_and_batch
    embedded = model.get_input_embeddings().weight.requires_grad_()
    sum_loss(model)
    loss = model(batch["input_ids"], labels=torch.full_like(batch["labels"], IGNORED)).loss
    assert loss == 0
    loss.backward()
    assert torch.equal(embedded.grad, torch.zeros_like(embedded))
