"""The sampler: in which order the rows of a plan are trained on, and by which process.

It knows what the plan cannot: how many processes there are, and how many micro-batches a step has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from workflow_scripts.packing.balance import order_rows
from workflow_scripts.packing.plan import Plan


class StepSampler(Sampler[int]):
    """Indices of rows, epoch by epoch, of all processes.

    Laid out as accelerate shares batches out, in turn to each process; −1 is no row, which fills
    the last step of an epoch up, so that no process is left without a partner and no row is
    trained on twice.

    Args:
        plan: its rows and their costs.
        n_ranks: processes.
        seed: with the epoch it decides the order.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        n_ranks: int,
        micro_batches_per_step: int,
        rows_per_micro_batch: int,
        seed: int,
    ) -> None:
        self._plan = plan
        self._shape = {
            "n_ranks": n_ranks,
            "micro_batches_per_step": micro_batches_per_step,
            "rows_per_micro_batch": rows_per_micro_batch,
        }
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; the Trainer calls it, also where it resumes."""
        self._epoch = epoch

    def order(self) -> np.ndarray:
        """(steps, micro-batches, ranks, rows) of the epoch, as `balance.order_rows`."""
        return order_rows(
            self._plan.training_flops,
            **self._shape,
            seed=(self._seed, self._epoch),
            pads_rows=self._plan.pads_rows,
        )

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().ravel().tolist())

    @property
    def n_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self._plan.rows) / math.prod(self._shape.values()))

    def __len__(self) -> int:
        return self.n_steps * math.prod(self._shape.values())
