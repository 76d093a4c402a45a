from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.unit.train import jobs
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.callbacks import Progress
from workflow_scripts.train.lora import lora_config
from workflow_scripts.train.model import trainable_model

LENGTHS = [5, 30, 8, 19, 9, 2]
# Two rows with different numbers of supervised tokens (about 19 and 12).
ROWS = [[Piece(1, 0, 30), Piece(0, 0, 5)], [Piece(3, 0, 19), Piece(2, 0, 8), Piece(5, 0, 2)]]
RECIPE = RecipeSettings(rank=8, alpha=16, kv_rank="matched", evaluations=0, rows_per_step=1)


@pytest.fixture(scope="module")
def documents(random_documents, tmp_path_factory):
    return random_documents(tmp_path_factory.mktemp("tokens") / "train.arrow", LENGTHS)


@pytest.fixture
def trained(checkpoint, facts):
    """The model as it trains: NF4 base and adapter, with no matrix of the adapter zero."""
    model = trainable_model(checkpoint, facts, RECIPE)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.train()


@pytest.fixture
def reference(trained, checkpoint, facts):
    """The same adapter on float32 layers with the weights that bitsandbytes dequantizes, with eager
    attention: no NF4 kernel and no packing."""
    import bitsandbytes
    from peft import get_peft_model

    dense = load_model(
        checkpoint, window=facts.sliding_window, precision="float32", attention="eager"
    )
    dense = get_peft_model(dense, lora_config(RECIPE, facts))
    layers = dict(dense.named_modules())
    n_dequantized = 0
    with torch.no_grad():
        for name, layer in trained.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                weight = layer.weight
                layers[name].weight.copy_(
                    bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
                )
                n_dequantized += 1
        adapter = {n: p for n, p in trained.named_parameters() if p.requires_grad}
        for name, parameter in dense.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(adapter[name])
    assert n_dequantized == 14
    return dense


def loss_one_document_at_a_time(model, documents, rows=ROWS):
    """Loss summed over supervised tokens (except a document's first), and their number."""
    total, n_tokens = torch.zeros(()), 0
    for document in (documents[piece.document] for row in rows for piece in row):
        tokens = torch.tensor(document.input_ids.astype("int64"))
        wanted = torch.tensor(document.is_supervised)[1:]
        logits = model(tokens[None], use_cache=False).logits[0, :-1]
        total = total + cross_entropy(logits[wanted], tokens[1:][wanted], reduction="sum")
        n_tokens += int(wanted.sum())
    return total, n_tokens


def adapter_gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and len(found) == 28
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        # Measured 2e-6 of the largest entry.
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=2e-5 * float(gradient.abs().max()), msg=name
        )


def packed_loss(model, documents):
    return model(**Collator(documents, crosses_documents=False)(ROWS)).loss


def test_packed_gradients_equal_one_document_at_a_time(trained, reference, documents):
    loss = packed_loss(trained, documents)
    expected_loss, n_tokens = loss_one_document_at_a_time(reference, documents)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)  # measured below 1e-7
    assert_same_gradients(
        adapter_gradients(trained, loss / n_tokens),
        adapter_gradients(reference, expected_loss / n_tokens),
    )


def test_gradients_are_complete_after_an_evaluation(trained, reference, documents):
    """bitsandbytes 0.50 repacks NF4 layers at the first forward pass in eval mode (CPUs with
    AVX512-BF16), and no gradient passes a repacked layer."""
    trained.eval()
    with torch.no_grad():
        packed_loss(trained, documents)
    trained.train()
    loss = packed_loss(trained, documents)
    expected_loss, n_tokens = loss_one_document_at_a_time(reference, documents)
    assert_same_gradients(
        adapter_gradients(trained, loss / n_tokens),
        adapter_gradients(reference, expected_loss / n_tokens),
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)


@pytest.fixture
def trainer_of(plan_of, facts):
    def make(
        model, recipe, rows, train, validation, folder, *, strategy="best_fit",
        rows_per_micro_batch=1,
    ):  # fmt: skip
        plan = plan_of(rows, row_tokens=40, strategy=strategy)
        # Without a window validation pieces are whole documents; the model keeps its window.
        facts_of_job = facts.changed(**{"sliding_window": None})
        job = jobs.make_job(facts_of_job, plan, train, recipe, validation=validation)
        progress = Progress(tokens_per_step=40)
        options = {"rows_per_micro_batch": rows_per_micro_batch, "callbacks": [progress]}
        return jobs.trainer_of(model, job, folder, **options), progress

    return make


@pytest.mark.parametrize("rows_per_micro_batch", [1, 2], ids=["1 × 2", "2 × 1"])
def test_a_step_takes_the_mean_over_all_supervised_tokens_of_its_micro_batches(
    trainer_of, trained, reference, documents, tmp_path, rows_per_micro_batch
):
    recipe = RECIPE.model_copy(update={"rows_per_step": 2})
    expected_loss, n_tokens = loss_one_document_at_a_time(reference, documents)
    by_row = [loss_one_document_at_a_time(reference, documents, [row]) for row in ROWS]
    token_mean = expected_loss.item() / n_tokens
    mean_of_means = sum(loss.item() / n for loss, n in by_row) / 2
    assert abs(token_mean - mean_of_means) > 1e-3  # otherwise the test could not tell them apart
    gradients = adapter_gradients(reference, expected_loss / n_tokens)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))

    trainer, _ = trainer_of(
        trained, recipe, ROWS, documents, documents, tmp_path,
        rows_per_micro_batch=rows_per_micro_batch,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert trainer.state.global_step == 1
    assert logged["loss"] == pytest.approx(token_mean, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_step_moves_the_adapter_and_nothing_else(trainer_of, trained, documents, tmp_path):
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    trainer, _ = trainer_of(trained, RECIPE, ROWS, documents, documents, tmp_path)
    trainer.train()
    for name, parameter in trained.named_parameters():
        is_changed = not torch.equal(parameter.detach(), before[name])
        assert is_changed == ("lora_" in name), name


def test_validation_loss_is_the_mean_over_tokens_of_whole_documents(
    trainer_of, trained, reference, documents, random_documents, tmp_path
):
    validation = random_documents(tmp_path / "validation.arrow", [25, 4, 11, 7], seed=5)
    recipe = RECIPE.model_copy(update={"evaluations": 1})
    # The train plan crosses documents; validation never does.
    trainer, _ = trainer_of(
        trained, recipe, ROWS, documents, validation, tmp_path / "run", strategy="concatenate"
    )
    rows = [[Piece(number, 0, length)] for number, length in enumerate(validation.lengths)]
    with torch.no_grad():
        total, n_tokens = loss_one_document_at_a_time(reference, validation, rows)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(total.item() / n_tokens, rel=1e-5)
    assert trained.training


def test_every_step_is_timed_once_without_the_evaluation(trainer_of, trained, documents, tmp_path):
    recipe = RECIPE.model_copy(update={"epochs": 2.0, "evaluations": 4})
    trainer, throughput = trainer_of(trained, recipe, ROWS, documents, documents, tmp_path)
    trainer.train()
    assert list(throughput.seconds) == [1, 2, 3, 4]
    assert all(0 < seconds < 60 for seconds in throughput.seconds.values())
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [
        1,
        2,
        3,
        4,
    ]
