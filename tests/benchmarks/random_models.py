"""A Mistral with random weights in NF4, made where it is to train: no checkpoint, no 16-bit copy.

Speed and memory of training do not depend on what the weights are. A matrix is drawn and quantized
at once, so that a 7B takes 4 GB of a GPU while it is made, and seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workflow_scripts.models.checkpoint import compute_dtype, default_device

if TYPE_CHECKING:
    from torch import device
    from transformers import PreTrainedModel

STANDARD_DEVIATION = 0.02


def random_nf4_model(
    config: dict[str, Any], *, attention: str, place: device, seed: int
) -> PreTrainedModel:
    """What `checkpoint.load_model` makes of a checkpoint in NF4, in every module and dtype.

    Args:
        config: content of a config.json.
        attention: transformers' name of the attention implementation.
        place: where the weights are made and stay.
    """
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
    from transformers.quantizers import AutoHfQuantizer

    dtype = compute_dtype(place)
    shape = MistralConfig(**config, dtype=dtype, attn_implementation=attention)
    with torch.device("meta"):
        model = MistralForCausalLM(shape).to(dtype)
    quantizer = AutoHfQuantizer.from_config(
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        pre_quantized=False,
    )
    quantizer.preprocess_model(model, dtype=dtype, device_map={"": place})

    generator = torch.Generator(place).manual_seed(seed)
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.dim() == 1:  # of a norm
                value = torch.ones(old.shape, dtype=dtype, device=place)
            else:
                value = torch.empty(old.shape, dtype=dtype, device=place)
                value.normal_(std=STANDARD_DEVIATION, generator=generator)
            if isinstance(module, Linear4bit):
                quantized = Params4bit(value, requires_grad=False, **old.__dict__)
                setattr(module, name, quantized.to(place))  # quantizes
            else:
                setattr(module, name, torch.nn.Parameter(value))
        if isinstance(module, Linear4bit):
            # See load_model: else bitsandbytes repacks layers for inference on some CPUs.
            module.support_avx512bf16_for_cpu = False
    model.model.rotary_emb = MistralRotaryEmbedding(shape).to(place)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    model.eval()  # as loaded
    return model


def random_base(config: dict[str, Any], *, attention: str, seed: int) -> PreTrainedModel:
    """The 4-bit base on this machine's device, the same for every contestant."""
    from transformers import set_seed

    model = random_nf4_model(config, attention=attention, place=default_device(), seed=seed)
    set_seed(seed)  # of the adapter that follows
    return model
