from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.unit.train.mixtral import N_EXPERTS, tiny_mixtral
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
    # Measured 3e-7, compared with sums in float64.
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
    # Both sides have the same bfloat16 logits and differ only in the order of the sum.
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    # One rounding to bfloat16 is 2⁻⁸ = 0.004; measured 0.004 of the largest entry.
    bound = 0.012 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_hidden_states_get_a_gradient_of_their_own_type_and_not_the_weights():
    hidden, weight, targets = example(5, weight_dtype=torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, targets)
    (found,) = torch.autograd.grad(loss, hidden)
    logits = (hidden.to(torch.bfloat16) @ weight.T).float()
    reference = cross_entropy(logits, targets, reduction="sum")
    assert found.dtype == torch.float32 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)


def test_the_chunk_changes_nothing():
    """With 131,072 vocabulary entries a chunk is 32 tokens: 33 tokens are two chunks, and equal the
    sum over single tokens."""
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


def test_the_loss_is_the_same_without_gradients():
    hidden, weight, targets = example(6)
    with torch.no_grad():
        found = summed_cross_entropy(hidden, weight, targets)
    assert torch.equal(found, summed_cross_entropy(hidden, weight, targets).detach())
    assert not found.requires_grad


@pytest.mark.parametrize("n_tokens", [1, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
@pytest.mark.parametrize("hidden_trains", [True, False])
def test_an_output_layer_that_trains_gets_the_gradient_of_cross_entropy(n_tokens, hidden_trains):
    hidden, weight, targets = example(n_tokens)
    hidden.requires_grad_(hidden_trains)
    wanted = [tensor for tensor in (hidden, weight.requires_grad_()) if tensor.requires_grad]
    found = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets) / 7, wanted)
    reference = cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    expected = torch.autograd.grad(reference / 7, wanted)
    for gradient, other in zip(found, expected, strict=True):
        # Measured 8e-6 of the largest entry.
        bound = 4e-5 * other.abs().max().item()
        torch.testing.assert_close(gradient, other, rtol=0, atol=bound)


def test_a_bfloat16_output_layer_sums_its_gradient_in_float32():
    """More than two chunks: a sum in bfloat16 would lose their contributions."""
    hidden, weight, targets = example(2 * CHUNK_TOKENS + 3, dtype=torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight.requires_grad_(), targets)
    (found,) = torch.autograd.grad(loss, weight)
    (expected,) = torch.autograd.grad(
        cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum"), weight
    )
    assert found.dtype == torch.bfloat16
    # Measured 0.004 of the largest entry: gradients of bfloat16 logits, rounded again at the end.
    bound = 0.012 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_autocast_decides_the_type_of_the_products_and_not_of_the_gradients():
    hidden, weight, targets = example(40, vocabulary=500)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_cross_entropy(hidden, weight, targets)
        logits = hidden @ weight.T
    found = torch.autograd.grad(loss, (hidden, weight))
    assert logits.dtype == torch.bfloat16
    expected = cross_entropy(logits.float(), targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]


def test_logits_of_the_whole_micro_batch_are_never_held(run_python):
    """Logits of 16,384 tokens × 32,768 vocabulary entries alone would take 2 GiB in float32."""
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


def test_the_models_forward_pass_returns_the_summed_loss_of_its_labels(model_and_batch):
    model, batch = model_and_batch
    logits = model(batch["input_ids"], use_cache=False).logits
    wanted = batch["labels"][0, 1:]
    expected = cross_entropy(logits[0, :-1], wanted, ignore_index=IGNORED, reduction="sum")
    sum_loss(model)
    found = model(**batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    assert found.logits is None


def test_without_labels_the_model_returns_logits_as_before(model_and_batch):
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


def test_given_predicting_positions_are_used(model_and_batch):
    model, batch = model_and_batch
    sum_loss(model)
    expected = model(**batch).loss
    positions = torch.tensor([at for at in range(29) if batch["labels"][0, at + 1] != IGNORED])
    assert torch.equal(model(**batch, predicting=positions).loss, expected)
    assert model(**batch, predicting=positions[:3]).loss < expected


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_output_layer_that_trains_gets_the_gradients_of_the_plain_model(
    make_checkpoint, tmp_path, model_and_batch, is_tied
):
    """If tied to the embeddings, it is one matrix that learns from both uses."""
    from workflow_scripts.models.checkpoint import load_model

    _, batch = model_and_batch
    folder = make_checkpoint(tmp_path / "model", dtype="float32", tie_word_embeddings=is_tied)
    model = load_model(folder, window=8, precision="float32")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    logits = model(batch["input_ids"], use_cache=False).logits[0, :-1]
    wanted = batch["labels"][0, 1:]
    cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum").backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum_loss(model)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        # Measured 3e-6 of the largest entry.
        bound = 2e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=bound, msg=name)


def test_the_copy_of_the_output_layer_that_peft_trains_is_the_one_used(model_and_batch):
    from peft import LoraConfig, get_peft_model

    model, batch = model_and_batch
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    logits = adapted(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1]
    wanted = batch["labels"][0, 1:]
    expected = cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    (of_copy,) = torch.autograd.grad(expected, model.lm_head.modules_to_save["default"].weight)
    sum_loss(model)
    loss = adapted(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    copy = model.lm_head.modules_to_save["default"].weight
    torch.testing.assert_close(copy.grad, of_copy, rtol=0, atol=2e-5 * float(of_copy.abs().max()))
    assert model.lm_head.original_module.weight.grad is None


@pytest.fixture
def mixture_and_batch():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 300, (1, 40), generator=generator)
    labels = tokens.where(torch.rand(1, 40, generator=generator) < 0.5, IGNORED)
    return tiny_mixtral().train(), {"input_ids": tokens, "labels": labels}


def imbalance(model, tokens):
    """Experts × Σ over experts of (its choices per token) × (its mean probability), all layers."""
    router_logits = torch.cat(
        model(tokens, use_cache=False, output_router_logits=True).router_logits
    )
    probabilities = router_logits.softmax(dim=-1)
    total = torch.zeros(())
    chosen = probabilities.argsort(dim=-1, descending=True)[:, :2]
    for expert in range(N_EXPERTS):
        share = (chosen == expert).any(dim=-1).double().mean()
        total = total + share * probabilities[:, expert].mean()
    return N_EXPERTS * total


def test_the_router_loss_counts_once_for_each_supervised_token(mixture_and_batch):
    model, batch = mixture_and_batch
    n_tokens = int((batch["labels"][0, 1:] != IGNORED).sum())
    of_imbalance = imbalance(model, batch["input_ids"])
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    expected_gradients = torch.autograd.grad(of_imbalance, gates)
    assert of_imbalance > 2  # if balanced, two experts per token give 2

    sum_loss(model)
    plain = model(**batch).loss
    plain_gradients = torch.autograd.grad(plain, gates)
    sum_loss(model, router_loss_coefficient=0.5)
    found = model(**batch).loss
    gradients = torch.autograd.grad(found, gates)
    added = (found - plain) / n_tokens
    # Measured 2e-6, as the difference of two losses of 200 nats.
    torch.testing.assert_close(added, 0.5 * of_imbalance.float(), rtol=2e-5, atol=0)
    for ours, without, of_gate in zip(gradients, plain_gradients, expected_gradients, strict=True):
        bound = 1e-4 * float(of_gate.abs().max())
        torch.testing.assert_close((ours - without) / n_tokens, 0.5 * of_gate, rtol=0, atol=bound)


def test_a_validation_loss_contains_no_router_loss(mixture_and_batch):
    model, batch = mixture_and_batch
    model.eval()
    sum_loss(model)
    expected = model(**batch).loss
    sum_loss(model, router_loss_coefficient=0.5)
    assert torch.equal(model(**batch).loss, expected)


def test_the_router_loss_works_with_activation_checkpointing(mixture_and_batch):
    """Router logits are recorded in layers that the backward pass recomputes."""
    model, batch = mixture_and_batch
    sum_loss(model, router_loss_coefficient=0.5)

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        bound = 1e-5 * float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=bound, msg=name)
