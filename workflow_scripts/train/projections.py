"""A linear layer with its adapter as one operation: y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ, and its gradients.

PEFT adds the adapter's product to the base's in four passes over the output. Here the matrix
product accumulates into it directly, forward and backward. The backward pass keeps x and x·Aᵀ in
the type of the arithmetic.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import Linear, Linear4bit


def fuse(model: Any) -> int:
    """Make every plain LoRA layer of a PEFT model run as one operation; results change only by
    rounding.

    PEFT still runs dropout, DoRA, experts and 8-bit bases, and layers whose adapter is disabled or
    merged at the time.

    Returns:
        Number of layers that were fused.
    """
    n_fused = 0
    for layer in model.modules():
        if _is_plain(layer):
            layer.forward = types.MethodType(_adapted, layer)
            n_fused += 1
    return n_fused


def _is_plain(layer: Any) -> bool:
    """True if a layer has one LoRA of just A and B, on a base in NF4 or not quantized."""
    return (
        isinstance(layer, (Linear, Linear4bit))
        and list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        and not layer.lora_bias["default"]
        and layer.base_layer.bias is None
        and not getattr(layer, "fan_in_fan_out", False)
    )


def _adapted(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a fused layer."""
    if layer.disable_adapters or layer.merged:
        return type(layer).forward(layer, x)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _AdaptedProjection.apply(x, down, up, layer.base_layer, layer.scaling["default"])


def _weight(base: torch.nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """Weight of a base layer, (out, in), dequantized if needed."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.to(dtype)
    return dequantize_4bit(base.weight.data, state).to(dtype)


class _AdaptedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        base: torch.nn.Module,
        scale: float,
    ) -> torch.Tensor:
        """(…, in) to (…, out); `down` is A, (rank, in), `up` is B, (out, rank)."""
        y = base(x)
        dtype = y.dtype
        with torch.autocast(x.device.type, enabled=False):
            states = x.reshape(-1, x.shape[-1]).to(dtype)
            compressed = states @ down.to(dtype).T
            y.view(-1, y.shape[-1]).addmm_(compressed, up.to(dtype).T, alpha=scale)
        ctx.save_for_backward(states, compressed, down, up)
        ctx.base, ctx.scale, ctx.shape, ctx.dtype = base, scale, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, of_y: torch.Tensor) -> tuple[Any, ...]:
        states, compressed, down, up = ctx.saved_tensors
        dtype = states.dtype
        with torch.autocast(of_y.device.type, enabled=False):
            of_y = of_y.reshape(-1, of_y.shape[-1]).to(dtype)
            of_compressed = (of_y @ up.to(dtype)).mul_(ctx.scale)
            of_up = (of_y.T @ compressed).mul_(ctx.scale) if ctx.needs_input_grad[2] else None
            of_down = of_compressed.T @ states if ctx.needs_input_grad[1] else None
            of_x = None
            # The input of the first layer needs no gradient.
            if ctx.needs_input_grad[0]:
                of_x = of_y @ _weight(ctx.base, dtype)
                of_x.addmm_(of_compressed, down.to(dtype))
                of_x = of_x.view(ctx.shape).to(ctx.dtype)
        of_down, of_up = (
            None if part is None else part.to(weight.dtype)
            for part, weight in ((of_down, down), (of_up, up))
        )
        return of_x, of_down, of_up, None, None
