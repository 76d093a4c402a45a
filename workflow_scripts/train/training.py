"""One training, from its files to the adapter: layout, probe, Trainer, a retry with less memory."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from workflow_scripts import log
from workflow_scripts.handover.training import Candidate, TrainingManifest
from workflow_scripts.models.checkpoint import default_device, native_precision
from workflow_scripts.models.exhaustion import exhausts_memory
from workflow_scripts.train import processes
from workflow_scripts.train.activations import save_less
from workflow_scripts.train.adapter_files import read_history, save_adapter
from workflow_scripts.train.callbacks import BestWeights, Interruption, Progress, trained_weights
from workflow_scripts.train.checkpoints import Checkpoints
from workflow_scripts.train.job import Job
from workflow_scripts.train.memory import device, fit
from workflow_scripts.train.memory.layouts import Layouts
from workflow_scripts.train.model import trainable_model
from workflow_scripts.train.probe import check_attention
from workflow_scripts.train.trainer import make_trainer

logger = log.stage_logger("train_adapter")


@dataclass(frozen=True)
class Folders:
    """The folders that a training reads from and writes to."""

    base: Path
    """The base model."""
    resume_from: Path
    """Checkpoints of all runs of this name."""
    adapter: Path
    curves: Path | None = None
    """TensorBoard's files; None for none."""


def train(job: Job, folders: Folders) -> None:
    """Train; if memory runs out and the settings leave a choice, train once more with less."""
    logger.info(
        "started %s device=%s processes=%d settings=%s training=%s",
        log.versions("torch", "transformers", "peft", "bitsandbytes"),
        device.name(),
        processes.n_processes(),
        job.recipe.model_dump_json(),
        job.training.model_dump_json(),
    )
    checkpoints = Checkpoints(folders.resume_from, job.identity)
    if processes.is_main():
        checkpoints.open()
    layouts = Layouts.of(job.planned_run(n_gpus=processes.n_processes()))
    refusal = _try_to_train(job, folders, checkpoints, layouts)
    if refusal is None:
        return
    # The model can be freed only here: the traceback of the error kept it alive.
    gc.collect()
    torch.cuda.empty_cache()
    leaves_choice = "auto" in (
        job.training.rows_per_micro_batch,
        job.training.gradient_checkpointing,
        job.training.offload_activations,
    )
    if checkpoints.n_steps_down or not leaves_choice:
        raise refusal
    logger.warning("%s", refusal)
    checkpoints.step_down()
    if processes.is_worker():
        raise refusal  # the process that launched the workers launches them again
    refusal = _try_to_train(job, folders, checkpoints, layouts)
    if refusal:
        raise refusal


def _try_to_train(
    job: Job, folders: Folders, checkpoints: Checkpoints, layouts: Layouts
) -> log.StageError | None:
    """Train; return the refusal if memory ran out."""
    interruption = Interruption()
    try:
        with processes.handled_signals(interruption.receive):
            chosen = fit.choose(
                layouts,
                available_bytes=_least(device.available_bytes()),
                n_steps_down=checkpoints.n_steps_down,
            )
            logger.info("laid out %s predicted_bytes=%d", chosen.setup, chosen.peak)
            _train(job, folders, checkpoints, chosen, interruption)
    except (RuntimeError, MemoryError) as error:
        if not exhausts_memory(error):
            raise
        return fit.refusal(
            layouts,
            n_steps_down=checkpoints.n_steps_down,
            error=str(error).partition("\n")[0],
        )
    return None


def _train(
    job: Job,
    folders: Folders,
    checkpoints: Checkpoints,
    chosen: Candidate,
    interruption: Interruption,
) -> None:
    """Train from the newest checkpoint, or from the start, and write the adapter's files."""
    model = _checked_model(job, folders.base, chosen)
    tokens_per_step = float(job.plan.rows.n_tokens.mean()) * job.recipe.rows_per_step
    progress = Progress(tokens_per_step=tokens_per_step)
    best = BestWeights(
        checkpoints.folder, keeps=job.recipe.keeps_best, patience=job.recipe.early_stopping
    )
    trainer = make_trainer(
        model,
        job,
        checkpoints,
        rows_per_micro_batch=chosen.rows_per_micro_batch,
        curves=folders.curves,
        name=folders.resume_from.name,
        callbacks=[progress, best, interruption],
    )
    last = checkpoints.newest()
    if last:
        logger.info("resumed checkpoint=%s", last)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    duration = time.perf_counter() - started
    n_steps = trainer.state.global_step
    if interruption.received and n_steps < trainer.args.max_steps and not best.has_stopped:
        raise log.StageError(
            f"training was ended by {interruption.received}",
            where=f"step {n_steps} of {trainer.args.max_steps}",
            found=f"its state is kept in {checkpoints.folder}",
            to_fix="start it again: it continues from there",
        )
    best_step = best.restore(trainer.model) if job.recipe.keeps_best else None
    weights = trained_weights(trainer.model)
    if not trainer.is_world_process_zero():
        return

    history = read_history(trainer.state.log_history)
    save_adapter(model, weights, folders.base, folders.adapter)
    history.write(folders.adapter / "history.json")
    manifest = TrainingManifest(
        n_steps=n_steps,
        best_step=best_step,
        n_trainable_parameters=sum(p.numel() for p in weights.values()),
        n_processes=processes.n_processes(),
        **dict(chosen.setup),
        tokens_per_step=tokens_per_step,
        tokens_per_second=progress.tokens_per_second(),
        duration_seconds=duration,
        peak_memory_bytes=device.peak_bytes(),
        predicted_peak_memory_bytes=chosen.peak,
        final_loss_nats_per_token=history.train[-1].loss_nats_per_token,
        device=device.name(),
        compute_dtype=native_precision(default_device()),
        resumed=last is not None,
        n_failed_checkpoints=trainer.n_failed_checkpoints,
        identity=job.identity,
    )
    manifest.write(folders.adapter / "training_manifest.json")
    if interruption.received:
        # The sender of the signal may still count the job as failed and delete its outputs.
        logger.warning(
            "trained to the end in spite of %s; the state is kept, so that another start only has"
            " to write the adapter path=%s",
            interruption.received,
            checkpoints.folder,
        )
    else:
        checkpoints.remove()
    logger.info("trained %s", log.fields(manifest.model_dump(mode="json")))


def _checked_model(job: Job, base: Path, chosen: Candidate) -> Any:
    """The model in its layout, once the probe has found attention as the plan declares it."""
    model = trainable_model(base, job.facts, job.recipe, kernels=job.training.kernels)
    probed = check_attention(model, job.train, job.plan, job.facts.layer_windows)
    logger.info("probed attention %s", log.fields(probed))
    save_less(
        model,
        n_checkpointed_layers=chosen.n_checkpointed_layers,
        offloads=chosen.offloads_activations,
    )
    return model


def _least(value: int) -> int:
    """The smallest value of all processes, so that all of them decide alike."""
    if processes.n_processes() == 1:
        return value
    PartialState(cpu=not torch.cuda.is_available())
    return min(gather_object([value]))
