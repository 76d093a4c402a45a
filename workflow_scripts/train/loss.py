"""Cross-entropy through the output layer, without holding the logits of a whole micro-batch.

Logits of 32k tokens × 131k vocabulary entries would take 16 GiB in float32. Here they are computed
for one chunk of tokens at a time, turned at once into the loss and the gradients of the hidden
states (and of the output layer's weight, if it trains), and dropped. After the fused linear
cross-entropy of Liger kernels, arXiv:2410.10989 §3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from workflow_scripts.train.batches import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Logits of a chunk on a CPU: 16 MiB in float32. Below 32 MiB glibc reuses the block for the next
# chunk; fresh pages from the system would cost more time than the products (measured on 2 CPU
# cores).
CHUNK_ELEMENTS = 4 * 1024 * 1024
# On a GPU 256 MiB: 2048 tokens × 32k vocabulary entries, which keeps the matrix units busy.
CUDA_CHUNK_ELEMENTS = 64 * 1024 * 1024


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Negative log-likelihood of `targets`, summed, in nats: the cross-entropy of `hidden @
    weight.T`.

    The products use autocast's type if it is on, else the weight's; all sums are float32. The cost:
    the forward pass computes the gradients, so there is no second derivative, and the gradient of a
    weight that trains briefly exists twice.

    Args:
        hidden: (tokens, hidden_size), input of the output layer.
        weight: (vocabulary, hidden_size), the output layer's, frozen or not.
        targets: (tokens,) int64, the token to predict at each position.
    Returns:
        A float32 scalar, differentiable in `hidden` and `weight`.
    """
    return _SummedCrossEntropy.apply(hidden, weight, targets)


def sum_loss(causal_model: PreTrainedModel, *, router_loss_coefficient: float = 0.0) -> None:
    """Make a causal model's forward pass return the summed loss when it is given labels.

    The loss is part of the forward pass because DDP and FSDP attach to that. Logits are computed
    only at supervised positions, which saves a third of the output layer's work on the demo's
    chats.

    Args:
        causal_model: a model with `model` and `lm_head` (PEFT may have replaced `lm_head` by a copy
            that trains). Its `forward` is replaced. The new one takes a batch of `Collator` and
            returns `loss`, in nats, without logits. If the batch lacks `predicting`, the positions
            are searched for, which on a GPU waits for all queued work.
        router_loss_coefficient: if above 0, training adds this multiple of the mixture's
            load-balancing loss once per supervised token, so that dividing a step's loss by its
            supervised tokens leaves their mean.
    """
    plain_forward = causal_model.forward

    def forward(
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        predicting: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        options |= {"input_ids": input_ids, "attention_mask": attention_mask}
        if labels is None:
            return plain_forward(**options)
        # A validation loss contains no load-balancing loss.
        is_balanced = router_loss_coefficient > 0 and causal_model.training
        if is_balanced:
            options["output_router_logits"] = True
        # With a cache transformers would derive segments and a mask itself.
        outputs = causal_model.model(**options | {"use_cache": False})
        if predicting is None:
            predicting = (labels[0, 1:] != IGNORED).nonzero()[:, 0]
        loss = summed_cross_entropy(
            outputs.last_hidden_state[0, predicting],
            causal_model.lm_head.weight,
            labels[0, predicting + 1],
        )
        if is_balanced:
            loss = loss + router_loss_coefficient * len(predicting) * _load_balancing_loss(
                causal_model, outputs.router_logits
            )
        return CausalLMOutput(loss=loss)

    causal_model.forward = forward


def _load_balancing_loss(
    causal_model: Any, router_logits: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """1 if tokens are spread evenly over the experts, more if not. Source: arXiv:2101.03961."""
    loss = load_balancing_loss_func(
        router_logits,  # type: ignore[arg-type]  # transformers annotates a tuple of one layer
        causal_model.num_experts,
        causal_model.num_experts_per_tok,
    )
    assert isinstance(loss, torch.Tensor)  # an int only if no logits are given
    return loss


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        )
        matrix = weight.to(dtype)
        n_elements = CUDA_CHUNK_ELEMENTS if device == "cuda" else CHUNK_ELEMENTS
        chunk_tokens = max(1, n_elements // weight.shape[0])
        with torch.autocast(device, enabled=False):
            for start in range(0, len(targets), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                wanted = targets[chunk, None]
                states = hidden[chunk].to(dtype)
                logits = (states @ matrix.T).float()
                log_total = torch.logsumexp(logits, dim=-1, keepdim=True)
                total += (log_total - logits.gather(1, wanted)).sum()
                if of_hidden is None and of_weight is None:
                    continue
                # d/dlogits of −log softmax is softmax − one-hot.
                of_logits = logits.sub_(log_total).exp_()
                of_logits.scatter_add_(
                    1, wanted, torch.full_like(wanted, -1, dtype=of_logits.dtype)
                )
                of_logits = of_logits.to(dtype)
                if of_hidden is not None:
                    of_hidden[chunk] = (of_logits @ matrix).to(hidden.dtype)
                if of_weight is not None:
                    of_weight += of_logits.T @ states
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(
        ctx: Any, upstream: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * upstream,
            None if of_weight is None else (of_weight * upstream).to(ctx.weight_dtype),
            None,
        )
