"""What a training run costs, step by step: time, tokens, memory, and the arithmetic it needed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.resident_memory import reset_peak, resident_bytes
from workflow_scripts import log
from workflow_scripts.packing.cost import CostModel, attention_pairs


@dataclass
class Meter:
    """Watches a Trainer from its callbacks and its collator."""

    cost: CostModel
    """Of the model's shape."""
    n_warm_up: int
    """Steps that are not measured; the first never is."""
    micro_batches_per_step: int = 1
    most_seconds: float | None = None
    """Of measured steps, after which training stops; None trains on."""
    ends: list[float] = field(default_factory=list)
    """Clock at the end of each step."""
    lengths: list[list[int]] = field(default_factory=list)
    """Of the documents, by micro-batch."""
    n_supervised: list[int] = field(default_factory=list)
    n_computed: list[int] = field(default_factory=list)
    """Padding included."""
    memory_before_bytes: int = 0
    peak_memory_bytes: int = 0
    peak_reserved_bytes: int | None = None
    """By the GPU's allocator, gaps between blocks included."""

    def watch(self, trainer: Any, lengths: Callable[[Any], list[int]]) -> Any:
        """The trainer, measured from now on.

        Args:
            lengths: of the documents that a list of its examples holds.
        """
        from workflow_scripts.train.batches import IGNORED

        collate = trainer.data_collator

        def counted(examples: Any) -> dict[str, Any]:
            batch = collate(examples)
            self.lengths.append(lengths(examples))
            self.n_supervised.append(int((batch["labels"][:, 1:] != IGNORED).sum()))
            self.n_computed.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        trainer.add_callback(self._callback())
        return trainer

    def _callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        meter = self
        cuda = torch.cuda.is_available()

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    meter.memory_before_bytes = torch.cuda.memory_allocated()
                else:
                    reset_peak()
                    meter.memory_before_bytes = resident_bytes("VmRSS")

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if cuda:
                    torch.cuda.synchronize()
                    meter.peak_memory_bytes = torch.cuda.max_memory_allocated()
                    meter.peak_reserved_bytes = torch.cuda.max_memory_reserved()
                else:
                    # Linux counts both a little late, so that the peak may lie below.
                    meter.peak_memory_bytes = max(
                        resident_bytes("VmHWM"), meter.memory_before_bytes
                    )
                meter.ends.append(time.perf_counter())
                if meter.has_measured_enough():
                    control.should_training_stop = True

        return Callback()

    @property
    def _first_measured(self) -> int:
        return max(1, self.n_warm_up)

    def has_measured_enough(self) -> bool:
        """Two measured steps at least, and as long as was asked for."""
        measured = self.ends[self._first_measured - 1 :]
        if self.most_seconds is None or len(measured) < 3:
            return False
        return measured[-1] - measured[0] >= self.most_seconds

    def measured(self, trainer: Any, *, n_checkpointed_layers: int) -> dict[str, Any]:
        """The figures of a run; a step's time is that between its end and the last one's.

        Args:
            n_checkpointed_layers: computed a second time in the backward pass.
        Raises:
            StageError: there are no more steps than those to warm up, or more than one epoch; a
                loss or gradient norm is not finite; every gradient was zero.
        """
        from workflow_scripts.train.adapter_files import read_history

        n_steps = len(self.ends)
        if n_steps <= self._first_measured:
            raise log.StageError(
                "too few steps to measure",
                found=n_steps,
                expected=f"more than {self._first_measured}",
            )
        if trainer.state.epoch > 1 + 1e-6:
            # The last step of an epoch is short, so which micro-batches were whose is not known.
            raise log.StageError(
                "more than an epoch was trained", found=trainer.state.epoch, expected="at most 1"
            )
        history = read_history(trainer.state.log_history).train
        seconds = [self.ends[at] - self.ends[at - 1] for at in range(self._first_measured, n_steps)]
        micro_batches = slice(
            self._first_measured * self.micro_batches_per_step,
            n_steps * self.micro_batches_per_step,
        )
        lengths = [length for batch in self.lengths[micro_batches] for length in batch]
        n_tokens, n_computed = sum(lengths), sum(self.n_computed[micro_batches])
        n_supervised = sum(self.n_supervised[micro_batches])
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        return {
            "attention": trainer.model.config._attn_implementation,
            "adapter_dtype": str(trained[0].dtype).removeprefix("torch."),
            "n_trainable_parameters": sum(p.numel() for p in trained),
            "n_checkpointed_layers": n_checkpointed_layers,
            "micro_batches_per_step": self.micro_batches_per_step,
            "n_steps": n_steps,
            "n_steps_measured": len(seconds),
            "n_tokens_measured": n_tokens,
            "duration_seconds": sum(seconds),
            "tokens_per_second": n_tokens / sum(seconds),
            "supervised_tokens_per_second": n_supervised / sum(seconds),
            "step_median_seconds": statistics.median(seconds),
            "step_mean_tokens": n_tokens / len(seconds),
            "padding_fraction": 1 - n_tokens / n_computed,
            **self.arithmetic(
                lengths, n_supervised, sum(seconds), n_checkpointed_layers=n_checkpointed_layers
            ),
            "memory_before_bytes": self.memory_before_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "peak_reserved_bytes": self.peak_reserved_bytes,
            "training_memory_bytes": self.peak_memory_bytes - self.memory_before_bytes,
            "first_loss_nats_per_token": history[0].loss_nats_per_token,
            "final_loss_nats_per_token": history[-1].loss_nats_per_token,
            "smallest_gradient_norm": min(entry.gradient_norm for entry in history),
            "median_gradient_norm": statistics.median(e.gradient_norm for e in history),
        }

    def arithmetic(
        self,
        lengths: Sequence[int],
        n_supervised: int,
        seconds: float,
        *,
        n_checkpointed_layers: int,
    ) -> dict[str, float]:
        """Operations a second that the documents need, whatever else a contestant computed.

        Padding, logits of tokens without a label and pairs that a mask hides are not counted, so
        that the figure is the same work for everyone. Recomputing is apart, attention too.

        Args:
            lengths: tokens of documents.
            n_supervised: tokens with a label.
        """
        cost, n_tokens = self.cost, sum(lengths)
        linear = cost.linear_flops_per_token * n_tokens
        pairs = sum(int(attention_pairs(lengths, window).sum()) for window in cost.layer_windows)
        checkpointed = n_checkpointed_layers / len(cost.layer_windows)
        return {
            "linear_flops_per_second": (
                linear + cost.output_flops_per_supervised_token * n_supervised
            )
            / seconds,
            # 2 of the 6 operations a weight and token: the forward pass once more.
            "recomputed_linear_flops_per_second": checkpointed * linear / 2 / seconds,
            "attention_flops_per_second": cost.attention_flops_per_pair * pairs / seconds,
        }
