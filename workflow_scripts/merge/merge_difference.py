"""The probable cause of a wrong merge, in words, from the tensors that are not as they should be.

Each wrong tensor is compared with what commonly goes wrong: the change left out, or applied with
another scale; DoRA's magnitude ignored; another layer's weights; the other base; another adapter.
Tensors with the same fault are named together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from workflow_scripts.merge.merge_reference import ARITHMETIC, Expected, Reference, is_rounded
from workflow_scripts.merge.stored_tensors import StoredTensors
from workflow_scripts.merge.tensor_names import Slab

if TYPE_CHECKING:
    from workflow_scripts.merge.exact_merge import TensorResult

LAYER = r"\.layers\.(\d+)\."
# Where fewer than this share of a tensor are wrong, single numbers are damaged, not the merge.
DAMAGED_FRACTION = 0.01
# Cosine above which two weights are the same one, before and after a merge, which changes it by
# about 1 %. Two weights of a model are unrelated: their cosine is near 0.
SAME_WEIGHT = 0.9
# Cosine of a change with the expected one: below it, the adapter is another; above it, another
# state of the same.
RELATED = 0.25


def described(
    results: Sequence[TensorResult],
    reference: Reference,
    merged: StoredTensors,
    other_base: Reference | None = None,
) -> list[str]:
    """Return one line for each kind of fault, the most frequent first.

    Args:
        results: of tensors with wrong elements.
        other_base: base + adapter for the base that was not requested, where there are two.
    """
    found: dict[str, list[TensorResult]] = {}
    for result in results:
        cause = cause_of(result, reference, merged, other_base)
        found.setdefault(cause, []).append(result)
    lines = []
    for cause, group in sorted(found.items(), key=lambda item: -len(item[1])):
        names = [result.name for result in group]
        shard = only_shard(names, reference)
        where = f"{named_together(names)}{f', all of {shard.name}' if shard else ''}"
        n_wrong = sum(result.n_wrong for result in group)
        n_elements = sum(result.n_elements for result in group)
        lines.append(f"{where}: {cause} ({n_wrong:,} of {n_elements:,} numbers)")
    return lines


def cause_of(
    result: TensorResult,
    reference: Reference,
    merged: StoredTensors,
    other_base: Reference | None,
) -> str:
    """Name what is wrong with one tensor, judged by its worst slab."""
    name, slab = result.name, result.worst
    assert slab is not None
    stored = merged.rows(name, slab)
    if not stored.isfinite().all():
        return "holds NaN or infinite numbers"
    reference.prepare(name)
    whole = reference.replaced(slab.part)
    if whole is not None:
        if torch.equal(stored, reference.base.rows(name, slab).to(stored.dtype)):
            return "is the base's; the one that was trained in its place was left out"
        return "is not the one that was trained"
    expected = reference.slab(name, slab)
    if result.n_wrong < DAMAGED_FRACTION * result.n_elements:
        return "is wrong in single numbers"
    if expected.change is not None and torch.equal(stored, expected.base.to(stored.dtype)):
        return "is the base's; the adapter's change was left out"
    low_rank = reference.low_rank(slab.part)
    if low_rank is not None and low_rank.magnitude is not None:
        assert expected.change is not None and expected.change_slack is not None
        slack = expected.base.abs() * ARITHMETIC + expected.change_slack
        if is_rounded(stored, expected.base + expected.change, slack).all():
            return "is merged without DoRA's magnitude"
    if other_base is not None:
        other_base.prepare(name)
        other = other_base.slab(name, slab)
        if is_rounded(stored, other.total, other.slack).all():
            return "is merged into the other base (original for dequantized, or the reverse)"
    twin = _same_weight(stored, name, slab, reference)
    if twin is not None:
        return f"holds the weights of {twin}"
    if expected.change is None:
        return "is not the base's, and the adapter does not change it"
    return _compared_change(stored, expected)


def _compared_change(stored: torch.Tensor, expected: Expected) -> str:
    """Name what is wrong with the change that was made.

    Rounding to the stored type removes most small changes, so a change is compared with the rounded
    expected one, never with its exact value.
    """
    wanted = expected.total - expected.base
    for times in _scales(stored.double() - expected.base, wanted):
        slack = None if expected.slack is None else expected.slack * abs(times)
        is_right = is_rounded(stored, expected.base + times * wanted, slack)
        if is_right.double().mean() > 1 - DAMAGED_FRACTION:
            return f"has the adapter's change {times:.3g} times; a wrong scale (alpha ÷ rank)"
    made = (stored.double() - expected.base).flatten()
    right = (expected.total.to(stored.dtype).double() - expected.base).flatten()
    if torch.nn.functional.cosine_similarity(made, right, dim=0) < RELATED:
        return "has the change of another adapter"
    return "has the change of another state of this adapter, such as an earlier checkpoint"


def _scales(made: torch.Tensor, wanted: torch.Tensor) -> list[float]:
    """Return plausible factors between two scales, the nearest to the largest changes' first.

    A scale is alpha ÷ rank or alpha ÷ √rank, so the factors are ratios of small integers or the
    roots of such ratios.
    """
    largest = wanted.abs().flatten().topk(min(64, wanted.numel())).indices
    seen = float((made.flatten()[largest] / wanted.flatten()[largest]).median())
    ratios = {one / other for one in range(1, 17) for other in range(1, 17)}
    known = {sign * ratio**power for ratio in ratios for power in (1, 0.5) for sign in (-1, 1)}
    near = [scale for scale in known if abs(scale - seen) <= 0.1 * abs(seen)]
    return sorted(near, key=lambda scale: abs(scale - seen))[:12]


def _same_weight(stored: torch.Tensor, name: str, slab: Slab, reference: Reference) -> str | None:
    """Name the base tensor that these weights are, where it is not their own."""
    base = reference.base
    alike = [
        other for other in base.entries if other != name and base.shape(other) == base.shape(name)
    ]
    wanted = torch.nn.functional.normalize(stored.double().flatten(), dim=0)

    def cosine(other: str) -> float:
        rows = base.rows(other, slab).double().flatten()
        return float(torch.nn.functional.normalize(rows, dim=0) @ wanted)

    def is_same(other: str) -> bool:
        return torch.equal(stored, base.rows(other, slab).to(stored.dtype))

    is_twin = is_same if cosine(name) >= SAME_WEIGHT else lambda other: cosine(other) >= SAME_WEIGHT
    twin = next((other for other in alike if is_twin(other)), None)
    found = re.search(LAYER, twin or "")
    if found and twin == re.sub(LAYER, found[0], name):
        return f"layer {found[1]}"
    return twin


def only_shard(names: Sequence[str], reference: Reference) -> Path | None:
    """Return the shard whose changed tensors are exactly these; None where there is none, or the
    base has a single shard."""
    shards = {name: entry.path for name, entry in reference.base.entries.items()}
    shard = shards[names[0]]
    changed = {
        name
        for name, its_shard in shards.items()
        if its_shard == shard and not reference.is_untouched(name)
    }
    return shard if changed == set(names) and len(set(shards.values())) > 1 else None


def named_together(names: Iterable[str]) -> str:
    """Join tensor names, with their layers collected:
    `model.layers.{0-3,7}.self_attn.k_proj.weight`."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = re.search(LAYER, name)
        key = name if found is None else name.replace(found[0], ".layers.{}.", 1)
        layers.setdefault(key, []).extend([] if found is None else [int(found[1])])
    named = [
        key.replace("{}", _ranges(numbers)) if numbers else key for key, numbers in layers.items()
    ]
    shown = ", ".join(named[:4])
    return f"{shown} and {len(named) - 4} more" if len(named) > 4 else shown


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
    return text if len(runs) == 1 and runs[0][0] == runs[0][1] else f"{{{text}}}"
