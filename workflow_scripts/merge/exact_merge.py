"""The exact half of the merge gate: every stored number is base + adapter, rounded.

The expected value is computed in float64 from PEFT's own reading of the adapter (`LiveAdapter`) and
from the base's files, apart from the code that merges. A float32 merge cannot hit that value
exactly, so where it lies very near the midpoint of two numbers of the stored type, either is right:
each element must be a rounding of a value within

    ARITHMETIC · (|W| + scale · |B|·|A|)

of the expected one. That is far below the rounding itself (2⁻⁹ in bfloat16), so that a wrong scale,
layer or adapter cannot hide in it. Tensors that nothing changes are compared byte for byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from workflow_scripts import parallel
from workflow_scripts.merge import safetensors_stream
from workflow_scripts.merge.live_adapter import LiveAdapter, LowRank
from workflow_scripts.merge.tensor_names import QUANTIZATION_BLOCK, Part, Slab, part, slabs
from workflow_scripts.models.checkpoint_files import weight_files
from workflow_scripts.models.tensors import is_position_table

# Error of float32 arithmetic, relative to the magnitudes that were added up: sixteen units in the
# last place. Every right merge of a real model of 135M was within it.
ARITHMETIC = 2.0**-20
TIED = {"lm_head.weight": "model.embed_tokens.weight"}


class Files:
    """The tensors of a checkpoint folder by name, read a slab at a time.

    Attributes:
        shards: tensor → file it is in.
        entries: tensor → its header entry (dtype, shape, offsets).
    """

    def __init__(self, folder: Path) -> None:
        self.shards: dict[str, Path] = {}
        self.entries: dict[str, safetensors_stream.Entry] = {}
        self._open: dict[str, Any] = {}
        for shard in weight_files(folder):
            stored = safe_open(shard, framework="pt")
            for name, entry in safetensors_stream.read_header(shard).items():
                self.shards[name] = shard
                self.entries[name] = entry
                self._open[name] = stored

    def rows(self, name: str, slab: Slab) -> torch.Tensor:
        return self._open[name].get_tensor(name)[slab.place]

    def whole(self, name: str) -> torch.Tensor:
        return self._open[name].get_tensor(name)


class Expected(NamedTuple):
    """What a slab of the merged model must be before it is rounded, all float64."""

    base: torch.Tensor
    total: torch.Tensor
    """base + change, with DoRA's magnitude."""
    slack: torch.Tensor | None
    """How far float32 arithmetic may be from it; None: not at all."""
    change: torch.Tensor | None = None
    """scale · B·A; None where the adapter does not add to this tensor."""
    change_slack: torch.Tensor | None = None


class Reference:
    """base + adapter in float64.

    Args:
        base: files of the base model.
        live: the adapter.
        nf4_dtype: the dtype in which training quantized the base to NF4 and computed, for a merge
            into these weights; None is the base as published.
    """

    def __init__(
        self, base: Files, live: LiveAdapter, nf4_dtype: torch.dtype | None = None
    ) -> None:
        self.base, self.live, self._nf4_dtype = base, live, nf4_dtype
        self._dequantized: tuple[str, torch.Tensor] | None = None

    def prepare(self, name: str) -> None:
        """Quantizes and dequantizes the parameter that a tensor belongs to, where that is its base.

        bitsandbytes does it to the whole tensor at once, as training did; the merge does it slab by
        slab.
        """
        parameter = part(name).parameter
        if not self._is_dequantized(name) or (
            self._dequantized and self._dequantized[0] == parameter
        ):
            return
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        self._dequantized = None
        weight = torch.cat([self.base.whole(each).flatten() for each in self._tensors(parameter)])
        packed, state = quantize_4bit(
            weight.to(self._nf4_dtype),
            blocksize=QUANTIZATION_BLOCK,
            quant_type="nf4",
            compress_statistics=True,
        )
        del weight
        self._dequantized = (parameter, dequantize_4bit(packed, state).flatten())

    def slab(self, name: str, slab: Slab, adapter_dtype: torch.dtype = torch.float32) -> Expected:
        """Several threads may ask at once, about the tensor prepared last.

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
        """The tensor that takes a part's place, where training changed it as a whole."""
        tensor = self.live.whole.get(where.parameter)
        if tensor is None and where.parameter in TIED:
            tensor = self.live.whole.get(TIED[where.parameter])
        if tensor is None:
            return None
        if where.expert is not None:
            tensor = tensor[where.expert]
        return tensor if where.half is None else tensor.chunk(2)[where.half]

    def is_untouched(self, name: str) -> bool:
        """Whether a tensor must be that of the base's file."""
        where = part(name)
        return (
            self.low_rank(where) is None
            and self.replaced(where) is None
            and not self._is_dequantized(name)
        )

    def low_rank(self, where: Part) -> LowRank | None:
        """What is added to a part of a parameter; None where nothing is."""
        found = self.live.low_rank.get(where.parameter)
        if found is None:
            return None
        low_rank = found[where.expert or 0]
        if where.half is not None:
            low_rank = low_rank._replace(up=low_rank.up.chunk(2)[where.half])
        return low_rank

    def _is_dequantized(self, name: str) -> bool:
        from workflow_scripts.merge import nf4

        return self._nf4_dtype is not None and nf4.is_quantized(part(name))

    def _tensors(self, parameter: str) -> list[str]:
        """Those that a parameter consists of, in its order: by expert, the gate's half first."""
        names = [name for name in self.base.entries if part(name).parameter == parameter]
        return sorted(names, key=lambda name: (part(name).expert or 0, part(name).half or 0))

    def _base_rows(self, name: str, slab: Slab) -> torch.Tensor:
        if not self._is_dequantized(name):
            return self.base.rows(name, slab)
        assert self._dequantized is not None
        first = 0
        for each in self._tensors(slab.part.parameter):
            n_elements = torch.Size(self.base.entries[each]["shape"]).numel()
            if each == name:
                break
            first += n_elements
        shape = self.base.entries[name]["shape"]
        return self._dequantized[1][first : first + n_elements].view(shape)[slab.place]


@dataclass(frozen=True)
class TensorResult:
    """How one tensor of the merged model compares.

    Attributes:
        rounding: which numbers were rounded to the stored type: `once`, the sum alone (ours and
            PEFT's `merge_and_unload`); `change_first`, the change and then the sum (PEFT's
            `safe_merge`); `adapter_first`, A and B as well (PEFT with
            `autocast_adapter_dtype=False`). None where nothing was added, or none of these holds.
        n_wrong: elements that are no rounding of the expected value.
        worst: the slab with most of them.
    """

    name: str
    n_elements: int
    n_wrong: int = 0
    rounding: str | None = None
    worst: Slab | None = None


def is_rounded(
    stored: torch.Tensor, value: torch.Tensor, slack: torch.Tensor | None
) -> torch.Tensor:
    """Which elements are a rounding, to their own type, of a number within `slack` of `value`."""
    if slack is None:
        return stored == value.to(stored.dtype)
    low, high = (value - slack).to(stored.dtype), (value + slack).to(stored.dtype)
    return (low <= stored) & (stored <= high) & stored.isfinite()


def compare(
    reference: Reference, merged: Files, name: str, pool: ThreadPoolExecutor, n_threads: int
) -> TensorResult:
    """One tensor, which both have in the same shape."""
    shape = merged.entries[name]["shape"]
    reference.prepare(name)
    n_elements = torch.Size(shape).numel()

    every = list(slabs(name, shape))

    def count(judge: Callable[[Reference, Files, str, Slab], int]) -> list[int]:
        counted = functools.partial(judge, reference, merged, name)
        return list(parallel.ahead(pool, counted, every, n_ahead=2 * n_threads))

    low_rank = reference.low_rank(part(name))
    n_wrong = count(n_wrong_rounded_once)
    if not any(n_wrong):
        return TensorResult(name, n_elements, rounding="once" if low_rank else None)
    if low_rank and low_rank.magnitude is None:
        if not any(count(n_wrong_change_first)):
            return TensorResult(name, n_elements, rounding="change_first")
        if not any(count(n_wrong_adapter_first)):
            return TensorResult(name, n_elements, rounding="adapter_first")
    worst = every[n_wrong.index(max(n_wrong))]
    return TensorResult(name, n_elements, n_wrong=sum(n_wrong), worst=worst)


def n_wrong_rounded_once(reference: Reference, merged: Files, name: str, slab: Slab) -> int:
    """Elements of a slab that are no rounding of base + change."""
    stored = merged.rows(name, slab)
    whole = reference.replaced(slab.part)
    if whole is not None:
        return _n_false(stored == whole[slab.rows].to(stored.dtype))
    if reference.is_untouched(name) and reference.base.entries[name] == merged.entries[name] | {
        "data_offsets": reference.base.entries[name]["data_offsets"]
    }:
        as_bytes = stored.contiguous().view(torch.uint8)
        return _n_false(as_bytes == reference.base.rows(name, slab).contiguous().view(torch.uint8))
    expected = reference.slab(name, slab)
    return _n_false(is_rounded(stored, expected.total, expected.slack))


def n_wrong_change_first(
    reference: Reference,
    merged: Files,
    name: str,
    slab: Slab,
    adapter_dtype: torch.dtype = torch.float32,
) -> int:
    """The same where the change was rounded to the stored type before it was added."""
    stored = merged.rows(name, slab)
    expected = reference.slab(name, slab, adapter_dtype)
    assert expected.change is not None and expected.change_slack is not None
    # Where A·B nearly cancels out, the slack spans several numbers of the type, and the change may
    # have become any of them.
    low, high = (
        expected.base + (expected.change + sign * expected.change_slack).to(stored.dtype).double()
        for sign in (-1, 1)
    )
    slack = expected.base.abs() * ARITHMETIC
    is_right = ((low - slack).to(stored.dtype) <= stored) & (
        stored <= (high + slack).to(stored.dtype)
    )
    return _n_false(is_right & stored.isfinite())


def n_wrong_adapter_first(reference: Reference, merged: Files, name: str, slab: Slab) -> int:
    """The same where A and B were rounded to the stored type too."""
    dtype = safetensors_stream.DTYPES[merged.entries[name]["dtype"]]
    return n_wrong_change_first(reference, merged, name, slab, dtype)


def _n_false(flags: torch.Tensor) -> int:
    return int(flags.numel() - flags.count_nonzero())


def layout_difference(reference: Reference, merged: Files) -> str | None:
    """The first tensor that is missing, one too many, or of another shape; None where none is."""
    base = reference.base
    for name, entry in base.entries.items():
        if name not in merged.entries:
            if TIED.get(name) in merged.entries or is_position_table(name):
                continue  # transformers ties the one on loading, and computes the other
            return f"no tensor {name}"
        found = list(merged.entries[name]["shape"])
        whole = reference.replaced(part(name))
        expected = list(whole.shape) if whole is not None else list(entry["shape"])
        if found != expected:
            n_rows = abs(expected[0] - found[0])
            short = "short" if found[0] < expected[0] else "too many"
            rows = f", {n_rows} row{'s' if n_rows > 1 else ''} {short}" if n_rows else ""
            return f"{name} of shape {found} instead of {expected}{rows}"
    for name in merged.entries.keys() - base.entries.keys():
        twin = TIED.get(name)
        if twin is None or not torch.equal(merged.whole(name), merged.whole(twin)):
            return f"a tensor {name} that the base does not have"
    return None


def compare_all(reference: Reference, merged: Files, n_threads: int) -> Iterator[TensorResult]:
    """Every tensor of the base's files, as it is in the merged model."""
    # A slab is one thread's. Also: the mean that NF4's double quantization subtracts depends, in
    # its last bit, on how many threads add it up.
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            for name in reference.base.entries:
                if name in merged.entries:
                    yield compare(reference, merged, name, pool, n_threads)
    finally:
        torch.set_num_threads(n_before)
