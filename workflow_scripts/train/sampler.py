"""The sampler: the order in which rows of a plan are trained on, and on which process.

Both depend on the number of processes and of micro-batches per step, which the plan does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from workflow_scripts.packing.balance import order_rows
from workflow_scripts.packing.plan import Plan


class StepSampler(Sampler[int]):
    """Indices of rows for all processes, one epoch per iteration.

    In the order in which accelerate deals batches to the processes. The last step of an epoch is
    filled up with −1, which stands for no row, so that every process takes part in it and no row is
    trained on twice.

    Args:
        plan: the rows and their costs.
        n_ranks: number of processes.
        seed: decides the order, together with the epoch.
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
        """Set the epoch of the next iteration; the Trainer calls this, also when it resumes."""
        self._epoch = epoch

    def order(self) -> np.ndarray:
        """Row indices of the epoch, (steps, micro-batches, ranks, rows): `balance.order_rows`."""
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
        """Optimizer steps per epoch."""
        return math.ceil(len(self._plan.rows) / math.prod(self._shape.values()))

    def __len__(self) -> int:
        return self.n_steps * math.prod(self._shape.values())
