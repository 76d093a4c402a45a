"""base + adapter in float64: the numbers that a merged model is compared with.

They are computed from PEFT's own reading of the adapter (`LiveAdapter`) and from the base's files,
not by the code that merges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from workflow_scripts.merge.live_adapter import LiveAdapter, LowRank
from workflow_scripts.merge.stored_tensors import StoredTensors
from workflow_scripts.merge.tensor_names import (
    QUANTIZATION_BLOCK,
    Part,
    Slab,
    is_quantized_in_training,
    part,
)

# Error of float32 arithmetic, relative to the magnitudes that were added up: sixteen units in the
# last place. Every right merge of a real model of 135M was within it.
ARITHMETIC = 2.0**-20


class Expected(NamedTuple):
    """Expected values of a slab of the merged model before rounding, all float64."""

    base: torch.Tensor
    total: torch.Tensor
    """base + change, with DoRA's magnitude."""
    slack: torch.Tensor | None
    """Allowed distance of float32 arithmetic from it; None: no distance."""
    change: torch.Tensor | None = None
    """scale · B·A; None where the adapter does not add to this tensor."""
    change_slack: torch.Tensor | None = None


class Reference:
    """base + adapter in float64.

    Args:
        base: files of the base model.
        live: the adapter.
        nf4_dtype: for a merge into the dequantized base, the dtype in which training quantized it
            to NF4 and computed; None is the base as published.
    """

    def __init__(
        self, base: StoredTensors, live: LiveAdapter, nf4_dtype: torch.dtype | None = None
    ) -> None:
        self.base, self.live, self._nf4_dtype = base, live, nf4_dtype
        self._dequantized: tuple[str, torch.Tensor] | None = None

    def prepare(self, name: str) -> None:
        """Quantize and dequantize the parameter that a tensor belongs to, if the merge does.

        bitsandbytes takes the whole parameter at once, as in training; the merge works slab by
        slab.
        """
        parameter = part(name).parameter
        if not self._is_dequantized(name) or (
            self._dequantized and self._dequantized[0] == parameter
        ):
            return
        self._dequantized = None
        names = self.base.parameters[parameter]
        weight = torch.cat([self.base.whole(each).flatten() for each in names])
        packed, state = quantize_4bit(
            weight.to(self._nf4_dtype),
            blocksize=QUANTIZATION_BLOCK,
            quant_type="nf4",
            compress_statistics=True,
        )
        del weight
        self._dequantized = (parameter, dequantize_4bit(packed, state).flatten())

    def slab(self, name: str, slab: Slab, adapter_dtype: torch.dtype = torch.float32) -> Expected:
        """The expected numbers of a slab. Thread-safe for the tensor that was prepared last.

        Args:
            adapter_dtype: to which A and B are rounded first.
        """
        base = self._base_rows(name, slab).double()
        low_rank = self.low_rank(slab.part)
        if low_rank is None:
            is_exact = not self._is_dequantized(name)
            return Expected(base, base, None if is_exact else base.abs() * ARITHMETIC)
        down, up = (
            matrix.to(adapter_dtype).double() for matrix in (low_rank.down, low_rank.up[slab.rows])
        )
        change = (up @ down) * low_rank.scale
        change_slack = (up.abs() @ down.abs()) * (abs(low_rank.scale) * ARITHMETIC)
        total, slack = base + change, change_slack + base.abs() * ARITHMETIC
        if low_rank.magnitude is not None:
            # First order: the length of a row is off by at most the length of its slack.
            length = total.norm(dim=1, keepdim=True)
            factor = low_rank.magnitude[slab.rows].double()[:, None] / length
            slack = factor.abs() * (
                slack + total.abs() * (slack.norm(dim=1, keepdim=True) / length)
            )
            total = factor * total
        return Expected(base, total, slack, change, change_slack)

    def replaced(self, where: Part) -> torch.Tensor | None:
        """The tensor that takes a part's place; None if the part was not trained whole."""
        tensor = self.live.whole.get(where.parameter)
        if tensor is not None and where.expert is not None:
            tensor = tensor[where.expert]
        return tensor if tensor is None or where.half is None else tensor.chunk(2)[where.half]

    def is_untouched(self, name: str) -> bool:
        """True if a tensor must be the same as in the base's file."""
        where = part(name)
        return (
            self.low_rank(where) is None
            and self.replaced(where) is None
            and not self._is_dequantized(name)
        )

    def low_rank(self, where: Part) -> LowRank | None:
        """The change that is added to a part; None where there is none."""
        found = self.live.low_rank.get(where.parameter)
        if found is None:
            return None
        low_rank = found[where.expert or 0]
        if where.half is not None:
            low_rank = low_rank._replace(up=low_rank.up.chunk(2)[where.half])
        return low_rank

    def _is_dequantized(self, name: str) -> bool:
        return self._nf4_dtype is not None and is_quantized_in_training(part(name))

    def _base_rows(self, name: str, slab: Slab) -> torch.Tensor:
        if not self._is_dequantized(name):
            return self.base.rows(name, slab)
        assert self._dequantized is not None
        shape = self.base.shape(name)
        rest = self._dequantized[1][self.base.n_elements_before(name) :]
        return rest[: math.prod(shape)].view(shape)[slab.place]


def is_rounded(
    stored: torch.Tensor, value: torch.Tensor, slack: torch.Tensor | None
) -> torch.Tensor:
    """Flag the elements that are a rounding, to their own type, of a number within `slack` of
    `value`."""
    if slack is None:
        return stored == value.to(stored.dtype)
    return is_between(stored, value - slack, value + slack)


def is_between(stored: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Flag the elements that are a rounding to their type of a number from `low` to `high`."""
    low, high = low.to(stored.dtype), high.to(stored.dtype)
    return (low <= stored) & (stored <= high) & stored.isfinite()
