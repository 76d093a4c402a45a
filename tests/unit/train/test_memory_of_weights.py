"""Bytes of the base, of what trains and of the optimizer: predicted exactly."""

from __future__ import annotations

import pytest
import torch

from tests.facts import facts_of
from tests.unit.train.counted_memory import model_of
from tests.unit.train.mixtral import save_mixtral
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.experts import Nf4Tensor
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train import optimization
from workflow_scripts.train.memory import prediction
from workflow_scripts.train.memory.shape import PlannedRun


def own_bytes(model):
    """Bytes of the frozen base: parameters and quantization states."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "original_module" in name:
            continue
        if isinstance(parameter, Nf4Tensor):
            total += parameter.packed.nbytes + state_bytes(parameter.state)
        else:
            total += parameter.nbytes + state_bytes(getattr(parameter, "quant_state", None))
            total += getattr(getattr(parameter, "SCB", None), "nbytes", 0)
    return total


def state_bytes(state):
    if state is None:
        return 0
    parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return sum(part.nbytes for part in parts)


def cpu_shape(facts, recipe):
    return PlannedRun(facts, recipe, TrainingSettings(), row_tokens=1, device_type="cpu").shape


@pytest.mark.parametrize("ties", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", ["qlora", "lora_int8", "lora", "full"])
def test_the_base_takes_the_bytes_predicted(method, ties, make_checkpoint, tmp_path):
    folder = make_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=ties)
    precision = {"qlora": "nf4", "lora_int8": "int8"}.get(method, "float32")
    base = load_model(folder, window=8, precision=precision, device="cpu")
    base.requires_grad_(False)
    predicted = prediction.base_weight_bytes(
        cpu_shape(facts_of(folder), RecipeSettings(method=method))
    )
    assert own_bytes(base) == predicted


def test_a_mixtures_experts_in_nf4_take_the_bytes_predicted(tmp_path):
    folder = save_mixtral(tmp_path / "checkpoint")
    base = load_model(folder, window=None, precision="nf4", device="cpu")
    base.requires_grad_(False)
    assert own_bytes(base) == prediction.base_weight_bytes(
        cpu_shape(facts_of(folder), RecipeSettings())
    )


TRAINED = {
    "plain": {},
    "matched": {"rank": 16, "kv_rank": "matched"},
    "DoRA": {"dora": True},
    "output layer": {"modules_to_save": ["lm_head"]},
    "full": {"method": "full"},
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "adafactor"])
def test_the_optimizer_keeps_the_bytes_predicted(kind, name, checkpoint, facts):
    recipe = RecipeSettings(optimizer=kind, **TRAINED[name])
    precision = "float32" if recipe.method == "full" else "nf4"
    model = model_of(checkpoint, facts, recipe, precision=precision)
    optimizer = optimization.optimizer(model, recipe)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shape = cpu_shape(facts, recipe)
    assert shape.n_trained == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    kept = [
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in ("step", "qmap1", "qmap2")
    ]
    # Adafactor's state holds only these tensors; AdamW also has a step counter.
    assert sum(kept) == prediction.optimizer_bytes(shape)
