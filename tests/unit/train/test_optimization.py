from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st

from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.model import adapt
from workflow_scripts.train.optimization import (
    optimizer,
    parameter_groups,
    rate_share,
    scheduler,
)

OPTIMIZERS = ["adamw", "adamw_8bit", "adamw_paged_8bit", "adafactor"]


@pytest.fixture
def adapted(checkpoint, facts):
    def make(**settings):
        recipe = RecipeSettings(method="lora", rank=8, **settings)
        base = load_model(checkpoint, window=8, precision="float32")
        return adapt(base, facts, recipe), recipe

    return make


def options_by_name(model, recipe):
    """(learning rate, weight decay) of every parameter that trains, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, recipe):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


def test_the_groups_hold_exactly_the_weights_that_train_each_once(adapted):
    model, recipe = adapted(dora=True, loraplus_ratio=16, weight_decay=0.1)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert options_by_name(model, recipe).keys() == trains and len(trains) == 3 * 14


def test_lora_plus_learns_b_and_magnitudes_faster_and_vectors_do_not_decay(adapted):
    model, recipe = adapted(
        dora=True,
        loraplus_ratio=16,
        weight_decay=0.1,
        learning_rate=2e-4,
        modules_to_save=["lm_head"],
    )
    for name, found in options_by_name(model, recipe).items():
        expected = {
            "lora_A": (2e-4, 0.1),
            "lora_B": (32e-4, 0.1),
            "lora_magnitude_vector": (32e-4, 0.0),
            "lm_head": (2e-4, 0.1),
        }[
            next(
                part for part in ("lora_A", "lora_B", "lora_mag", "lm_head") if part in name
            ).replace("lora_mag", "lora_magnitude_vector")
        ]
        assert found == pytest.approx(expected, rel=1e-12), name


def test_without_lora_plus_all_matrices_have_one_rate(adapted):
    model, recipe = adapted(weight_decay=0.1)
    assert [len(group["params"]) for group in parameter_groups(model, recipe)] == [28]


def test_norms_do_not_decay_in_a_full_fine_tune(checkpoint, facts):
    recipe = RecipeSettings(method="full", weight_decay=0.1)
    base = load_model(checkpoint, window=8, precision="float32")
    for name, (_, decay) in options_by_name(adapt(base, facts, recipe), recipe).items():
        assert decay == (0.0 if "norm" in name else 0.1), name


def test_a_model_without_anything_to_train_is_refused():
    with pytest.raises(StageError, match="no weight that trains"):
        optimizer(torch.nn.Linear(2, 2).requires_grad_(False), RecipeSettings())


def weights_and_gradients(n_steps, *, shape=(64, 96)):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    return weight, [torch.randn(shape, generator=generator) for _ in range(n_steps)]


class Matrix(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())


def stepped(recipe, weight, gradients):
    model = Matrix(weight)
    stepper = optimizer(model, recipe)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        stepper.step()
    return model.weight.detach(), stepper


def adamw_by_hand(recipe, weight, gradients):
    """arXiv:1711.05101, algorithm 2, in float64."""
    weight, first, second = weight.double(), 0.0, 0.0
    for at, gradient in enumerate(gradients, start=1):
        gradient = gradient.double()
        first = 0.9 * first + 0.1 * gradient
        second = recipe.adam_beta2 * second + (1 - recipe.adam_beta2) * gradient**2
        step = first / (1 - 0.9**at) / ((second / (1 - recipe.adam_beta2**at)).sqrt() + 1e-8)
        weight = weight - recipe.learning_rate * (step + recipe.weight_decay * weight)
    return weight


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Relative to the distance moved; measured 4e-6, with 8-bit states 0.05.
    [("adamw", 2e-5), ("adamw_8bit", 0.1), ("adamw_paged_8bit", 0.1)],
)
def test_adamw_follows_the_paper_whatever_holds_its_state(name, tolerance):
    recipe = RecipeSettings(optimizer=name, learning_rate=0.01, adam_beta2=0.95, weight_decay=0.1)
    weight, gradients = weights_and_gradients(5)
    found, stepper = stepped(recipe, weight, gradients)
    expected = adamw_by_hand(recipe, weight, gradients)
    difference = (found.double() - expected).norm() / (expected - weight.double()).norm()
    assert difference < tolerance
    (state,) = stepper.state.values()
    if name != "adamw":
        assert state["state1"].dtype == state["state2"].dtype == torch.uint8


def test_adafactor_begins_at_the_recipes_rate_on_a_zero_matrix():
    """As LoRA's B: an update scaled by the matrix's values would be 1000 times smaller."""
    recipe = RecipeSettings(optimizer="adafactor", learning_rate=0.01)
    weight, gradients = weights_and_gradients(1)
    found, stepper = stepped(recipe, torch.zeros_like(weight), gradients)
    assert 0.005 < found.abs().mean() < 0.02
    (state,) = stepper.state.values()
    assert state["exp_avg_sq_row"].shape == (64,) and state["exp_avg_sq_col"].shape == (96,)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_and_schedule_loaded_from_a_file_continue_where_they_were(name, tmp_path):
    """Saved and loaded as in transformers' Trainer: state dicts, weights only."""
    recipe = RecipeSettings(optimizer=name, schedule="wsd", warmup_fraction=0.3, weight_decay=0.1)
    weight, gradients = weights_and_gradients(6)

    def run(model, stepper, rates, some):
        for gradient in some:
            model.weight.grad = gradient.clone()
            stepper.step()
            rates.step()

    def fresh(weight):
        model = Matrix(weight)
        stepper = optimizer(model, recipe)
        return model, stepper, scheduler(stepper, recipe, 6)

    whole = fresh(weight)
    run(*whole, gradients)
    first = fresh(weight)
    run(*first, gradients[:3])
    for part, path in zip(first[1:], ("optimizer.pt", "scheduler.pt"), strict=True):
        torch.save(part.state_dict(), tmp_path / path)
    second = fresh(first[0].weight.detach())
    for part, path in zip(second[1:], ("optimizer.pt", "scheduler.pt"), strict=True):
        part.load_state_dict(torch.load(tmp_path / path, weights_only=True))
    run(*second, gradients[3:])
    assert torch.equal(second[0].weight, whole[0].weight)
    assert second[2].get_last_lr() == whole[2].get_last_lr()


def rate_by_corners(step, schedule, n_steps, n_warmup, n_decay):
    """The schedule written as corners joined by lines, the cosine as half a period."""
    if step <= n_warmup and n_warmup:
        return step / n_warmup
    if schedule == "cosine":
        turn = math.pi * (step - n_warmup) / (n_steps - n_warmup)
        return math.cos(turn / 2) ** 2
    corners = {
        "constant": [(n_warmup, 1.0), (n_steps, 1.0)],
        "linear": [(n_warmup, 1.0), (n_steps, 0.0)],
        "wsd": [(n_warmup, 1.0), (n_steps - n_decay, 1.0), (n_steps, 0.0 if n_decay else 1.0)],
    }[schedule]
    for (start, above), (end, below) in zip(corners, corners[1:], strict=False):
        if start <= step <= end and start < end:
            return above + (below - above) * (step - start) / (end - start)
    raise AssertionError(step)


@given(
    schedule=st.sampled_from(["cosine", "linear", "constant", "wsd"]),
    n_steps=st.integers(1, 400),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_the_rate_of_every_step_follows_the_schedule(schedule, n_steps, warmup, decay):
    n_warmup = round(n_steps * warmup)
    n_decay = round(n_steps * decay * (1 - warmup))
    if n_warmup + n_decay > n_steps:  # both were rounded up
        n_decay -= 1
    shape = {"n_steps": n_steps, "n_warmup": n_warmup, "n_decay": n_decay}
    for step in range(n_steps):
        found = rate_share(step, schedule=schedule, **shape)
        assert found == pytest.approx(rate_by_corners(step, schedule, **shape), rel=1e-9, abs=1e-12)


def test_each_group_follows_the_schedule_from_its_own_rate(adapted):
    model, recipe = adapted(
        loraplus_ratio=4, learning_rate=1e-3, schedule="wsd", warmup_fraction=0.2,
        decay_fraction=0.4,
    )  # fmt: skip
    stepper = optimizer(model, recipe)
    rates = scheduler(stepper, recipe, 10)
    found = []
    for _ in range(10):
        found.append([group["lr"] for group in stepper.param_groups])
        stepper.step()
        rates.step()
    shares = [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    for rate, share in zip(found, shares, strict=True):
        assert rate == pytest.approx([share * 1e-3, share * 4e-3])


def test_a_schedule_can_be_copied_with_its_optimizer(adapted):
    model, recipe = adapted()
    copy.deepcopy(scheduler(optimizer(model, recipe), recipe, 3).state_dict())
