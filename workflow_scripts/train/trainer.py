"""transformers' Trainer with the loss of packed rows: a mean over supervised tokens, whole step at
once.

Packing must not change the objective: the loss is the sum over supervised tokens divided by their
number in the whole optimizer step, over all accumulated micro-batches and processes. Logits are
made at supervised positions alone, which leaves out a
third of the output layer's work on the demo's chats.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from workflow_scripts.train.batches import IGNORED
from workflow_scripts.train.loss import summed_cross_entropy


def summed_loss(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Negative log-likelihood of the supervised tokens of a flat micro-batch, summed, nats.

    Args:
        batch: of `Collator`.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")[0]
    predicting = (labels[1:] != IGNORED).nonzero()[:, 0]
    causal_model = model.get_base_model()
    # An explicit use_cache: with a cache transformers would look for boundaries and a mask of its
    # own.
    hidden = causal_model.model(**inputs, use_cache=False).last_hidden_state[0]
    return summed_cross_entropy(
        hidden[predicting], causal_model.lm_head.weight, labels[predicting + 1]
    )


class PackedTrainer(Trainer):
    """Trainer for flat micro-batches of packed rows."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum over this micro-batch ÷ supervised tokens of the whole step."""
        assert num_items_in_batch is not None and not return_outputs
        loss = summed_loss(model, inputs) / num_items_in_batch
        # Gradients are averaged over processes afterwards; the count is already of all of them.
        return loss * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation rows, nats."""
        self.model.eval()
        total, n_tokens = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader():
                batch = self._prepare_inputs(batch)
                total += summed_loss(self.model, batch).item()
                n_tokens += int((batch["labels"] != IGNORED).sum())
        metrics = {"eval_loss": total / n_tokens}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.model.train()
        return metrics


class Throughput(TrainerCallback):
    """Seconds of each optimizer step, without the time of evaluations."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._started = math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[state.global_step] = time.perf_counter() - self._started
