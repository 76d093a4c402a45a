"""The layouts that the settings leave open, each with what it takes and how long it takes."""

from __future__ import annotations

from collections.abc import Iterable

from workflow_scripts.handover.training import Candidate, Setup
from workflow_scripts.log import StageError
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train.memory.prediction import predict
from workflow_scripts.train.memory.shape import PlannedRun, Shape

# Setups whose speeds differ by less are equal: the smaller one is taken.
EQUAL_SPEED = 0.02
# Arithmetic that passes while a byte moves, of GPUs since Ampere (A100: 312 TFLOP/s ÷ 1.6 TB/s).
FLOPS_PER_BYTE = 200
# A layout that takes so many times what may be used tells nobody anything.
FAR = 3


def candidates(run: PlannedRun) -> list[Candidate]:
    """All that `setups` lists, predicted."""
    found = []
    for setup in setups(run):
        n_tokens = setup.rows_per_micro_batch * run.row_tokens
        time = flops_per_token(run.shape, n_tokens=n_tokens, setup=setup)
        parts = predict(run, setup)
        found.append(Candidate(**dict(setup), parts_bytes=parts, flops_per_token=time))
    return found


def fastest(found: Iterable[Candidate], limit: float) -> Candidate | None:
    """The fastest that takes no more than `limit` bytes; of equally fast ones the smallest."""
    fitting = [candidate for candidate in found if candidate.peak <= limit]
    if any(not candidate.offloads_activations for candidate in fitting):
        fitting = [one for one in fitting if not one.offloads_activations]
    if not fitting:
        return None
    bound = min(one.flops_per_token for one in fitting) * (1 + EQUAL_SPEED)
    equal = [one for one in fitting if one.flops_per_token <= bound]
    return min(equal, key=lambda one: (one.peak, one.flops_per_token))


def setups(run: PlannedRun) -> list[Setup]:
    """Every layout that the settings leave open.

    Raises:
        StageError: `rows_per_micro_batch` does not divide the rows of a GPU.
    """
    n_rows, n_layers = rows_a_gpu(run.recipe, run.n_gpus), run.facts.n_layers
    training = run.training
    divisors = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
    rows = training.rows_per_micro_batch
    if rows != "auto" and rows not in divisors:
        raise StageError(
            "a step has no whole number of such micro-batches",
            where="training.rows_per_micro_batch",
            found=f"{rows}, of {n_rows} rows a step on each GPU",
            expected="one of " + ", ".join(map(str, divisors)),
        )
    match training.gradient_checkpointing:
        case "auto":
            again = list(range(n_layers + 1))
        case "off":
            again = [0]
        case "full":
            again = [n_layers]
        case n_checkpointed:
            again = [min(n_checkpointed, n_layers)]
    offloads = training.offload_activations
    return [
        Setup(
            rows_per_micro_batch=n_rows_at_once,
            n_checkpointed_layers=n_again,
            offloads_activations=away,
        )
        for n_rows_at_once in (divisors if rows == "auto" else [rows])
        for n_again in again
        for away in ((False, True) if offloads == "auto" else (offloads,))
        # What is not checkpointed is not offloaded; `auto` offloads where all layers are.
        if not away or (n_again and (offloads != "auto" or n_again == n_layers))
    ]


def rows_a_gpu(recipe: RecipeSettings, n_gpus: int) -> int:
    """Rows of an optimizer step on each GPU.

    Raises:
        StageError: the step cannot be shared out.
    """
    rows, rest = divmod(recipe.rows_per_step, n_gpus)
    if rest:
        nearest = [n * n_gpus for n in (rows, rows + 1) if n]
        raise StageError(
            "the rows of a step cannot be shared out over the GPUs",
            where="recipes.<name>.rows_per_step, training.gpus × training.nodes",
            found=f"{recipe.rows_per_step} rows over {n_gpus} GPUs",
            expected=f"a multiple of {n_gpus}",
            to_fix="rows_per_step: " + " or ".join(map(str, nearest)),
        )
    return rows


def flops_per_token(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    """Time of a token of training as arithmetic: what is multiplied, and what passes meanwhile.

    A frozen base multiplies twice (output, gradient of its input), a trained one three times; a
    checkpointed layer once more. NF4 and int8 are read and written out in 16 bits at each of these
    passes, whatever the micro-batch: few tokens waste it. Offloading waits for the CPU's bus.
    """
    costs = CostModel.of(shape.facts)
    weights = costs.linear_flops_per_token / 4
    again = setup.n_checkpointed_layers / shape.facts.n_layers
    passes = (3 if shape.is_full else 2) + again
    moved = {"qlora": 0.5 + 2, "lora_int8": 1 + 2}.get(shape.recipe.method, 0.0)
    ratio = FLOPS_PER_BYTE if shape.is_cuda else FLOPS_PER_BYTE / 10
    slower = 1.2 if setup.offloads_activations else 1.0
    return slower * (2 * weights * passes + ratio * moved * weights * passes / n_tokens)


def table_rows(found: list[Candidate], *, chosen: Setup | None, limit: float) -> list[str]:
    """A line a layout, the largest first, in GB; parts that none has are left out, as are layouts
    far beyond the limit and most numbers of checkpointed layers."""
    n_layers = max(one.n_checkpointed_layers for one in found)
    telling = {0, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers}
    nearest = min(one.peak for one in found)
    shown = [
        one
        for one in found
        if one.setup == chosen
        or (len(found) < 12 or one.n_checkpointed_layers in telling)
        and one.peak <= FAR * max(limit, nearest)
    ]
    sizes = [one.parts_bytes.by_name() for one in shown]
    parts = [name for name in sizes[0] if any(of_one[name] for of_one in sizes)]
    lines = [
        ["rows", "recomputed", "offloads", *(name.split("_")[0] for name in parts)]
        + ["peak", "time", ""]
    ]
    best = min(one.flops_per_token for one in found)
    for one, of_one in sorted(zip(shown, sizes, strict=True), key=lambda pair: -pair[0].peak):
        verdict = "chosen" if one.setup == chosen else "fits" if one.peak <= limit else "too large"
        lines.append(
            [
                str(one.rows_per_micro_batch),
                str(one.n_checkpointed_layers),
                "yes" if one.offloads_activations else "no",
                *(f"{of_one[name] / 1e9:.2f}" for name in parts),
                f"{one.peak / 1e9:.2f}",
                f"{one.flops_per_token / best:.2f}",
                verdict,
            ]
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
