"""Activations that the forward pass keeps for the backward pass, reduced so that long rows fit.

Checkpointing keeps only a layer's input and recomputes the rest (arXiv:1604.06174). With a frozen
base this costs up to half more arithmetic, so only as many layers do it as memory requires.
Offloading moves what is kept to the CPU's memory and copies it back one layer before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

# Smaller tensors are not worth a copy (rotary tables, segment bounds).
OFFLOADED_ELEMENTS = 1 << 12


def save_less(model: Any, *, n_checkpointed_layers: int, offloads: bool = False) -> None:
    """Checkpoint some of the layers, evenly spread; results do not change.

    Args:
        model: a causal language model, with or without PEFT's adapter.
        offloads: the input that a checkpointed layer keeps goes to the CPU's memory.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.model.layers
    store = OffloadedTensors() if offloads else None
    for index, layer in enumerate(layers):
        # Bresenham's line: after each layer, the share so far is as close as it can be.
        before, after = (n * n_checkpointed_layers // len(layers) for n in (index, index + 1))
        if after > before:
            layer.forward = _checkpointed(layer, store)


def _checkpointed(layer: torch.nn.Module, store: OffloadedTensors | None) -> Callable[..., Any]:
    """A layer's forward pass that keeps only its input."""
    forward = layer.forward
    # Saving the random state waits for the GPU at every layer; only dropout needs it.
    draws = any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in layer.modules())

    def checkpointed(*inputs: Any, **options: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*inputs, **options)
        hooks = saved_tensors_hooks(store.pack, store.unpack) if store else nullcontext()
        with hooks:
            return checkpoint(
                forward, *inputs, use_reentrant=False, preserve_rng_state=draws, **options
            )

    return checkpointed


class OffloadedTensors:
    """Saved tensors in the CPU's pinned memory, copied while the GPU computes.

    The backward pass needs them in reverse order, so a request for one starts the copy of the one
    before it.
    """

    def __init__(self) -> None:
        self._away: list[_Offloaded] = []
        self._stream: Any = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """Offload a tensor; small tensors and parameters stay where they are."""
        if tensor.numel() < OFFLOADED_ELEMENTS or isinstance(tensor, torch.nn.Parameter):
            return tensor
        if self._stream is None and tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)
        offloaded = _Offloaded(tensor, self._stream)
        self._away.append(offloaded)
        return offloaded

    def unpack(self, packed: Any) -> torch.Tensor:
        if not isinstance(packed, _Offloaded):
            return packed
        # Tensors of a forward pass whose graph was dropped may be on top of the stack.
        while self._away and self._away.pop() is not packed:
            pass
        if self._away:
            self._away[-1].fetch()
        return packed.take()


class _Offloaded:
    """One tensor that is being copied to the CPU, is there, or is being copied back."""

    def __init__(self, tensor: torch.Tensor, stream: Any) -> None:
        self._device = tensor.device
        self._stream = stream
        self._fetched: torch.Tensor | None = None
        if stream is None:
            self._kept = tensor.detach().clone()
            return
        self._kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._kept.copy_(tensor.detach(), non_blocking=True)
        # The allocator must not reuse the tensor's memory before the copy has read it.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start the copy back to the GPU."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = self._kept
            return
        # Allocated on the computing stream, which is the one that will free it.
        self._fetched = torch.empty(self._kept.shape, dtype=self._kept.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._fetched.copy_(self._kept, non_blocking=True)

    def take(self) -> torch.Tensor:
        """Return the tensor once the computing stream may read it."""
        self.fetch()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        assert self._fetched is not None
        return self._fetched
