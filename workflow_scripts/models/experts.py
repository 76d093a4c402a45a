"""A mixture's experts in NF4.

transformers 5 holds the experts of a layer in two tensors, which its bitsandbytes loader does not
quantize: in 16 bits they take 90 of Mixtral 8x7B's 93 GB, in NF4 23 GB. Each tensor is dequantized
whenever it is read. A matrix product keeps its operands for the backward pass, so training needs
gradient checkpointing in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional
import torch
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("gate_up_proj", "down_proj")


class Nf4Tensor(torch.Tensor):
    """A read-only tensor whose values are stored in NF4 with double quantization.

    Operations see a dequantized tensor of the original shape and dtype. bitsandbytes' own
    parametrization is not used: with it, PEFT 0.21 leaves its adapter on the tensor at each pass,
    and the next pass adds another.
    """

    packed: torch.Tensor
    state: bitsandbytes.functional.QuantState
    """State of the flattened values: on a CPU with AVX-512, bitsandbytes 0.50 returns wrong values
    if a row's length is not a multiple of the block's 64 values."""

    def __new__(
        cls, packed: torch.Tensor, state: bitsandbytes.functional.QuantState, shape: torch.Size
    ) -> Nf4Tensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=state.dtype, device=packed.device
        )
        tensor.packed, tensor.state = packed, state
        return tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Nf4Tensor:
        """Quantize a tensor of 16 or 32 bits on its device."""
        packed, state = bitsandbytes.functional.quantize_4bit(
            tensor.flatten(), compress_statistics=True, quant_type="nf4"
        )
        return cls(packed, state, tensor.shape)

    def dequantized(self) -> torch.Tensor:
        return bitsandbytes.functional.dequantize_4bit(self.packed, self.state).view(self.shape)

    # torch's annotations of these three methods are those of a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,  # untyped: of any function of torch
    ) -> Any:
        first: Any = args[0] if args else None
        if function is torch.ops.aten.detach.default:
            return cls(first.packed, first.state, first.shape)
        if function is torch.ops.aten.set_.source_Tensor and first is args[1]:
            return first  # torch's parametrizations replace a tensor by itself
        if function._schema.is_mutable and isinstance(first, cls):
            raise TypeError(f"{function}: a tensor in NF4 cannot be written")
        args, options = tree_map_only(cls, cls.dequantized, (args, dict(options or {})))
        return function(*args, **options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Nf4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


def quantize_experts(model: PreTrainedModel, device: torch.device) -> None:
    """Quantize the experts and move them to a device, one tensor at a time.

    Args:
        model: mixture with experts in 16 or 32 bits, on any device; a dense model is not changed.
    """
    for layer in model.model.layers:
        experts = getattr(layer.mlp, "experts", None)
        for name in NAMES if experts is not None else ():
            quantized = Nf4Tensor.of(getattr(experts, name).data.to(device))
            setattr(experts, name, torch.nn.Parameter(quantized, requires_grad=False))
