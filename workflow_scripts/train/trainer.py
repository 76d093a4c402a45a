"""transformers' Trainer with the loss of packed rows: a mean over supervised tokens, whole step at
once.

Packing must not change the objective: the loss is the sum over supervised tokens divided by their
number in the whole optimizer step, over all accumulated micro-batches and processes.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from workflow_scripts.train.batches import IGNORED
from workflow_scripts.train.sampler import StepSampler


class PackedTrainer(Trainer):
    """Trainer for flat micro-batches of packed rows, of a model that `sums_loss`.

    Args:
        sampler: of the training rows.
        eval_collator: where the validation rows keep to other rules than the training rows.
    """

    def __init__(self, *, sampler: StepSampler, eval_collator: Any, **options: Any) -> None:
        super().__init__(**options)
        self._sampler = sampler
        self._eval_collator = eval_collator

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self._sampler

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum over this micro-batch ÷ supervised tokens of the whole step."""
        assert num_items_in_batch is not None and not return_outputs
        loss = model(**inputs).loss / num_items_in_batch
        # Gradients are averaged over processes afterwards; the count is already of all of them.
        return loss * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation rows, nats."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        mine = range(self.args.process_index, len(self.eval_dataset), self.args.world_size)
        rows = DataLoader(self.eval_dataset, sampler=mine, collate_fn=self._eval_collator)
        with torch.no_grad():
            for batch in rows:
                batch = self._prepare_inputs(batch)
                n_tokens = (batch["labels"] != IGNORED).sum()
                sums += torch.tensor([self.model(**batch).loss.item(), n_tokens.item()])
        total, n_tokens = self.accelerator.reduce(sums.to(self.args.device)).tolist()
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
