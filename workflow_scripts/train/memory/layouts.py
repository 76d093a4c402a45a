"""The layouts that the settings leave open: memory and time of each, predicted once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from workflow_scripts.handover.training import Candidate, Setup
from workflow_scripts.log import StageError
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.train.memory.prediction import predict
from workflow_scripts.train.memory.shape import PlannedRun, Shape

# Layouts whose times differ by less count as equally fast; the smaller one is taken.
EQUAL_SPEED = 0.02
# Operations in the time that a byte moves, on GPUs since Ampere (A100: 312 TFLOP/s ÷ 1.6 TB/s).
FLOPS_PER_BYTE = 200
# The table leaves out layouts that need more than this multiple of the limit.
FAR = 3


@dataclass(frozen=True)
class Layouts:
    """Every layout that the settings of a run leave open, with its memory and its time.

    The choice, the refusal, the table and `memory_plan.json` all read these candidates.
    """

    run: PlannedRun
    candidates: tuple[Candidate, ...]

    @classmethod
    def of(cls, run: PlannedRun) -> Layouts:
        """Predict every layout.

        Raises:
            StageError: the rows of a step cannot be divided over the GPUs, or those of a GPU into
                micro-batches.
        """
        return cls(run, tuple(_candidates(run)))

    @property
    def smallest(self) -> Candidate:
        """The candidate with the lowest peak."""
        return min(self.candidates, key=lambda one: one.peak)

    def fastest(self, limit: float) -> Candidate | None:
        """The fastest candidate of at most `limit` bytes; the smallest of equally fast ones.

        One that offloads is taken only where no other fits.
        """
        fitting = [one for one in self.candidates if one.peak <= limit]
        fitting = [one for one in fitting if not one.offloads_activations] or fitting
        if not fitting:
            return None
        bound = min(one.flops_per_token for one in fitting) * (1 + EQUAL_SPEED)
        equal = [one for one in fitting if one.flops_per_token <= bound]
        return min(equal, key=lambda one: (one.peak, one.flops_per_token))

    def table_rows(self, *, chosen: Candidate | None, limit: float) -> list[str]:
        """One line per layout, the largest first, sizes in GB.

        Parts that are 0 in every layout are left out, as are layouts far beyond the limit and most
        numbers of checkpointed layers.
        """
        n_layers = max(one.n_checkpointed_layers for one in self.candidates)
        telling = {0, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers}
        shows_all = len(self.candidates) < 12
        shown = [
            (one, one.parts_bytes.by_name())
            for one in self.candidates
            if one == chosen
            or (shows_all or one.n_checkpointed_layers in telling)
            and one.peak <= FAR * max(limit, self.smallest.peak)
        ]
        parts = [name for name in shown[0][1] if any(sizes[name] for _, sizes in shown)]
        lines = [
            ["rows", "recomputed", "offloads", *(name.split("_")[0] for name in parts)]
            + ["peak", "time", ""]
        ]
        best = min(one.flops_per_token for one in self.candidates)
        lines += [
            [
                str(one.rows_per_micro_batch),
                str(one.n_checkpointed_layers),
                "yes" if one.offloads_activations else "no",
                *(f"{sizes[name] / 1e9:.2f}" for name in parts),
                f"{one.peak / 1e9:.2f}",
                f"{one.flops_per_token / best:.2f}",
                "chosen" if one == chosen else "fits" if one.peak <= limit else "too large",
            ]
            for one, sizes in sorted(shown, key=lambda pair: -pair[0].peak)
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return [
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in lines
        ]


def _candidates(run: PlannedRun) -> Iterator[Candidate]:
    offloads = run.training.offload_activations
    n_layers = run.facts.n_layers
    for n_rows in _micro_batch_rows(run):
        for n_checkpointed in _checkpointed_layers(run):
            for is_offloaded in (False, True) if offloads == "auto" else (offloads,):
                # Only checkpointed layers are offloaded; `auto` does so where all of them are.
                needed = n_layers if offloads == "auto" else 1
                if not is_offloaded or n_checkpointed >= needed:
                    setup = Setup(
                        rows_per_micro_batch=n_rows,
                        n_checkpointed_layers=n_checkpointed,
                        offloads_activations=is_offloaded,
                    )
                    yield Candidate(
                        **dict(setup),
                        parts_bytes=predict(run, setup),
                        flops_per_token=_flops_per_token(
                            run.shape, n_tokens=n_rows * run.row_tokens, setup=setup
                        ),
                    )


def _micro_batch_rows(run: PlannedRun) -> list[int]:
    """Rows of a micro-batch that divide the rows of a step on each GPU."""
    rows_per_step, n_gpus = run.recipe.rows_per_step, run.n_gpus
    n_rows, rest = divmod(rows_per_step, n_gpus)
    if rest:
        nearest = [n * n_gpus for n in (n_rows, n_rows + 1) if n]
        raise StageError(
            "the rows of a step cannot be divided over the GPUs",
            where="recipes.<name>.rows_per_step, training.gpus × training.nodes",
            found=f"{rows_per_step} rows over {n_gpus} GPUs",
            expected=f"a multiple of {n_gpus}",
            to_fix="rows_per_step: " + " or ".join(map(str, nearest)),
        )
    divisors = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
    rows = run.training.rows_per_micro_batch
    if rows == "auto":
        return divisors
    if rows not in divisors:
        raise StageError(
            "the rows of a step cannot be divided into such micro-batches",
            where="training.rows_per_micro_batch",
            found=f"{rows}, with {n_rows} rows per step on each GPU",
            expected="one of " + ", ".join(map(str, divisors)),
        )
    return [rows]


def _checkpointed_layers(run: PlannedRun) -> list[int]:
    """Numbers of checkpointed layers that the settings allow."""
    n_layers = run.facts.n_layers
    match run.training.gradient_checkpointing:
        case "auto":
            return list(range(n_layers + 1))
        case "off":
            return [0]
        case "full":
            return [n_layers]
        case n_checkpointed:
            return [min(n_checkpointed, n_layers)]


def _flops_per_token(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    """Time per token as a number of operations: the products, and the memory traffic meanwhile.

    A frozen base takes two products per weight (the output, the gradient of its input), a trained
    one three, a checkpointed layer one more. NF4 and int8 weights are read and written out in 16
    bits once per pass over the micro-batch, so a small micro-batch pays more per token. Offloading
    waits for the bus to the CPU.
    """
    costs = CostModel.of(shape.facts)
    weights = costs.linear_flops_per_token / 4
    again = setup.n_checkpointed_layers / shape.facts.n_layers
    passes = (3 if shape.is_full else 2) + again
    moved = {"qlora": 0.5 + 2, "lora_int8": 1 + 2}.get(shape.recipe.method, 0.0)
    ratio = FLOPS_PER_BYTE if shape.is_cuda else FLOPS_PER_BYTE / 10
    slower = 1.2 if setup.offloads_activations else 1.0
    return slower * (2 * weights * passes + ratio * moved * weights * passes / n_tokens)
