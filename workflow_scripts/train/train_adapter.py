"""Train a LoRA adapter on the base model, quantized or not, over the rows of a packing plan.

Before the first step: does it fit (`plan_memory`), and is attention what the plan declares. While
it trains: resumable checkpoints, outside the declared outputs, in a folder named by a fingerprint
of all that decides the result. A run that was killed resumes from the newest whole one and ends
where it would have ended.

python -m workflow_scripts.train.train_adapter --checkpoint checkpoint/ --facts facts.json
    --tokens tokens/ --plan plan.parquet --settings '{"rank": 32}' --training '{"gpus": 1}'
    --resume-from checkpoints/run --curves logs/tensorboard --adapter adapter/
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import log
from workflow_scripts.handover.training import MemoryParts, Setup, TrainingManifest
from workflow_scripts.models.exhaustion import exhausts_memory
from workflow_scripts.settings import RecipeSettings, TrainingSettings, settings_from_json
from workflow_scripts.train import checkpoints as checkpointing, processes
from workflow_scripts.train.checkpoints import Checkpoints
from workflow_scripts.train.job import Job

OUTPUT_VERSION = 3
MODULE = "workflow_scripts.train.train_adapter"
logger = log.stage_logger("train_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of render_chats")
    parser.add_argument("--plan", type=Path, required=True, help="packing plan of the train split")
    parser.add_argument("--settings", required=True, help="JSON of `recipes.<name>`")
    parser.add_argument("--training", default="{}", help="JSON of `training`")
    parser.add_argument(
        "--resume-from", type=Path, required=True, help="folder for checkpoints while training"
    )
    parser.add_argument("--curves", type=Path, help="folder for TensorBoard's curves")
    parser.add_argument("--adapter", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.settings)
    training = settings_from_json(TrainingSettings, arguments.training)
    if training.gpus * training.nodes > 1 and not processes.is_worker():
        handed_on = list(sys.argv[1:] if argv is None else argv)
        before = checkpointing.all_steps_down(arguments.resume_from)
        try:
            processes.run(MODULE, handed_on, training)
        except log.StageError:
            if checkpointing.all_steps_down(arguments.resume_from) == before:
                raise
            processes.run(MODULE, handed_on, training)
        return
    job = Job.read(
        facts=arguments.facts,
        plan=arguments.plan,
        tokens=arguments.tokens,
        recipe=recipe,
        training=training,
        output_version=OUTPUT_VERSION,
    )
    train(job, arguments)


def train(job: Job, arguments: argparse.Namespace) -> None:
    """Train; where memory runs out and the settings leave the choice, once more with less."""
    import torch

    logger.info(
        "started %s device=%s processes=%d settings=%s training=%s",
        log.versions("torch", "transformers", "peft", "bitsandbytes"),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        processes.n_processes(),
        arguments.settings,
        arguments.training,
    )
    checkpoints = Checkpoints(arguments.resume_from, job.identity)
    if processes.is_main():
        checkpoints.open()
    try:
        return train_once(job, arguments, checkpoints)
    except (RuntimeError, MemoryError) as error:
        if not exhausts_memory(error):
            raise
        refusal = out_of_memory(job, checkpoints, error)
    # Here, as the error's traceback held on to the model.
    gc.collect()
    torch.cuda.empty_cache()
    if checkpoints.n_steps_down or not leaves_choice(job.training):
        raise refusal
    logger.warning("%s", refusal)
    checkpoints.step_down()
    if processes.is_worker():
        raise refusal  # the process that launched all of them launches them again
    try:
        train_once(job, arguments, checkpoints)
    except (RuntimeError, MemoryError) as error:
        if not exhausts_memory(error):
            raise
        raise out_of_memory(job, checkpoints, error) from None


def train_once(job: Job, arguments: argparse.Namespace, checkpoints: Checkpoints) -> None:
    """From the newest checkpoint, or from the start, to the adapter's files."""
    from workflow_scripts.train.callbacks import Interruption

    with Interruption() as interruption:
        _train_once(job, arguments, checkpoints, interruption)


def _train_once(
    job: Job, arguments: argparse.Namespace, checkpoints: Checkpoints, interruption: Any
) -> None:
    import torch

    from workflow_scripts.models.checkpoint import default_device, native_precision
    from workflow_scripts.train.activations import save_less
    from workflow_scripts.train.adapter_files import read_history, save_adapter
    from workflow_scripts.train.callbacks import (
        BestWeights,
        Progress,
        trained_weights,
    )
    from workflow_scripts.train.memory import device
    from workflow_scripts.train.model import trainable_model
    from workflow_scripts.train.probe import check_attention
    from workflow_scripts.train.trainer import make_trainer

    setup, predicted = choose_setup(job, checkpoints)
    logger.info("laid out %s predicted_bytes=%d", setup, predicted.peak)
    model = trainable_model(
        arguments.checkpoint, job.facts, job.recipe, kernels=job.training.kernels
    )
    probed = check_attention(model, job.train, job.plan, job.facts.layer_windows)
    logger.info("probed attention %s", log.fields(probed))
    save_less(
        model,
        n_checkpointed_layers=setup.n_checkpointed_layers,
        offloads=setup.offloads_activations,
    )
    tokens_per_step = float(job.plan.rows.n_tokens.mean()) * job.recipe.rows_per_step
    progress = Progress(tokens_per_step=tokens_per_step)
    best = BestWeights(
        checkpoints.folder, keeps=job.recipe.keeps_best, patience=job.recipe.early_stopping
    )
    trainer = make_trainer(
        model,
        job,
        checkpoints,
        rows_per_micro_batch=setup.rows_per_micro_batch,
        curves=arguments.curves,
        name=arguments.resume_from.name,
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
            to_fix="start it again, it goes on from there",
        )
    best_step = best.restore(trainer.model) if job.recipe.keeps_best else None
    weights = trained_weights(trainer.model)
    if not trainer.is_world_process_zero():
        return

    history = read_history(trainer.state.log_history)
    save_adapter(model, weights, arguments.checkpoint, arguments.adapter)
    history.write(arguments.adapter / "history.json")
    manifest = TrainingManifest(
        n_steps=n_steps,
        best_step=best_step,
        n_trainable_parameters=sum(p.numel() for p in weights.values()),
        n_processes=processes.n_processes(),
        **dict(setup),
        tokens_per_step=tokens_per_step,
        tokens_per_second=progress.tokens_per_second(),
        duration_seconds=duration,
        peak_memory_bytes=device.peak_bytes(),
        predicted_peak_memory_bytes=predicted.peak,
        final_loss_nats_per_token=history.train[-1].loss_nats_per_token,
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        compute_dtype=native_precision(default_device()),
        resumed=last is not None,
        n_failed_checkpoints=trainer.n_failed_checkpoints,
        identity=job.identity,
    )
    manifest.write(arguments.adapter / "training_manifest.json")
    if interruption.received:
        # Who sent it may count the job as failed all the same, and delete what it wrote.
        logger.warning(
            "trained to the end in spite of %s; its state is kept for another start, which then"
            " takes no step path=%s",
            interruption.received,
            checkpoints.folder,
        )
    else:
        checkpoints.remove()
    logger.info("trained %s", log.fields(manifest.model_dump(mode="json")))


def choose_setup(job: Job, checkpoints: Checkpoints) -> tuple[Setup, MemoryParts]:
    """How the run is laid out on this machine's GPU, the same in every process."""
    from workflow_scripts.train.memory import device, fit

    return fit.choose(
        job.planned_run(n_gpus=processes.n_processes()),
        available_bytes=processes.least(device.available_bytes()),
        n_steps_down=checkpoints.n_steps_down,
    )


def leaves_choice(training: TrainingSettings) -> bool:
    return "auto" in (
        training.rows_per_micro_batch,
        training.gradient_checkpointing,
        training.offload_activations,
    )


def out_of_memory(job: Job, checkpoints: Checkpoints, error: BaseException) -> log.StageError:
    """What ran out, what was planned, and what would take less."""
    from workflow_scripts.train.memory import fit

    return fit.refusal(
        job.planned_run(n_gpus=processes.n_processes()),
        n_steps_down=checkpoints.n_steps_down,
        error=str(error).partition("\n")[0],
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
