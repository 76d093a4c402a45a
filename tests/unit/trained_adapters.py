"""Fixtures: adapters of every kind of training, without a zero matrix; a GGUF of a mixture;
importance matrices by llama.cpp's own tool."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.facts import facts_of
from tests.unit.train.mixtral import tiny_mixtral
from workflow_scripts import files
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings


@pytest.fixture(scope="session")
def train(tmp_path_factory) -> Callable[..., Path]:
    """`train(checkpoint, **recipe)`: the folder that such a run writes, with weights moved at
    random."""

    def make(checkpoint: Path, **recipe: object) -> Path:
        import torch
        from peft import get_peft_model
        from safetensors.torch import save_file

        from workflow_scripts.train.lora import lora_config

        settings = RecipeSettings(**{"rank": 8, "alpha": 16, **recipe})
        facts = facts_of(checkpoint)
        folder = tmp_path_factory.mktemp("adapter")
        torch.manual_seed(1)
        model = load_model(checkpoint, window=facts.sliding_window, precision="float32")
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


@pytest.fixture(scope="session")
def mixtral_gguf(tokenizer_v3, write_facts, tmp_path_factory) -> Path:
    """F16 GGUF of a tiny Mixtral, next to its facts.json."""
    import torch

    from workflow_scripts.quantize import convert_gguf

    folder = tmp_path_factory.mktemp("mixtral_gguf")
    checkpoint = folder / "checkpoint"
    shape = {"vocab_size": 32_768, "hidden_size": 256, "intermediate_size": 256}
    tiny_mixtral(**shape, sliding_window=None).to(torch.bfloat16).save_pretrained(checkpoint)
    for path in tokenizer_v3.iterdir():
        shutil.copyfile(path, checkpoint / path.name)
    facts = write_facts(checkpoint, folder / "facts.json")
    gguf = folder / "mixtral-F16.gguf"
    convert_gguf.main(
        ["--merged", str(checkpoint), "--facts", str(facts), "--name", "mixtral"]
        + ["--gguf", str(gguf)]
    )
    return gguf


@pytest.fixture(scope="session")
def imatrix_of(llama_tool, text, tmp_path_factory) -> Callable[[Path], Path]:
    """`imatrix_of(gguf)`: by llama.cpp's own llama-imatrix, from four chunks of 256 tokens."""

    @cache
    def compute(gguf: Path) -> Path:
        path = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
        options = ["-c", 256, "--chunks", 4, "-t", 1, "-ngl", 0, "--no-ppl"]
        llama_tool("imatrix", "-m", gguf, "-f", text, "-o", path, *options)
        return path

    return compute
