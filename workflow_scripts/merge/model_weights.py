"""The parameters of a model by name, made one at a time: as stored, as base + adapter, rounded.

Each is a mapping from the names of transformers' model to float32 tensors, for `StreamedModel`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.merged_weights import merged_dtype, merged_shape, merged_slab
from workflow_scripts.merge.tensor_names import SLAB_ELEMENTS, Slab, part, slabs

if TYPE_CHECKING:
    from workflow_scripts.merge.live_adapter import LiveAdapter

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class Weights(Mapping[str, torch.Tensor]):
    """Weights as a checkpoint's files have them.

    Args:
        base: the files, as published or dequantized from NF4.
    """

    def __init__(self, base: BaseWeights) -> None:
        self.base = base

    def __getitem__(self, parameter: str) -> torch.Tensor:
        """float32, in memory of its own."""
        if parameter not in self.base.parameters and parameter in TIED:
            parameter = TIED[parameter]
        names = self.base.tensors_of(parameter)
        pieces = [self._tensor(name) for name in names]
        if len(pieces) == 1:
            return pieces[0]
        # Files with a tensor per expert: their halves of gate_up_proj lie next to each other.
        n_halves = 2 if part(names[0]).half is not None else 1
        return torch.stack(
            [torch.cat(pieces[at : at + n_halves]) for at in range(0, len(pieces), n_halves)]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.base.parameters)

    def __len__(self) -> int:
        return len(self.base.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def slab(self, name: str, slab: Slab) -> torch.Tensor:
        return self.base.weight(name, slab)

    def _tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        made = torch.empty(shape)
        for slab in slabs(name, shape):
            made[slab.place] = self.slab(name, slab).float()
        return made


class MergedWeights(Weights):
    """base + adapter as `merge_adapter` writes it, each number rounded to its 16-bit type."""

    def __init__(self, base: BaseWeights, adapter: Adapter) -> None:
        super().__init__(base)
        self._adapter = adapter

    def shape(self, name: str) -> tuple[int, ...]:
        return merged_shape(self.base, self._adapter, name)

    def slab(self, name: str, slab: Slab) -> torch.Tensor:
        dtype = merged_dtype(self.base.dtype_name(name))
        return merged_slab(self.base, self._adapter, name, slab, dtype)


class LiveWeights(Weights):
    """base + adapter in float32, by PEFT's own reading of the adapter, not rounded."""

    def __init__(self, base: BaseWeights, live: LiveAdapter) -> None:
        super().__init__(base)
        self._live = live

    def __getitem__(self, parameter: str) -> torch.Tensor:
        whole = self._live.whole.get(parameter)
        if whole is None and parameter in TIED and parameter not in self.base.parameters:
            whole = self._live.whole.get(TIED[parameter])
        if whole is not None:
            return whole.to(torch.float32, copy=True)
        weight = super().__getitem__(parameter)
        changes = self._live.low_rank.get(parameter, [])
        for expert, low_rank in enumerate(changes):
            target = weight[expert] if weight.dim() == 3 else weight
            target.addmm_(low_rank.up, low_rank.down, alpha=low_rank.scale)
            if low_rank.magnitude is not None:
                target.mul_((low_rank.magnitude / target.norm(dim=1))[:, None])
        return weight


class NearestWeights(Weights):
    """base + adapter rounded to nearest by PEFT's own reading, as a right merge is.

    Args:
        dtypes: parameter → type that it is rounded to.
        roundings: parameter → what was rounded, as `exact_merge.TensorResult` names it; `once`
            where it is not in here.
    """

    def __init__(
        self,
        base: BaseWeights,
        live: LiveAdapter,
        dtypes: Mapping[str, torch.dtype],
        roundings: Mapping[str, str],
    ) -> None:
        super().__init__(base)
        self._live, self._dtypes, self._roundings = live, dtypes, roundings
        self._sums = LiveWeights(base, live)

    def __getitem__(self, parameter: str) -> torch.Tensor:
        dtype = self._dtypes[parameter if parameter in self._dtypes else TIED[parameter]]
        rounding = self._roundings.get(parameter, "once")
        if rounding == "once":
            return self._sums[parameter].to(dtype).float()
        weight = super().__getitem__(parameter)
        adapter_dtype = dtype if rounding == "adapter_first" else torch.float32
        for expert, low_rank in enumerate(self._live.low_rank[parameter]):
            target = weight[expert] if weight.dim() == 3 else weight
            up, down = (matrix.to(adapter_dtype).float() for matrix in (low_rank.up, low_rank.down))
            target.add_((low_rank.scale * (up @ down)).to(dtype))
        return weight.to(dtype).float()


class RoundedWeights(Mapping[str, torch.Tensor]):
    """Weights rounded up or down at random, so that the mean of each is right: what rounding alone
    does to a model.

    Args:
        weights: in float32.
        dtype: that they are rounded to.
        seed: of the randomness.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, seed: int) -> None:
        self._weights, self._dtype, self._seed = weights, dtype, seed

    def __getitem__(self, parameter: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed + zlib.crc32(parameter.encode()))
        weight = self._weights[parameter]
        # In slabs: rounding has a dozen intermediate results, and embeddings are half a gigabyte.
        for slab in weight.view(-1).split(SLAB_ELEMENTS):
            slab.copy_(stochastically_rounded(slab, self._dtype, generator))
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def stochastically_rounded(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Each value becomes one of its two neighbours in `dtype`, the nearer the likelier: its mean is
    the value itself.

    Args:
        values: float32 or float64.
        dtype: bfloat16, float16 or float32.
    """
    nearest = values.to(dtype)
    # Bit patterns of one sign count up with the magnitude.
    bits = nearest.view(_BITS[dtype])
    below = (bits - (nearest.to(values.dtype).abs() > values.abs()).to(bits.dtype)).view(dtype)
    above = (below.view(_BITS[dtype]) + 1).view(dtype)
    low, high = below.to(values.dtype).abs(), above.to(values.dtype).abs()
    share = (values.abs() - low) / (high - low)
    is_up = torch.rand(values.shape, generator=generator, dtype=values.dtype) < share
    return torch.where(is_up, above, below)
