"""Adapters of every kind that training makes, with no matrix of them zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.train.mixtral import tiny_mixtral
from workflow_scripts import files
from workflow_scripts.models.checkpoint import load_model, read_facts
from workflow_scripts.settings import RecipeSettings


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory) -> Path:
    """A two-layer Mixtral of four experts, random bfloat16 weights."""
    import torch

    folder = tmp_path_factory.mktemp("mixtral")
    tiny_mixtral(sliding_window=None).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(make_checkpoint, tmp_path_factory) -> Path:
    """A Mistral whose embeddings are its output layer."""
    return make_checkpoint(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def train(tmp_path_factory) -> Callable[..., Path]:
    """`train(checkpoint, **recipe)`: the folder that a run of this recipe leaves, its weights moved
    at random."""

    def make(checkpoint: Path, **recipe: object) -> Path:
        import torch
        from peft import get_peft_model
        from safetensors.torch import save_file

        from workflow_scripts.train.lora import lora_config

        settings = RecipeSettings(**{"rank": 8, "alpha": 16, **recipe})
        facts = read_facts(checkpoint)
        folder = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(1)
        model = load_model(checkpoint, window=facts["sliding_window"], precision="float32")
        if settings.method != "full":
            model = get_peft_model(model, lora_config(settings, facts))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
                elif "lora_magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
                elif "modules_to_save" in name or settings.method == "full":
                    parameter.add_(0.05 * torch.randn_like(parameter))
        if settings.method != "full":
            model.save_pretrained(folder)
            return folder
        weights = {name: weight.data for name, weight in model.named_parameters()}
        save_file(weights, folder / "adapter_model.safetensors")
        files.write_json(folder / "adapter_config.json", {"peft_type": None, "method": "full"})
        return folder

    return make
