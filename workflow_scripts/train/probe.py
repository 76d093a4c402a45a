"""The probe before the first step: on the real model, is attention what the plan declares?

Silent leaks between packed documents are this field's commonest damage (a mask that is dropped, a
cache that is on, a kernel that is swapped). So one packed row and one of its documents alone are
run through the very model that will train, and compared.
"""

from __future__ import annotations

from typing import Any

from workflow_scripts.data.documents import Documents
from workflow_scripts.data.packing import Row
from workflow_scripts.data.plan import Plan
from workflow_scripts.log import StageError

# Relative to the logits' spread. On tiny models in float32 packed and alone differ by 2e-6. The two
# 16-bit limits are estimates from their rounding, not measured: no GPU has run this yet.
TOLERANCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.1, "torch.float16": 0.05}


def check_attention(model: Any, documents: Documents, plan: Plan) -> None:
    """Compare the last document of a packed row with the same document alone.

    Raises:
        StageError: documents of a `best_fit` row see each other.
    """
    import torch

    from workflow_scripts.train.batches import Collator

    row = next((row for row in plan.rows if len(row) > 1), None)
    if plan.crosses_documents or row is None:
        return
    collate = Collator(documents, crosses_documents=False)
    last = row[-1]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        packed = _logits(model, collate([row]))[-last.length :]
        alone = _logits(model, collate([_alone(last)]))
    model.train(was_training)
    difference = float((packed - alone).abs().max() / alone.std())
    dtype = str(next(p for p in model.parameters() if p.requires_grad).dtype)
    if model.device.type == "cuda":
        dtype = str(model.config.dtype)
    if not difference <= TOLERANCE[dtype]:  # NaN is no agreement
        raise StageError(
            "packed documents see each other",
            where=f"document {documents.ids[last.document]}",
            found=f"logits {difference:.2g} of their spread apart from the document alone",
            expected=f"at most {TOLERANCE[dtype]:.2g}",
            to_fix="install the versions of requirements.lock: another one changed attention",
        )


def _alone(piece: Any) -> Row:
    return [piece]


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    inputs = {
        key: value.to(model.device) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key != "labels"
    }
    return model(**inputs, use_cache=False).logits[0].float()
