"""Training as it runs on a GPU: 16-bit arithmetic, kernels, memory, and no waiting for the CPU.

Tests that can run on the CPU do so under bfloat16 autocast. Tolerances for the GPU are expectations
from bfloat16's 8 bits; none has been measured on a GPU yet.
"""

from __future__ import annotations

import importlib.util
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.facts import facts_of
from tests.unit.train.shapes import setup_of
from workflow_scripts import files
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.tokens.documents import Documents, documents_schema
from workflow_scripts.train import attention, optimization
from workflow_scripts.train.activations import save_less
from workflow_scripts.train.batches import Collator
from workflow_scripts.train.kernels import use_liger
from workflow_scripts.train.memory.prediction import predict
from workflow_scripts.train.memory.shape import PlannedRun
from workflow_scripts.train.model import adapt

LENGTHS = [140, 50, 90, 200, 70, 30]
WINDOW = 64
N_LAYERS = 4
RECIPE = RecipeSettings(rank=8, alpha=16)
GB = 10**9
LAYOUTS = {
    "half": {"n_checkpointed_layers": N_LAYERS // 2},
    "all": {"n_checkpointed_layers": N_LAYERS},
    "offloaded": {"n_checkpointed_layers": N_LAYERS, "offloads": True},
}


def documents_of(path, lengths, *, vocabulary):
    generator = np.random.default_rng(0)
    rows = [
        {
            "id": f"chat/{number}",
            "input_ids": generator.integers(3, vocabulary, size=length).tolist(),
            "supervised_spans": [length // 2, length],
            "n_tokens": length,
            "n_supervised_tokens": length - length // 2,
            "n_copies": 1,
        }
        for number, length in enumerate(lengths)
    ]
    files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
    return Documents(path)


def row_of(documents, device):
    """All documents in one row, on the device."""
    pieces = [Piece(number, 0, int(length)) for number, length in enumerate(documents.lengths)]
    batch = Collator(documents, crosses_documents=False)([pieces])
    return {
        name: part.to(device) if isinstance(part, torch.Tensor) else part
        for name, part in batch.items()
    }


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return documents_of(tmp_path_factory.mktemp("tokens") / "t.arrow", LENGTHS, vocabulary=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_hidden_layers=N_LAYERS,
        sliding_window=WINDOW,
        initializer_range=0.06,
    )
    MistralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def model_of(checkpoint, device, *, has_liger=False):
    """A model in NF4, its adapter without zero matrices; the same values on every device."""
    base = load_model(
        checkpoint,
        window=WINDOW,
        precision="nf4",
        attention=attention.register(),
        device=device,
    )
    if has_liger:
        use_liger(base)
    model = adapt(base, facts_of(checkpoint), RECIPE).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def autocast(device):
    return torch.autocast(device, dtype=torch.bfloat16)


def loss_and_gradients(model, batch, context):
    """Loss per supervised token, and the adapter's gradients by name, in float32 on the CPU."""
    with context:
        loss = model(**batch).loss / len(batch["predicting"])
    loss.backward()
    gradients = {
        name: parameter.grad.float().cpu()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), gradients


def norm_of(gradients):
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def difference(found, expected):
    """Norm of the difference of all gradients ÷ norm of the expected ones."""
    rest = {name: found[name] - gradient for name, gradient in expected.items()}
    return norm_of(rest) / norm_of(expected)


@pytest.fixture(scope="module")
def reference(checkpoint, documents):
    """In float32, on the CPU."""
    model = model_of(checkpoint, "cpu")
    return loss_and_gradients(model, row_of(documents, "cpu"), nullcontext())


def test_a_step_in_bfloat16_equals_the_float32_step_up_to_rounding(
    device, checkpoint, documents, reference
):
    found = loss_and_gradients(
        model_of(checkpoint, device), row_of(documents, device), autocast(device)
    )
    # Measured under autocast on a CPU: loss 2.3e-4, norm 3.4e-5, gradients 2.2e-2. On a GPU base
    # and norms are bfloat16 too: more is expected, and not measured yet.
    assert found[0] == pytest.approx(reference[0], rel=2e-3)
    assert norm_of(found[1]) == pytest.approx(norm_of(reference[1]), rel=2e-2)
    assert difference(found[1], reference[1]) < 0.1


def test_every_matrix_of_the_adapter_gets_a_gradient(device, checkpoint, documents):
    model = model_of(checkpoint, device)
    _, gradients = loss_and_gradients(model, row_of(documents, device), autocast(device))
    assert len(gradients) == N_LAYERS * 7 * 2
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeping_less_does_not_change_the_result(device, checkpoint, documents, layout):
    batch = row_of(documents, device)
    expected = loss_and_gradients(model_of(checkpoint, device), batch, autocast(device))
    model = model_of(checkpoint, device)
    save_less(model, **LAYOUTS[layout])
    found = loss_and_gradients(model, batch, autocast(device))
    assert found[0] == expected[0]
    # Bit-identical on a CPU. Attention on a GPU sums in a different order each time: expected
    # within bfloat16's rounding, not measured yet.
    assert difference(found[1], expected[1]) <= (0 if device == "cpu" else 0.01)


def test_less_is_kept_with_every_layout(cuda, checkpoint, tmp_path):
    # Long enough that activations are most of the memory.
    long = documents_of(tmp_path / "t.arrow", [4_000] * 4, vocabulary=512)
    batch = row_of(long, cuda)
    peaks = []
    for layout in ({"n_checkpointed_layers": 0}, *LAYOUTS.values()):
        model = model_of(checkpoint, cuda)
        save_less(model, **layout)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss_and_gradients(model, batch, autocast(cuda))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert all(after < before for before, after in zip(peaks, peaks[1:], strict=False)), peaks


def test_ligers_kernels_equal_pytorchs_up_to_rounding(cuda, checkpoint, documents):
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed")
    batch = row_of(documents, cuda)
    expected = loss_and_gradients(model_of(checkpoint, cuda), batch, autocast(cuda))
    model = model_of(checkpoint, cuda, has_liger=True)
    found = loss_and_gradients(model, batch, autocast(cuda))
    # Expected for bfloat16, not measured yet.
    assert found[0] == pytest.approx(expected[0], rel=2e-3)
    assert difference(found[1], expected[1]) < 0.05


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_a_micro_batch_never_waits_for_the_gpu(cuda, checkpoint, documents, layout):
    batch = row_of(documents, cuda)
    model = model_of(checkpoint, cuda)
    save_less(model, **(LAYOUTS[layout] if layout else {"n_checkpointed_layers": 0}))
    for mode in ("default", "error"):  # the first warms up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with autocast(cuda):
                loss = model(**batch).loss / len(batch["predicting"])
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adamw_paged_8bit", "adafactor"])
def test_every_optimizer_takes_a_step_along_the_gradient(device, checkpoint, documents, name):
    model = model_of(checkpoint, device)
    recipe = RECIPE.model_copy(update={"optimizer": name, "learning_rate": 1e-3})
    optimizer = optimization.optimizer(model, recipe)
    batch = row_of(documents, device)
    first, _ = loss_and_gradients(model, batch, autocast(device))
    optimizer.step()
    optimizer.zero_grad()
    second, _ = loss_and_gradients(model, batch, autocast(device))
    assert second < first


def peak_of_a_7b(cuda, folder, *, row_tokens, setup):
    """Peak bytes of two steps of QLoRA at rank 32 on one row, by the allocator's count."""
    from tests.benchmarks.model_shapes import CONFIGS, shape_of
    from tests.benchmarks.random_models import random_base
    from workflow_scripts.train.kernels import liger_runs

    config = CONFIGS["mistral-7b"]
    documents = documents_of(
        folder / "t.arrow", [row_tokens // 8] * 8, vocabulary=config["vocab_size"]
    )
    base = random_base(config, attention=attention.register(), seed=0)
    if liger_runs("auto"):
        use_liger(base)
    model = adapt(base, shape_of(config), RECIPE_OF_7B).train()
    save_less(
        model,
        n_checkpointed_layers=setup.n_checkpointed_layers,
        offloads=setup.offloads_activations,
    )
    optimizer = optimization.optimizer(model, RECIPE_OF_7B)
    batch = row_of(documents, cuda)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second starts with the optimizer's state
        _, gradients = loss_and_gradients(model, batch, autocast(cuda))
        optimizer.step()
        optimizer.zero_grad()
    assert norm_of(gradients) > 0
    return torch.cuda.max_memory_allocated()


RECIPE_OF_7B = RecipeSettings(rank=32, alpha=64, evaluations=0)


@pytest.mark.parametrize(
    ("row_tokens", "offloads", "limit"), [(4_096, False, 8 * GB), (32_768, True, 16 * GB)]
)
def test_a_row_of_mistral_7b_fits(cuda, tmp_path, row_tokens, offloads, limit):
    """With every layer checkpointed."""
    if torch.cuda.mem_get_info()[0] < limit + 4 * GB:
        pytest.skip("not enough free memory on this GPU")
    setup = setup_of(1, 32, offloads)
    assert peak_of_a_7b(cuda, tmp_path, row_tokens=row_tokens, setup=setup) <= limit


@pytest.mark.parametrize(
    ("row_tokens", "n_checkpointed_layers", "offloads"),
    [
        (4_096, 0, False),
        (4_096, 32, False),
        (8_192, 16, False),
        (8_192, 32, False),
        (32_768, 32, False),
        (32_768, 32, True),
    ],
)
def test_the_memory_of_a_7b_is_predicted_within_a_tenth(
    cuda, tmp_path, row_tokens, n_checkpointed_layers, offloads
):
    from tests.benchmarks.model_shapes import CONFIGS, shape_of

    setup = setup_of(1, n_checkpointed_layers, offloads)
    run = PlannedRun(
        shape_of(CONFIGS["mistral-7b"]),
        RECIPE_OF_7B,
        TrainingSettings(),
        row_tokens=row_tokens,
        device_type="cuda",
    )
    predicted = predict(run, setup).peak
    if torch.cuda.mem_get_info()[0] < 1.2 * predicted:
        pytest.skip("not enough free memory on this GPU")
    found = peak_of_a_7b(cuda, tmp_path, row_tokens=row_tokens, setup=setup)
    assert predicted == pytest.approx(found, rel=0.1)
