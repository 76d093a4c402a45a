"""An adapter as PEFT itself applies it: which parameters it changes, and how.

`adapter.py` reads the same file by our own rules, for merging. A gate that read it by those rules
would repeat their faults. Here PEFT attaches the adapter to a model without weights (on torch's
meta device), and the result is read from PEFT's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from workflow_scripts.merge.tensor_names import TIED
from workflow_scripts.scoring.transformers_model import is_full_fine_tune, resize_embeddings

NAME = "default"  # PEFT's name for the only adapter of a model


class LowRank(NamedTuple):
    """The change of one matrix: scale · up @ down. With a magnitude (DoRA), each row of the sum is
    then scaled to that length."""

    down: torch.Tensor
    """(rank, in) float32: LoRA's A."""
    up: torch.Tensor
    """(out, rank) float32: LoRA's B."""
    scale: float
    magnitude: torch.Tensor | None = None
    """(out,) float32; None without DoRA."""


class LiveAdapter:
    """The changes of an adapter, by the names of the model's parameters.

    Attributes:
        low_rank: parameter → its changes: one per expert where the parameter holds all experts of a
            layer, else one.
        whole: parameter → the tensor that takes its place (`modules_to_save`, resized embeddings,
            full fine-tunes); the output layer too where it is tied to such embeddings.
    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        checkpoint: folder of the base model; only its config.json is read.
    """

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.low_rank: dict[str, list[LowRank]] = {}
        self.whole: dict[str, torch.Tensor] = {}
        config = AutoConfig.from_pretrained(checkpoint)
        stored = load_file(folder / "adapter_model.safetensors")
        if is_full_fine_tune(folder):
            self.whole = stored
        else:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            self._read(_attached(folder, model), stored)
        if config.tie_word_embeddings:
            for output, embeddings in TIED.items():
                if embeddings in self.whole:
                    self.whole.setdefault(output, self.whole[embeddings])

    def _read(self, model: Any, stored: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            model: PEFT's, with the adapter; its A and B have no values, as their base has none.
            stored: the tensors of the file.
        """

        def tensor(module: str, name: str) -> torch.Tensor:
            return stored[f"base_model.model.{module}.{name}"].float()

        for name, module in model.named_modules():
            parameter = name.replace(".base_layer", "")
            if isinstance(module, AuxiliaryTrainingWrapper):
                for key, saved in module.modules_to_save[NAME].named_parameters():
                    self.whole[f"{parameter}.{key}"] = saved.detach()
            elif isinstance(module, LoraLayer):
                down, up = (tensor(name, f"lora_{letter}.weight") for letter in "AB")
                if isinstance(module, ParamWrapper):
                    parameter = f"{parameter}.{module.parameter_name}"
                    self.low_rank[parameter] = _by_expert(module, down, up)
                    continue
                magnitude = None
                if NAME in module.lora_magnitude_vector:
                    magnitude = tensor(name, "lora_magnitude_vector")
                change = LowRank(down, up, module.scaling[NAME], magnitude)
                self.low_rank[f"{parameter}.weight"] = [change]
        # PEFT saves embeddings that were resized without wrapping them.
        for name, saved in model.named_parameters(remove_duplicate=False):
            if not saved.is_meta and name in {*TIED, *TIED.values()}:
                self.whole.setdefault(name, saved.detach())


def _by_expert(wrapper: Any, down: torch.Tensor, up: torch.Tensor) -> list[LowRank]:
    """The change of each expert of a layer; PEFT separates A and B by expert."""
    downs, ups = [down], [up]
    if wrapper.num_experts > 1:
        wrapper.lora_A[NAME].weight = torch.nn.Parameter(down, requires_grad=False)
        wrapper.lora_B[NAME].weight = torch.nn.Parameter(up, requires_grad=False)
        ups, downs, _ = wrapper.get_delta_factors(NAME)
    scale = wrapper.scaling[NAME]
    return [LowRank(down, up, scale) for down, up in zip(downs, ups, strict=True)]


def _attached(folder: Path, model: PreTrainedModel) -> Any:
    """A model without weights with an adapter on it; only the adapter's tensors are in memory."""
    resize_embeddings(model, folder)
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    adapted = PeftModel(model, config, low_cpu_mem_usage=True)
    set_peft_model_state_dict(
        adapted, load_peft_weights(str(folder), device="cpu"), low_cpu_mem_usage=True
    )
    return adapted.get_base_model()
