"""Cross-entropy through a frozen output layer, without ever holding the logits of a whole
micro-batch.

Logits of 32k tokens × 131k words would be 16 GiB in float32. Here they are made a chunk of tokens
at a time, turned into the loss and the gradient of the hidden states at once, and dropped, so that
a chunk's logits are all that exists. After the fused linear cross-entropy of Liger kernels,
arXiv:2410.10989 §3.2, whose output layer may train; ours is frozen, as it is in LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutput

from workflow_scripts.train.batches import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of a chunk: 16 MiB in float32. Below 32 MiB glibc keeps the block for the next chunk
# instead of returning it to the system, whose fresh pages cost more than the products (measured on
# 2 CPU cores).
CHUNK_ELEMENTS = 4 * 1024 * 1024


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of `targets`, summed, nats; equal to cross-entropy of `hidden @
    weight.T`.

    The price: gradients are made in the forward pass, so a second derivative does not exist.

    Args:
        hidden: (tokens, hidden_size), what the output layer reads.
        weight: (vocabulary, hidden_size), the output layer's, frozen.
        targets: (tokens,) int64, each the token to predict.
    Returns:
        A float32 scalar; its gradient reaches `hidden`.
    Raises:
        ValueError: `weight` wants a gradient.
    """
    if weight.requires_grad:
        raise ValueError(
            "summed_cross_entropy: the output layer trains; its gradient is not made here"
        )
    return _SummedCrossEntropy.apply(hidden, weight, targets)


def sum_loss(causal_model: PreTrainedModel) -> None:
    """Make a causal model's forward pass return the summed loss wherever it is given labels.

    It is the forward pass that does it, as what shards or replicates a model (DDP, FSDP) listens
    there. Logits are made at supervised positions alone, which leaves out a third of the output
    layer's work on the demo's chats.

    Args:
        causal_model: with `model` and a frozen `lm_head`. Its `forward` is replaced; the new one
            takes a batch of `Collator` and returns `loss`, in nats, and no logits.
    """
    plain_forward = causal_model.forward

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        options |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if labels is None:
            return plain_forward(**options)
        # With a cache transformers would look for boundaries and a mask of its own.
        hidden = causal_model.model(**options | {"use_cache": False}).last_hidden_state[0]
        predicting = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        loss = summed_cross_entropy(
            hidden[predicting], causal_model.lm_head.weight, labels[0, predicting + 1]
        )
        return CausalLMOutput(loss=loss)

    causal_model.forward = forward


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        chunk_tokens = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            wanted = targets[chunk, None]
            logits = (hidden[chunk].to(weight.dtype) @ weight.T).float()
            log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
            total += (log_total - logits.gather(1, wanted)).sum()
            if gradient is not None:
                # d/dlogits of −log softmax is softmax − one-hot.
                probabilities = logits.sub_(log_total).exp_()
                probabilities.scatter_add_(
                    1, wanted, torch.full_like(wanted, -1, dtype=probabilities.dtype)
                )
                gradient[chunk] = (probabilities.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * upstream), None, None
