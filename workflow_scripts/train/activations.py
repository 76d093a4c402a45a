"""What the forward pass keeps for the backward pass: all, or so little that a long row fits.

Checkpointing keeps a layer's input alone and computes the rest again (arXiv:1604.06174), up to half
more arithmetic with a frozen base; so only as many layers do it as memory asks for. Offloading
moves what is kept to the CPU's memory, and back one layer ahead of its use.
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
    """Checkpoint so many layers, evenly spread; no number that comes out changes.

    Args:
        model: a causal language model, with or without PEFT's adapter.
        n_checkpointed_layers: 0 is none.
        offloads: what a checkpointed layer keeps, its input, goes to the CPU's memory.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = base.model.layers
    store = OffloadedTensors() if offloads else None
    for index, layer in enumerate(layers):
        # Bresenham's line: at each layer as near to the wanted share as can be.
        before, after = (n * n_checkpointed_layers // len(layers) for n in (index, index + 1))
        if after > before:
            layer.forward = _checkpointed(layer, store)


def _checkpointed(layer: torch.nn.Module, store: OffloadedTensors | None) -> Callable[..., Any]:
    """A layer's forward pass that keeps its input alone."""
    forward = layer.forward
    # Reading the random state waits for the GPU, layer by layer; only dropout needs it.
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
    """Saved tensors in pinned memory of the CPU, copied while the GPU computes.

    Tensors come back in the reverse order of their going, so each one that is asked for starts the
    copy of the one before it.
    """

    def __init__(self) -> None:
        self._away: list[_Offloaded] = []
        self._stream: Any = None

    def pack(self, tensor: torch.Tensor) -> Any:
        """Send a tensor away; small ones and parameters stay."""
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
        # A pass whose graph was dropped leaves its tensors behind those of this one.
        while self._away and self._away.pop() is not packed:
            pass
        if self._away:
            self._away[-1].fetch()
        return packed.take()


class _Offloaded:
    """One tensor, on its way there, away, or on its way back."""

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
        # The allocator must not give its memory away before it has been read.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        """Start the copy back."""
        if self._fetched is not None:
            return
        if self._stream is None:
            self._fetched = self._kept
            return
        # Memory of the computing stream, so that freeing it is that stream's affair.
        self._fetched = torch.empty(self._kept.shape, dtype=self._kept.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._fetched.copy_(self._kept, non_blocking=True)

    def take(self) -> torch.Tensor:
        """The tensor, when the computing stream may read it."""
        self.fetch()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        assert self._fetched is not None
        return self._fetched
