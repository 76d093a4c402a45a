"""The probe before the first step: is attention on the real model what the plan declares?

Attention that leaks between packed documents is a common and silent error (a mask is dropped, a
cache is on, a kernel is swapped). The probe exchanges tokens of one packed document and checks that
exactly those hidden states change that the plan's strategy allows. The shapes stay the same, so a
token that sees none of the exchanged ones is computed to the same bits: the probe needs neither a
tolerance nor a second implementation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workflow_scripts.log import StageError
from workflow_scripts.packing.plan import Plan
from workflow_scripts.tokens.documents import Documents
from workflow_scripts.train.batches import Collator, Segments

if TYPE_CHECKING:
    from torch import Tensor

EDGES = 16  # places at most where the far edge of a window is tested
TO_FIX = "install the versions of requirements.lock: another version changed attention"


def check_attention(
    model: Any, documents: Documents, plan: Plan, layer_windows: Sequence[int | None]
) -> dict[str, int]:
    """Exchange tokens and check what moves: documents in the whole model, windows in one layer.

    A token moves if its hidden state before the output layer changes; logits are computed from that
    token by token. The model, its mode and the random state are left as they were.

    Args:
        model: a causal language model, with or without PEFT's adapter, in any mode.
        layer_windows: keys that a query of each layer sees, itself included (facts.json); None is
            full causal.
    Returns:
        Counts for the log: tokens of the micro-batch, exchanged and moved; windows that were
        tested, and windows that are longer than the rows.
    Raises:
        StageError: attention is not what the plan and the facts declare.
    """
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    with torch.no_grad(), _without_experts(decoder):
        return {
            **_check_documents(decoder, documents, plan),
            **_check_windows(decoder, documents, plan, layer_windows),
        }


def _check_documents(decoder: Any, documents: Documents, plan: Plan) -> dict[str, int]:
    """Exchange the second half of one document in a micro-batch of two rows."""
    row, other_rows = _probed_rows(plan)
    at = (len(row) - 1) // 2  # a document between others, if the row has three
    ends = np.cumsum([piece.length for piece in row]).tolist()
    start, end = ends[at] - row[at].length, ends[at]
    exchanged = slice((start + end) // 2, end)
    collate = Collator(
        documents, crosses_documents=plan.crosses_documents, pads_rows=plan.pads_rows
    )
    moved = _moved(decoder, collate([row, *other_rows]), exchanged)

    reached = ends[-1] if plan.crosses_documents else end
    where = f"document {documents[row[at].document].id}, tokens exchanged in it"
    outside = np.flatnonzero(np.concatenate([moved[: exchanged.start], moved[reached:]]))
    if len(outside):
        raise StageError(
            "attention is not what the plan declares",
            where=where,
            found=f"{len(outside)} tokens moved that must not see them",
            expected=f"none (strategy {plan.strategy})",
            to_fix=TO_FIX,
        )
    if not moved[exchanged].any():
        raise StageError("the model does not see its input", where=where, found="nothing moved")
    if plan.crosses_documents and at + 1 < len(row) and not moved[end : ends[at + 1]].any():
        raise StageError(
            "attention is not what the plan declares",
            where=where,
            found="nothing moved in the next document",
            expected=f"every later document of the row sees it (strategy {plan.strategy})",
            to_fix=TO_FIX,
        )
    return {
        "n_tokens": len(moved),
        "n_exchanged_tokens": exchanged.stop - exchanged.start,
        "n_moved_tokens": int(moved.sum()),
    }


def _probed_rows(plan: Plan) -> tuple[list[Any], list[list[Any]]]:
    """The shortest row of several documents, else the shortest row; and another row, if any."""
    by_length = np.argsort(plan.rows.n_tokens, kind="stable")
    has_several = np.diff(plan.rows.first_piece)[by_length] > 1
    first = int(np.argmax(has_several))
    others = np.delete(by_length, first)[:1]
    return plan.rows[int(by_length[first])], [plan.rows[index] for index in others.tolist()]


def _check_windows(
    decoder: Any, documents: Documents, plan: Plan, layer_windows: Sequence[int | None]
) -> dict[str, int]:
    """Test how far back tokens see, in the first layer of each window alone.

    The segment is two windows long, and its last token must not see the first of them. Then single
    tokens are exchanged: the last token to see one must be exactly the window's length away.
    Several places are tried, as a token of little weight may move nothing in 16 bits.
    """
    tokens = documents[int(np.argmax(documents.lengths))].input_ids
    windows = dict.fromkeys(layer_windows)
    probed = [window for window in windows if window is None or window < plan.row_tokens]
    for window in probed:
        n_tokens = plan.row_tokens if window is None else min(plan.row_tokens, 2 * window)
        oldest = 0 if window is None else n_tokens - window
        segment = _one_segment(torch.from_numpy(np.resize(tokens, n_tokens).astype(np.int64)))
        layer = layer_windows.index(window)
        with _one_layer(decoder, layer):
            is_seen_beyond = oldest > 0 and _moved(decoder, segment, slice(0, oldest))[-1]
            is_seen_within = False
            for at in _places(oldest) if window else range(min(EDGES, n_tokens)):
                if is_seen_beyond or is_seen_within:
                    break
                moved = _moved(decoder, segment, slice(at, at + 1))
                last = at + window - 1 if window else n_tokens - 1
                is_seen_beyond = bool(moved[last + 1 :].any())
                is_seen_within = bool(moved[last])
        if is_seen_beyond or not is_seen_within:
            raise StageError(
                "a layer's window is not the model's",
                where=f"layer {layer}, the last token of a segment of {n_tokens}",
                found=(
                    f"it sees tokens {window} or more back"
                    if is_seen_beyond
                    else f"it does not see the token {window - 1} back"
                    if window
                    else f"it sees none of the first {min(EDGES, n_tokens)} tokens"
                ),
                expected=f"sliding_window {'null' if window is None else window} (facts.json)",
                to_fix=TO_FIX,
            )
    return {"n_windows": len(probed), "n_windows_beyond_rows": len(windows) - len(probed)}


def _places(oldest: int) -> list[int]:
    """Tokens to exchange one by one: spread evenly from the segment's first token to the oldest one
    that its last token sees."""
    return sorted({oldest * number // (EDGES - 1) for number in range(EDGES)}, reverse=True)


def _moved(decoder: Any, batch: Segments, exchanged: slice) -> np.ndarray:
    """(tokens,) bool: hidden states whose bits change when tokens are exchanged."""
    tokens = batch["input_ids"].clone()
    # The next token of the vocabulary is certainly a different one.
    tokens[:, exchanged] += 1
    tokens %= decoder.config.vocab_size
    other: Segments = {**batch, "input_ids": tokens}
    before, after = (_hidden_states(decoder, each) for each in (batch, other))
    return (before != after).any(dim=-1).cpu().numpy()


def _hidden_states(decoder: Any, batch: Segments) -> Tensor:
    """Hidden states before the output layer, (tokens, hidden_size)."""
    inputs = {
        key: value.to(decoder.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    # The random state is restored each time, so dropout is the same and training is not affected.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        hidden = decoder(**inputs, use_cache=False).last_hidden_state[0]
    if not torch.isfinite(hidden).all():
        raise StageError("the model's hidden states are not finite", found="inf or NaN")
    return hidden


def _one_segment(tokens: Tensor) -> Segments:
    n_tokens = len(tokens)
    bounds = torch.tensor([0, n_tokens], dtype=torch.int32)
    return {
        "input_ids": tokens[None],
        "position_ids": torch.arange(n_tokens)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": n_tokens,
        "max_length_k": n_tokens,
    }


@contextmanager
def _one_layer(decoder: Any, index: int) -> Iterator[None]:
    """Reduce the decoder to embedding, one layer and final norm.

    The layers before it pass their input on, so that it keeps its index, by which some models find
    its window.
    """

    class Passes(torch.nn.Module):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

    layers = decoder.layers
    decoder.layers = torch.nn.ModuleList([*(Passes() for _ in range(index)), layers[index]])
    try:
        yield
    finally:
        decoder.layers = layers


@contextmanager
def _without_experts(decoder: Any) -> Iterator[None]:
    """Let experts return zeros.

    Experts work token by token, but in groups whose size depends on the other tokens. The size
    changes the rounding, which may lead the next layer to choose another expert.
    """
    hooks = [
        layer.mlp.register_forward_hook(lambda _, __, output: torch.zeros_like(output))
        for layer in decoder.layers
        if hasattr(layer.mlp, "experts")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
