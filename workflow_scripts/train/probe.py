"""The probe before the first step: on the real model, is attention what the plan declares?

Silent leaks between packed documents are this field's commonest damage (a mask that is dropped, a
cache that is on, a kernel that is swapped). So tokens of one packed document are exchanged, and
what moves must be what the plan's strategy says, to the last bit: the shapes stay the same, so a
token that sees none of the exchanged ones is computed alike. No tolerance, and no second
implementation to compare with.
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

EDGES = 16  # places where the far edge of a window is tried, until one tells
TO_FIX = "install the versions of requirements.lock: another one changed attention"


def check_attention(
    model: Any, documents: Documents, plan: Plan, layer_windows: Sequence[int | None]
) -> dict[str, int]:
    """Exchange tokens, and see what moves: documents in the whole model, windows in one layer.

    Hidden states in front of the output layer stand for the logits, which are made of them token by
    token. The model is left as it was, its mode and the random state included.

    Args:
        model: a causal language model, with or without PEFT's adapter, in any mode.
        layer_windows: keys a query of each layer sees, itself included (facts.json); None is full
            causal.
    Returns:
        What was probed: tokens of the micro-batch, exchanged and moved; windows seen, and windows
        that no row is long enough to tell.
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
    """Two rows in a micro-batch, the latter half of one document of the first exchanged."""
    row, other_rows = _probed_rows(plan)
    at = (len(row) - 1) // 2  # a document with others before and behind it, where there is one
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
            found=f"{len(outside)} tokens moved before it or out of its reach",
            expected=f"none (strategy {plan.strategy})",
            to_fix=TO_FIX,
        )
    if not moved[exchanged].any():
        raise StageError("the model does not see its tokens", where=where, found="nothing moved")
    if plan.crosses_documents and at + 1 < len(row) and not moved[end : ends[at + 1]].any():
        raise StageError(
            "attention is not what the plan declares",
            where=where,
            found="nothing moved in the document behind it",
            expected=f"all that follows in the row sees it (strategy {plan.strategy})",
            to_fix=TO_FIX,
        )
    return {
        "n_tokens": len(moved),
        "n_exchanged_tokens": exchanged.stop - exchanged.start,
        "n_moved_tokens": int(moved.sum()),
    }


def _probed_rows(plan: Plan) -> tuple[list[Any], list[list[Any]]]:
    """The shortest row of several documents, else of any; and another row, where there is one."""
    by_length = np.argsort(plan.rows.n_tokens, kind="stable")
    has_several = np.diff(plan.rows.first_piece)[by_length] > 1
    first = int(np.argmax(has_several))
    others = np.delete(by_length, first)[:1]
    return plan.rows[int(by_length[first])], [plan.rows[index] for index in others.tolist()]


def _check_windows(
    decoder: Any, documents: Documents, plan: Plan, layer_windows: Sequence[int | None]
) -> dict[str, int]:
    """The first layer of each window by itself: how far back the tokens of a segment see directly.

    The segment is two windows long: the last token must see nothing of the older one. Then one
    token at a time is exchanged: the last one to see it is a window further, neither more nor less.
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
    """Tokens to exchange one by one, spread over those that the last token of the segment does not
    see and the oldest that it does."""
    return sorted({oldest * number // (EDGES - 1) for number in range(EDGES)}, reverse=True)


def _moved(decoder: Any, batch: Segments, exchanged: slice) -> np.ndarray:
    """(tokens,) bool: hidden states that are not the same bits with other tokens in that place."""
    tokens = batch["input_ids"].clone()
    # The next token of the vocabulary: another one for sure.
    tokens[:, exchanged] += 1
    tokens %= decoder.config.vocab_size
    other: Segments = {**batch, "input_ids": tokens}
    before, after = (_hidden_states(decoder, each) for each in (batch, other))
    return (before != after).any(dim=-1).cpu().numpy()


def _hidden_states(decoder: Any, batch: Segments) -> Tensor:
    """(tokens, hidden_size), in front of the output layer."""
    inputs = {
        key: value.to(decoder.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
        if key != "labels"
    }
    # The state of random numbers is put back each time: dropout falls alike, and training's too.
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
    """Embedding, that layer, final norm. The layers before it hand on what they get, so that it
    keeps its number, by which some models find its window."""

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
    """Experts give nothing. They work token by token, but on groups whose size the other tokens
    decide, and with it the rounding, which may then choose another expert in the next layer."""
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
