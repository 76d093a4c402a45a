"""Records of trainings that tests name, whole but for what a test asks of them."""

from __future__ import annotations

import math
from typing import Any

from workflow_scripts.handover.training import (
    Evaluation,
    History,
    MemoryParts,
    MemoryPlan,
    RunIdentity,
    TrainingManifest,
    TrainingStep,
)
from workflow_scripts.settings import RecipeSettings


def identity_of(*, recipe: RecipeSettings | None = None, **values: Any) -> RunIdentity:
    """What decides the result of a training."""
    return RunIdentity(
        recipe=recipe or RecipeSettings(),
        base={"model.safetensors": "b" * 64},
        rope_parameters={},
        tokens="c" * 64,
        validation="d" * 64,
        plan="a" * 64,
        output_version=1,
    ).changed(**values)


def manifest_of(**values: Any) -> TrainingManifest:
    """What a training of seven steps on a CPU leaves."""
    return TrainingManifest(
        n_steps=7,
        best_step=None,
        n_trainable_parameters=1_234_567,
        n_processes=1,
        rows_per_micro_batch=1,
        n_checkpointed_layers=0,
        offloads_activations=False,
        tokens_per_step=512.0,
        tokens_per_second=1234.4,
        duration_seconds=12.5,
        peak_memory_bytes=3 * 2**29,
        predicted_peak_memory_bytes=5 * 2**28,
        final_loss_nats_per_token=1.75,
        device="cpu",
        compute_dtype="float32",
        resumed=False,
        n_failed_checkpoints=0,
        identity=identity_of(),
    ).changed(**values)


def parts_of(**sizes: int) -> MemoryParts:
    """Bytes of some parts; the others take none."""
    none = dict.fromkeys(MemoryParts.model_fields, 0)
    return MemoryParts(**(none | sizes | {"peak": sum(sizes.values())}))


def plan_of_memory(parts: MemoryParts, *, usable_bytes: int) -> MemoryPlan:
    """A plan for a CPU, with no other layout to choose from."""
    return MemoryPlan(
        device="cpu",
        row_tokens=256,
        evaluation_tokens=256,
        n_gpus=1,
        available_bytes=usable_bytes,
        usable_bytes=usable_bytes,
        rows_per_micro_batch=1,
        n_checkpointed_layers=0,
        offloads_activations=False,
        predicted_peak_memory_bytes=parts.peak,
        predicted_bytes=parts,
        candidates=(),
    )


def history_of(n_steps: int, *, validation_loss: float | None = None) -> History:
    """A loss that falls from step to step, and an evaluation after the last one."""
    return History(
        train=tuple(
            TrainingStep(
                step=step,
                loss_nats_per_token=3 / step,
                gradient_norm=1 / step,
                learning_rate=0.1,
            )
            for step in range(1, n_steps + 1)
        ),
        validation=()
        if validation_loss is None
        else (
            Evaluation(
                step=n_steps,
                loss_nats_per_token=validation_loss,
                perplexity=math.exp(validation_loss),
            ),
        ),
    )
