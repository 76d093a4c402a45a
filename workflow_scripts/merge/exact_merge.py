"""The exact half of the merge gate: every stored number is base + adapter, rounded.

The expected value is computed in float64 (`merge_reference`). A float32 merge cannot hit it
exactly, so very near the midpoint of two numbers of the stored type either is right: each element
must be a rounding of a value within

    ARITHMETIC · (|W| + scale · |B|·|A|)

of the expected one. That is far below the rounding itself (2⁻⁹ in bfloat16), so that it cannot hide
a wrong scale, layer or adapter. Tensors that nothing changes are compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from workflow_scripts import log, parallel
from workflow_scripts.handover.gates import MergeBase
from workflow_scripts.log import StageError
from workflow_scripts.merge import merge_base
from workflow_scripts.merge.live_adapter import LiveAdapter
from workflow_scripts.merge.merge_difference import described
from workflow_scripts.merge.merge_reference import ARITHMETIC, Reference, is_between, is_rounded
from workflow_scripts.merge.safetensors_stream import DTYPES
from workflow_scripts.merge.stored_tensors import StoredTensors
from workflow_scripts.merge.tensor_names import TIED, Slab, part, slabs
from workflow_scripts.models.tensors import is_position_table

logger = log.stage_logger("check_merged")


@dataclass(frozen=True)
class TensorResult:
    """Comparison of one tensor of the merged model with the reference.

    Attributes:
        rounding: which numbers were rounded to the stored type: `once`, the sum alone (ours and
            PEFT's `merge_and_unload`); `change_first`, the change and then the sum (PEFT's
            `safe_merge`); `adapter_first`, A and B as well (PEFT with
            `autocast_adapter_dtype=False`). None where nothing was added, or none of these holds.
        n_wrong: elements that are not a rounding of the expected value.
        worst: the slab with most of them.
    """

    name: str
    n_elements: int
    n_wrong: int = 0
    rounding: str | None = None
    worst: Slab | None = None


class ExactResult(NamedTuple):
    """Comparison of the merged model's tensors with base + adapter."""

    merge_base: MergeBase
    n_tensors: int
    n_adapted_tensors: int
    roundings: Mapping[str, str]
    """Parameter → what was rounded (`TensorResult.rounding`)."""

    @property
    def rounding(self) -> str | None:
        """All kinds of `roundings`; None where there are none."""
        return ", ".join(sorted(set(self.roundings.values()))) or None


def check(
    merged: Path, checkpoint: Path, adapter: Path, base_name: MergeBase, *, has_two_bases: bool
) -> ExactResult:
    """Compare every tensor of a merged model with base + adapter.

    Args:
        merged: folder of the merged model.
        checkpoint: folder of the base model.
        adapter: folder of the adapter.
        base_name: of the base that it was merged into.
        has_two_bases: the adapter was trained in 4 bits, so that it may have been merged into the
            other base by mistake.
    Raises:
        StageError: naming the tensors that differ, and the probable cause.
    """
    live, base = LiveAdapter(adapter, checkpoint), StoredTensors(checkpoint)
    stored = StoredTensors(merged)

    def reference(name: MergeBase) -> Reference:
        return Reference(base, live, merge_base.nf4_dtype(name, adapter, checkpoint))

    expected = reference(base_name)
    results: list[TensorResult] = []
    found = layout_difference(expected, stored)
    if found is None:
        compared = compare_all(expected, stored, torch.get_num_threads())
        results += log.progress(compared, logger, total=len(base.entries), unit="tensors")
        wrong = [result for result in results if result.n_wrong]
        if wrong:
            (other_name,) = set(merge_base.BASES) - {base_name}
            other = reference(other_name) if has_two_bases else None
            lines = described(wrong, expected, stored, other)
            found = f"{len(wrong)} of {len(results)} tensors: {'; '.join(lines)}"
    if found is not None:
        raise StageError(
            "the merged model differs from base + adapter",
            where=merged,
            found=found,
            expected=f"{checkpoint} + {adapter}, each number rounded to the type that it is stored"
            " in",
            to_fix="merge again; if it differs again, please report it with this message",
        )
    return ExactResult(
        merge_base=base_name,
        n_tensors=len(results),
        n_adapted_tensors=sum(result.rounding is not None for result in results),
        roundings={part(each.name).parameter: each.rounding for each in results if each.rounding},
    )


def compare_all(
    reference: Reference, merged: StoredTensors, n_threads: int
) -> Iterator[TensorResult]:
    """Compare every tensor of the base's files that the merged model has.

    Args:
        merged: its tensors have the shapes of the reference (`layout_difference`).
    """
    # One thread per slab. Also, the last bit of the mean that NF4's double quantization subtracts
    # depends on the number of threads that add it up.
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(n_threads) as pool:
            for name in reference.base.entries:
                if name in merged.entries:
                    yield _compare(reference, merged, name, pool, n_threads)
    finally:
        torch.set_num_threads(n_before)


def _compare(
    reference: Reference,
    merged: StoredTensors,
    name: str,
    pool: ThreadPoolExecutor,
    n_threads: int,
) -> TensorResult:
    reference.prepare(name)
    n_elements = torch.Size(merged.shape(name)).numel()
    every = list(slabs(name, merged.shape(name)))

    def count(judge: Callable[..., torch.Tensor], **options: torch.dtype) -> list[int]:
        """Count the wrong elements of each slab."""

        def n_wrong(slab: Slab) -> int:
            is_right = judge(reference, merged, name, slab, **options)
            return int(is_right.numel() - is_right.count_nonzero())

        return list(parallel.ahead(pool, n_wrong, every, n_ahead=2 * n_threads))

    low_rank = reference.low_rank(part(name))
    n_wrong = count(is_rounded_once)
    if not any(n_wrong):
        return TensorResult(name, n_elements, rounding="once" if low_rank else None)
    if low_rank and low_rank.magnitude is None:
        if not any(count(is_change_rounded_first)):
            return TensorResult(name, n_elements, rounding="change_first")
        dtype = DTYPES[merged.entries[name].dtype]
        if not any(count(is_change_rounded_first, adapter_dtype=dtype)):
            return TensorResult(name, n_elements, rounding="adapter_first")
    worst = every[n_wrong.index(max(n_wrong))]
    return TensorResult(name, n_elements, n_wrong=sum(n_wrong), worst=worst)


def is_rounded_once(
    reference: Reference, merged: StoredTensors, name: str, slab: Slab
) -> torch.Tensor:
    """Flag the elements of a slab that are a rounding of base + change."""
    stored = merged.rows(name, slab)
    whole = reference.replaced(slab.part)
    if whole is not None:
        return stored == whole[slab.rows].to(stored.dtype)
    if reference.is_untouched(name):
        base = reference.base.rows(name, slab)
        if base.dtype == stored.dtype:
            return _as_bytes(stored) == _as_bytes(base)
    expected = reference.slab(name, slab)
    return is_rounded(stored, expected.total, expected.slack)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def is_change_rounded_first(
    reference: Reference,
    merged: StoredTensors,
    name: str,
    slab: Slab,
    adapter_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Flag the elements that are right if the change was rounded to the stored type before it was
    added.

    Args:
        adapter_dtype: to which A and B were rounded before that.
    """
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
    return is_between(stored, low - slack, high + slack)


def layout_difference(reference: Reference, merged: StoredTensors) -> str | None:
    """Name the first tensor that is missing, extra, or of another shape; None if none is."""
    base = reference.base
    for name in base.entries:
        if name not in merged.entries:
            if TIED.get(name) in merged.entries or is_position_table(name):
                continue  # transformers ties the one on loading, and computes the other
            return f"no tensor {name}"
        whole = reference.replaced(part(name))
        found = list(merged.shape(name))
        expected = list(base.shape(name) if whole is None else whole.shape)
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
