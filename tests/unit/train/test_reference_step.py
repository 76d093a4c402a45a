"""One QLoRA step through the product's trainer equals a step written out by hand.

The reference is plain PyTorch in float32: the base's files quantized and dequantized by
bitsandbytes, every layer in its formulas, one document at a time under a dense mask, clipping and
AdamW as in their papers. It uses no transformers, PEFT, packing or training code of the project.
"""

from __future__ import annotations

import json
import math
import re
from typing import NamedTuple

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file

from tests.unit.train.jobs import make_job, trainer_of
from tests.unit.train.one_step import Gradients
from workflow_scripts.packing.packing import Piece
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.model import trainable_model

LENGTHS = [30, 5, 19, 8, 9, 2, 40, 13]
# Four rows in two micro-batches; documents shorter and longer than the window of 8.
ROWS = [[0, 1], [2, 3, 5], [6], [7, 4]]
RECIPE = RecipeSettings(
    rank=8,
    alpha=16,
    kv_rank="matched",
    learning_rate=2e-4,
    schedule="constant",
    warmup_fraction=0,
    weight_decay=0.1,
    max_gradient_norm=0.05,
    rows_per_step=4,
    evaluations=0,
)
SCALE = 16 / 8  # for k and v too: alpha 4, rank 2


class Step(NamedTuple):
    """Weights and clipped gradients by `layers.<n>.<module>.<A or B>`."""

    before: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    loss: float
    gradient_norm: float


def by_short_name(tensors):
    short = re.compile(r".*(layers\..*)\.lora_([AB])\.default\.weight")
    return {short.sub(r"\1.\2", name): tensor.detach().clone() for name, tensor in tensors.items()}


def adapter_weights(model):
    return by_short_name({name: p for name, p in model.named_parameters() if p.requires_grad})


@pytest.fixture
def documents(random_documents, tmp_path):
    return random_documents(tmp_path / "train.arrow", LENGTHS)


@pytest.fixture
def product(checkpoint, facts, documents, plan_of, tmp_path):
    """`product(changed_facts={…}, **settings)`: the step of the product's trainer."""

    def step(*, changed_facts=(), **settings):
        recipe = RECIPE.model_copy(update=settings)
        model = trainable_model(checkpoint, facts.changed(**dict(changed_facts)), recipe)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        before = adapter_weights(model)
        rows = [[Piece(number, 0, LENGTHS[number]) for number in row] for row in ROWS]
        job = make_job(facts, plan_of(rows, row_tokens=40), documents, recipe)
        trainer = trainer_of(model, job, tmp_path / "run", rows_per_micro_batch=2)
        gradients = Gradients()
        trainer.add_callback(gradients)
        trainer.train()
        assert trainer.state.global_step == 1
        assert trainer.args.gradient_accumulation_steps == 2
        logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
        return Step(
            before,
            by_short_name(gradients.by_name),
            adapter_weights(model),
            logged["loss"],
            logged["grad_norm"],
        )

    return step


def nf4_base(checkpoint):
    """The file's tensors in float32, linear layers quantized to NF4 and dequantized."""
    base = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        weight = weight.float()
        if "_proj" in name:
            packed, state = bitsandbytes.functional.quantize_4bit(
                weight, compress_statistics=True, quant_type="nf4"
            )
            weight = bitsandbytes.functional.dequantize_4bit(packed, state)
        base[name.removeprefix("model.").removesuffix(".weight")] = weight
    return base


def rms_norm(hidden, weight, epsilon):
    """arXiv:1910.07467."""
    return weight * hidden / (hidden.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()


def rotated(heads, theta):
    """(heads, tokens, head_dim); arXiv:2104.09864. The numbers of a pair (x, y) are half the width
    apart; the pair is rotated by an angle that depends on token and pair."""
    half = heads.shape[-1] // 2
    speeds = theta ** (-torch.arange(half) / half)
    angles = torch.arange(heads.shape[1])[:, None] * speeds
    x, y = heads[..., :half], heads[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


def document_logits(tokens, base, adapter, config):
    """Logits of one document alone, (tokens, vocabulary)."""
    n_heads, n_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config["hidden_size"] // n_heads
    back = torch.arange(len(tokens))[:, None] - torch.arange(len(tokens))
    is_visible = (back >= 0) & (back < config["sliding_window"])

    def linear(name, x):
        delta = adapter[f"{name}.B"] @ (adapter[f"{name}.A"] @ x.T)
        return x @ base[name].T + SCALE * delta.T

    def heads(x, n):
        return x.reshape(len(tokens), n, head_dim).transpose(0, 1)

    hidden = base["embed_tokens"][tokens]
    for layer in (f"layers.{at}" for at in range(config["num_hidden_layers"])):
        x = rms_norm(hidden, base[f"{layer}.input_layernorm"], config["rms_norm_eps"])
        q, k, v = (
            heads(linear(f"{layer}.self_attn.{part}_proj", x), n)
            for part, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))
        )
        theta = config["rope_parameters"]["rope_theta"]
        q, k = rotated(q, theta), rotated(k, theta)
        outputs = []
        for head in range(n_heads):
            shared = head * n_kv_heads // n_heads
            scores = q[head] @ k[shared].T / math.sqrt(head_dim)
            weights = scores.where(is_visible, -torch.inf).softmax(dim=-1)
            outputs.append(weights @ v[shared])
        hidden = hidden + linear(f"{layer}.self_attn.o_proj", torch.cat(outputs, dim=-1))
        x = rms_norm(hidden, base[f"{layer}.post_attention_layernorm"], config["rms_norm_eps"])
        gate, up = (linear(f"{layer}.mlp.{part}_proj", x) for part in ("gate", "up"))
        hidden = hidden + linear(f"{layer}.mlp.down_proj", gate * gate.sigmoid() * up)
    return rms_norm(hidden, base["norm"], config["rms_norm_eps"]) @ base["lm_head"].T


def reference_step(checkpoint, documents, before):
    config = json.loads((checkpoint / "config.json").read_text())
    base = nf4_base(checkpoint)
    adapter = {name: weight.clone().requires_grad_() for name, weight in before.items()}
    nats, n_supervised = torch.zeros(()), 0
    for number in range(len(LENGTHS)):
        document = documents[number]
        tokens = torch.tensor(document.input_ids.tolist())
        log_probabilities = document_logits(tokens, base, adapter, config).log_softmax(dim=-1)
        for at in range(1, len(tokens)):
            if document.is_supervised[at]:
                nats = nats - log_probabilities[at - 1, tokens[at]]
                n_supervised += 1
    loss = nats / n_supervised
    loss.backward()
    norm = math.sqrt(sum(float(w.grad.double().square().sum()) for w in adapter.values()))
    assert norm > 2 * RECIPE.max_gradient_norm  # gradients are clipped
    gradients, after = {}, {}
    for name, weight in adapter.items():
        gradient = weight.grad * RECIPE.max_gradient_norm / norm
        # arXiv:1711.05101, algorithm 2, the first step.
        first = (1 - 0.9) * gradient / (1 - 0.9)
        second = (1 - 0.999) * gradient.square() / (1 - 0.999)
        step = first / (second.sqrt() + 1e-8) + RECIPE.weight_decay * weight.detach()
        gradients[name] = gradient
        after[name] = weight.detach() - RECIPE.learning_rate * step
    return Step(before, gradients, after, loss.item(), norm)


class Difference(NamedTuple):
    loss: float
    """Nats."""
    gradient_norm: float
    """Relative."""
    gradients: float
    """Relative to the largest entry of the matrix; the worst matrix."""
    weights: float
    """The worst weight."""
    way: float
    """Relative to how far the matrix moved in the step; the worst matrix."""


# Measured 1.4e-6, 6e-8, 1.7e-6, 4.2e-6, 4.6e-4. AdamW's first step is the gradient's sign, which
# rounding decides if the gradient is tiny; so the last bound is wider.
TOLERANCE = Difference(loss=1e-5, gradient_norm=1e-5, gradients=1e-5, weights=1e-5, way=2e-3)


def difference(found, expected):
    assert found.after.keys() == found.gradients.keys() == expected.after.keys()
    assert len(expected.after) == 28

    def worst(measure):
        return max(float(measure(name)) for name in expected.after)

    return Difference(
        loss=abs(found.loss - expected.loss),
        gradient_norm=abs(found.gradient_norm / expected.gradient_norm - 1),
        gradients=worst(
            lambda name: (
                (found.gradients[name] - expected.gradients[name]).abs().max()
                / expected.gradients[name].abs().max()
            )
        ),
        weights=worst(lambda name: (found.after[name] - expected.after[name]).abs().max()),
        way=worst(
            lambda name: (
                (found.after[name] - expected.after[name]).norm()
                / (expected.after[name] - expected.before[name]).norm()
            )
        ),
    )


def is_same(measured):
    return all(value <= most for value, most in zip(measured, TOLERANCE, strict=True))


def test_one_qlora_step_equals_the_step_written_by_hand(product, checkpoint, documents):
    found = product()
    measured = difference(found, reference_step(checkpoint, documents, found.before))
    assert is_same(measured), measured


@pytest.mark.parametrize(
    ("settings", "seen_in"),
    [
        ({"alpha": 16.1}, "gradients"),
        ({"rslora": True}, "loss"),
        ({"method": "lora"}, "loss"),
        ({"method": "lora_int8"}, "loss"),
        ({"changed_facts": {"sliding_window": 9}}, "loss"),
        ({"max_gradient_norm": 0.1}, "gradients"),
        ({"weight_decay": 0.0}, "way"),
        ({"learning_rate": 1.9e-4}, "way"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_the_comparison_detects_another_step(product, checkpoint, documents, settings, seen_in):
    found = product(**settings)
    measured = difference(found, reference_step(checkpoint, documents, found.before))
    assert getattr(measured, seen_in) > 2 * getattr(TOLERANCE, seen_in), measured
