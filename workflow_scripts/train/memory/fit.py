"""Does a run fit? The fastest layout that does, or the nearest settings that would."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from workflow_scripts.handover.training import Candidate, MemoryParts
from workflow_scripts.log import StageError
from workflow_scripts.settings import TrainingSettings
from workflow_scripts.train.memory import device
from workflow_scripts.train.memory.layouts import Layouts
from workflow_scripts.train.memory.shape import PlannedRun

# Fraction of the available memory that is left free: the allocator's gaps between blocks of
# unequal size.
MARGIN = 0.06
# After an out-of-memory error the next layout may take this fraction of the one that ran out.
STEP_DOWN = 0.85
ROW_STEP_TOKENS = 64  # a suggested row length is a multiple of it
Changes = Mapping[str, int | bool | str]  # values of settings, by key


def choose(layouts: Layouts, *, available_bytes: int, n_steps_down: int = 0) -> Candidate:
    """The fastest layout that fits.

    Args:
        available_bytes: memory of one GPU; `training.memory_gb` takes precedence.
        n_steps_down: out-of-memory errors that the run has met; each one asks for a layout that
            takes clearly less.
    Raises:
        StageError: no layout fits; the message names the nearest settings that do.
    """
    limit = usable_bytes(layouts.run.training, available_bytes)
    chosen, smallest = layouts.fastest(limit), layouts.smallest
    for _ in range(n_steps_down):
        if chosen is None:
            break
        limit = STEP_DOWN * chosen.peak
        if limit < smallest.peak < chosen.peak:
            limit = smallest.peak  # not much less, but less
        chosen = layouts.fastest(limit)
    if chosen is None:
        raise StageError(
            "training does not fit into the memory",
            where="training, recipes.<name>, packings.<name>.row_tokens",
            found=f"at least {gigabytes(smallest.peak)} ({_largest(smallest.parts_bytes)})",
            expected=f"at most {gigabytes(limit)}, with {MARGIN:.0%} of the memory left free",
            to_fix="\n".join(
                [_advice(layouts, limit), *layouts.table_rows(chosen=None, limit=limit)]
            ),
        )
    return chosen


def usable_bytes(training: TrainingSettings, available: int) -> float:
    """Memory that the planner counts on: `training.memory_gb`, else what is available, less the
    margin."""
    total = available if training.memory_gb is None else training.memory_gb * 1e9
    return total * (1 - MARGIN)


def table(layouts: Layouts, *, available_bytes: int, chosen: Candidate | None = None) -> str:
    """The table of layouts for the log: parts in GB, which fit, which one is chosen."""
    run = layouts.run
    limit = usable_bytes(run.training, available_bytes)
    title = (
        f"memory of training, GB: rows of {run.row_tokens} tokens, {run.n_gpus} GPU(s), at most"
        f" {limit / 1e9:.2f} may be used"
    )
    return "\n".join([title, *layouts.table_rows(chosen=chosen, limit=limit)])


def refusal(layouts: Layouts, *, n_steps_down: int, error: str) -> StageError:
    """The message for memory that ran out while training: what was planned, and what takes less.

    Args:
        n_steps_down: as in `choose`, for the layout that ran out.
        error: the allocator's message.
    """
    total = device.total_bytes()
    try:
        chosen = choose(layouts, available_bytes=total, n_steps_down=n_steps_down)
    except StageError:  # the layout that ran out was planned for more memory than there is now
        chosen = None
    parts = (chosen or layouts.smallest).parts_bytes
    limit = STEP_DOWN * parts.peak
    usable = usable_bytes(layouts.run.training, total)
    return StageError(
        "the memory ran out",
        where="training",
        found=f"{error}; predicted: {gigabytes(parts.peak)} ({_largest(parts)})",
        expected=f"a layout that fits into {gigabytes(total)} along with its other users",
        to_fix="\n".join(
            [
                _advice(layouts, limit)
                if layouts.smallest.peak > limit
                else f"set training.memory_gb: {limit / 1e9:.3g}, and leave the rest `auto`",
                *layouts.table_rows(chosen=chosen, limit=usable),
            ]
        ),
    )


def _advice(layouts: Layouts, limit: float) -> str:
    changes = remedies(layouts.run, limit)
    if changes:
        return "set one of: " + "; ".join(changes)
    return f"a GPU with {gigabytes(layouts.smallest.peak / (1 - MARGIN))} free, or a smaller model"


def remedies(run: PlannedRun, limit: float) -> list[str]:
    """Changes of the settings after which a layout is predicted to fit.

    Changes of `training` come first, as they do not alter what is learned: single ones, or all of
    them together where no single one is enough. Changes of the recipe and the rows come after.
    """
    frugal = _frugal_training(run)
    found = [text for changed, text in frugal if _fits(_with(run, training=changed), limit)]
    together = {key: value for changed, _ in frugal for key, value in changed.items()}
    in_words = ", ".join(f"{key}: {value}" for key, value in together.items())
    smallest = _with(run, training=together)
    if not found and len(together) > 1 and _fits(smallest, limit):
        found.append(f"training: {in_words}")
    if found:
        return found

    recipe = run.recipe
    lesser: dict[str, int | bool | str] = {}
    if recipe.method in ("lora", "lora_int8", "full"):
        lesser["method"] = "qlora"
    if recipe.optimizer == "adamw":
        lesser["optimizer"] = "adamw_8bit"
    found = [
        f"recipes.<name>.{key}: {value}"
        for key, value in lesser.items()
        if _fits(_with(smallest, recipe={key: value}), limit)
    ]
    if recipe.method != "full":
        rank = recipe.rank // 2
        while rank >= 4 and not _fits(_with(smallest, recipe={"rank": rank}), limit):
            rank //= 2
        if rank >= 4:
            found.append(f"recipes.<name>.rank: {rank}")
    tokens = _longest_row(smallest, limit)
    if tokens:
        found.append(f"packings.<name>.row_tokens: {tokens}")
    if not found and lesser:
        tokens = _longest_row(_with(smallest, recipe=lesser), limit)
        if tokens:
            changed = [f"recipes.<name>.{key}: {value}" for key, value in lesser.items()]
            found.append(", ".join([*changed, f"packings.<name>.row_tokens: {tokens}"]))
    return [f"{text} (with training: {in_words})" for text in found] if together else found


def _frugal_training(run: PlannedRun) -> list[tuple[Changes, str]]:
    """Changes of `training` that save memory and that the present settings rule out."""
    wanted: list[tuple[Changes, str]] = [
        ({"rows_per_micro_batch": 1}, "training.rows_per_micro_batch: 1"),
        ({"gradient_checkpointing": "full"}, "training.gradient_checkpointing: full"),
        (
            {"offload_activations": True, "gradient_checkpointing": "full"},
            "training.offload_activations: true with gradient_checkpointing: full",
        ),
    ]
    if run.n_gpus > 1:
        wanted.append(({"parallelism": "fsdp2"}, "training.parallelism: fsdp2"))
    return [
        (changed, text)
        for changed, text in wanted
        if getattr(run.training, next(iter(changed))) not in ("auto", *changed.values())
    ]


def _with(
    run: PlannedRun, *, training: Changes | None = None, recipe: Changes | None = None
) -> PlannedRun:
    """The run with settings changed."""
    return dataclasses.replace(
        run,
        training=run.training.model_copy(update=training),
        recipe=run.recipe.model_copy(update=recipe),
    )


def _fits(run: PlannedRun, limit: float) -> bool:
    try:
        return Layouts.of(run).smallest.peak <= limit
    except StageError:  # `kv_rank: matched` gives no integer at this rank
        return False


def _longest_row(run: PlannedRun, limit: float) -> int | None:
    """Longest row, in tokens, that fits and is shorter than the run's; None if even one step of
    `ROW_STEP_TOKENS` does not fit."""
    low, high = 0, (run.row_tokens - 1) // ROW_STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        shorter = dataclasses.replace(run, row_tokens=middle * ROW_STEP_TOKENS)
        low, high = (middle, high) if _fits(shorter, limit) else (low, middle - 1)
    return low * ROW_STEP_TOKENS or None


def gigabytes(n_bytes: float) -> str:
    """`12.3 GB`, in units of 10⁹ bytes, as `training.memory_gb`."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e10 else f"{n_bytes / 1e9:.1f} GB"


def _largest(parts: MemoryParts) -> str:
    """The three largest parts in words."""
    largest = sorted(parts.by_name().items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {gigabytes(size)}" for name, size in largest)
