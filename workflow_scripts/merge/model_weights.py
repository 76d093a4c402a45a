"""The parameters of a model by name, computed one at a time: as stored, base + adapter, rounded.

`weights[name]` is a float32 tensor, named as in transformers' model: a source for `StreamedModel`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workflow_scripts.merge.adapter import Adapter
from workflow_scripts.merge.base_weights import BaseWeights
from workflow_scripts.merge.merged_weights import merged_shape, merged_slab
from workflow_scripts.merge.tensor_names import SLAB_ELEMENTS, TIED, Slab, part, slabs

if TYPE_CHECKING:
    from workflow_scripts.merge.live_adapter import LiveAdapter, LowRank

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights as they are in a checkpoint's files."""

    base: BaseWeights
    """The files, as published or dequantized from NF4."""

    def __getitem__(self, parameter: str) -> torch.Tensor:
        """A float32 copy, which the caller may change."""
        names = self.base.parameters[self.stored_name(parameter)]
        pieces = [self._tensor(name) for name in names]
        if len(pieces) == 1:
            return pieces[0]
        # The files hold one tensor per expert, and the halves of its gate_up_proj are neighbours.
        n_halves = 2 if part(names[0]).half is not None else 1
        return torch.stack(
            [torch.cat(pieces[at : at + n_halves]) for at in range(0, len(pieces), n_halves)]
        )

    def stored_name(self, parameter: str) -> str:
        """The parameter that the files hold: the embeddings for a tied output layer."""
        return parameter if parameter in self.base.parameters else TIED.get(parameter, parameter)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def slab(self, name: str, slab: Slab) -> torch.Tensor:
        return self.base.weight(name, slab)

    def _tensor(self, name: str) -> torch.Tensor:
        shape = self.shape(name)
        found = torch.empty(shape)
        for slab in slabs(name, shape):
            found[slab.place] = self.slab(name, slab).float()
        return found


@dataclass(frozen=True, eq=False)
class MergedWeights(Weights):
    """base + adapter as `merge_adapter` writes it, each number rounded to its 16-bit type."""

    adapter: Adapter

    def shape(self, name: str) -> tuple[int, ...]:
        return merged_shape(self.base, self.adapter, name)

    def slab(self, name: str, slab: Slab) -> torch.Tensor:
        return merged_slab(self.base, self.adapter, name, slab)


@dataclass(frozen=True, eq=False)
class LiveWeights(Weights):
    """base + adapter in float32, as PEFT reads the adapter; not rounded."""

    live: LiveAdapter

    def __getitem__(self, parameter: str) -> torch.Tensor:
        whole = self.live.whole.get(parameter)
        if whole is not None:
            return whole.to(torch.float32, copy=True)
        weight = super().__getitem__(parameter)
        for target, low_rank in self.changed(parameter, weight):
            target.addmm_(low_rank.up, low_rank.down, alpha=low_rank.scale)
            if low_rank.magnitude is not None:
                target.mul_((low_rank.magnitude / target.norm(dim=1))[:, None])
        return weight

    def changed(
        self, parameter: str, weight: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, LowRank]]:
        """Each matrix of a weight that the adapter adds to, with its change."""
        for expert, low_rank in enumerate(self.live.low_rank.get(parameter, [])):
            yield weight[expert] if weight.dim() == 3 else weight, low_rank


@dataclass(frozen=True, eq=False)
class NearestWeights(LiveWeights):
    """base + adapter, as PEFT reads it, rounded to nearest: the weights of a right merge."""

    dtypes: Mapping[str, torch.dtype]
    """Parameter → type that it is rounded to."""
    roundings: Mapping[str, str]
    """Parameter → what is rounded, as `exact_merge.TensorResult` names it; `once` if missing."""

    def __getitem__(self, parameter: str) -> torch.Tensor:
        dtype = self.dtypes[parameter if parameter in self.dtypes else TIED[parameter]]
        rounding = self.roundings.get(parameter, "once")
        if rounding == "once":
            return super().__getitem__(parameter).to(dtype).float()
        weight = Weights.__getitem__(self, parameter)
        adapter_dtype = dtype if rounding == "adapter_first" else torch.float32
        for target, low_rank in self.changed(parameter, weight):
            up, down = (matrix.to(adapter_dtype).float() for matrix in (low_rank.up, low_rank.down))
            target.add_((low_rank.scale * (up @ down)).to(dtype))
        return weight.to(dtype).float()


@dataclass(frozen=True, eq=False)
class RoundedWeights:
    """Weights rounded up or down at random, so that the mean of each is right: the effect of
    rounding alone on a model."""

    weights: Weights
    dtype: torch.dtype
    """Type that they are rounded to."""
    seed: int

    def __getitem__(self, parameter: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(parameter.encode()))
        weight = self.weights[parameter]
        # In slabs: rounding has a dozen intermediate results, and embeddings are half a gigabyte.
        for slab in weight.view(-1).split(SLAB_ELEMENTS):
            slab.copy_(stochastically_rounded(slab, self.dtype, generator))
        return weight


def stochastically_rounded(
    values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Round each value to one of its two neighbours in `dtype`, the nearer with the higher
    probability, so that the expected result is the value itself.

    Args:
        values: float32 or float64.
        dtype: bfloat16, float16 or float32.
    """
    nearest = values.to(dtype)
    # The bit patterns of one sign ascend with the magnitude.
    bits = nearest.view(_BITS[dtype])
    below = (bits - (nearest.to(values.dtype).abs() > values.abs()).to(bits.dtype)).view(dtype)
    above = (below.view(_BITS[dtype]) + 1).view(dtype)
    low, high = below.to(values.dtype).abs(), above.to(values.dtype).abs()
    share = (values.abs() - low) / (high - low)
    is_up = torch.rand(values.shape, generator=generator, dtype=values.dtype) < share
    return torch.where(is_up, above, below)
