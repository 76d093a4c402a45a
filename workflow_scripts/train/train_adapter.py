"""Train a LoRA adapter on the 4-bit base model (QLoRA), over the rows of a packing plan.

Checkpoints live outside the declared outputs, in a folder named by a fingerprint of all that
decides the result; a run that was killed resumes from the last one, and from no other run's.

python -m workflow_scripts.train.train_adapter --checkpoint checkpoint/ --facts facts.json
    --tokens tokens/ --plan plan.parquet --settings '{"rank": 32}' --resume-from checkpoints/run
    --adapter adapter/
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.data.long_documents import fit
from workflow_scripts.data.packing import Rows, best_fit
from workflow_scripts.data.plan import Plan, read_plan
from workflow_scripts.settings import PackingSettings, RecipeSettings, settings_from_json

OUTPUT_VERSION = 2
logger = log.stage_logger("train_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of render_chats")
    parser.add_argument("--plan", type=Path, required=True, help="packing plan of the train split")
    parser.add_argument("--settings", required=True, help="JSON of `recipes.<name>`")
    parser.add_argument(
        "--resume-from", type=Path, required=True, help="folder for checkpoints while training"
    )
    parser.add_argument("--adapter", type=Path, required=True, help="to write into: folder")
    arguments = parser.parse_args(argv)
    recipe = settings_from_json(RecipeSettings, arguments.settings)
    facts = files.read_json(arguments.facts)
    plan = read_plan(arguments.plan)
    train = Documents(arguments.tokens / "train.arrow")
    validation = Documents(arguments.tokens / "validation.arrow")

    import torch

    from workflow_scripts.train.probe import check_attention
    from workflow_scripts.train.trainer import Throughput

    logger.info(
        "started %s device=%s settings=%s",
        log.versions("torch", "transformers", "peft", "bitsandbytes"),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        arguments.settings,
    )
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "base": {name: entry["sha256"] for name, entry in facts["files"].items()},
        "tokens": files.sha256(arguments.tokens / "train.arrow"),
        "plan": files.sha256(arguments.plan),
        "output_version": OUTPUT_VERSION,
    }
    checkpoints = arguments.resume_from / files.fingerprint(identity)
    checkpoints.mkdir(parents=True, exist_ok=True)

    model = adapted_model(arguments.checkpoint, facts, recipe)
    probed = check_attention(model, train, plan, facts["layer_windows"])
    logger.info("probed attention %s", log.fields(probed))
    throughput = Throughput()
    trainer = make_trainer(model, recipe, plan, train, validation, checkpoints, throughput)
    with trainer.args.main_process_first():
        last = last_whole_checkpoint(checkpoints)
    if last:
        logger.info("resumed checkpoint=%s", last)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    duration = time.perf_counter() - started
    if not trainer.is_world_process_zero():
        return

    history = read_history(trainer.state.log_history)
    save_adapter(model, arguments.checkpoint, arguments.adapter)
    files.write_json(arguments.adapter / "history.json", history)
    rows_per_step = (
        recipe.rows_per_micro_batch
        * recipe.micro_batches_per_step
        * trainer.accelerator.num_processes
    )
    tokens_per_step = float(plan.rows.n_tokens.mean()) * rows_per_step
    # The first step pays for warming up; a run of one step has no other.
    seconds = list(throughput.seconds.values())
    measured = seconds[1:] or seconds
    manifest = {
        "n_steps": trainer.state.global_step,
        "n_trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "tokens_per_step": tokens_per_step,
        "tokens_per_second": (
            len(measured) * tokens_per_step / sum(measured) if measured else None
        ),
        "duration_seconds": duration,
        "peak_memory_bytes": peak_memory_bytes(),
        "final_loss_nats_per_token": history["train"][-1]["loss_nats_per_token"],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "resumed": last is not None,
        "identity": identity,
    }
    files.write_json(arguments.adapter / "training_manifest.json", manifest)
    # A finished run has nothing to resume; a forced one starts over.
    shutil.rmtree(checkpoints)
    logger.info("trained %s", log.fields(manifest))


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end; torn ones are removed.

    The Trainer writes a checkpoint in place, `trainer_state.json` last: a run killed while saving
    leaves one that could never be resumed from.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / "trainer_state.json").is_file():
            whole[int(path.name.removeprefix("checkpoint-"))] = path
        else:
            logger.warning("removed torn checkpoint=%s", path)
            shutil.rmtree(path)
    return str(whole[max(whole)]) if whole else None


def adapted_model(checkpoint: Path, facts: dict[str, Any], recipe: RecipeSettings) -> Any:
    """The NF4 base with a fresh adapter in float32, ready to train."""
    from transformers import set_seed

    from workflow_scripts.models.checkpoint import load_model
    from workflow_scripts.train import attention

    set_seed(recipe.seed)
    base = load_model(
        checkpoint,
        window=facts["sliding_window"],
        precision="nf4",
        attention=attention.register(),
    )
    return adapt(base, facts, recipe)


def adapt(base: Any, facts: dict[str, Any], recipe: RecipeSettings) -> Any:
    """A fresh adapter in float32 on a loaded base, whose forward pass then sums the loss."""
    from peft import get_peft_model, prepare_model_for_kbit_training

    from workflow_scripts.train.lora import lora_config
    from workflow_scripts.train.loss import sum_loss

    base = prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    model = get_peft_model(base, lora_config(recipe, facts))
    sum_loss(model.get_base_model())
    return model


def make_trainer(
    model: Any,
    recipe: RecipeSettings,
    plan: Plan,
    train: Documents,
    validation: Documents,
    checkpoints: Path,
    throughput: Any,
) -> Any:
    """The Trainer of one run; validation rows keep documents whole and apart whatever the
    recipe packs."""
    import torch
    from transformers import TrainingArguments

    from workflow_scripts.models.checkpoint import compute_dtype, default_device
    from workflow_scripts.train.batches import Collator, PlannedRows
    from workflow_scripts.train.sampler import StepSampler
    from workflow_scripts.train.trainer import PackedTrainer

    sampler = StepSampler(
        plan,
        n_ranks=int(os.environ.get("WORLD_SIZE", 1)),  # torchrun's
        micro_batches_per_step=recipe.micro_batches_per_step,
        rows_per_micro_batch=recipe.rows_per_micro_batch,
        seed=recipe.seed,
    )
    n_steps = math.ceil(sampler.n_steps * recipe.epochs)
    if recipe.max_steps is not None:
        n_steps = min(n_steps, recipe.max_steps)
    validates = recipe.evaluations > 0 and len(validation) > 0
    device = default_device()
    dtype = compute_dtype(device)
    return PackedTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=n_steps,
            per_device_train_batch_size=recipe.rows_per_micro_batch,
            gradient_accumulation_steps=recipe.micro_batches_per_step,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule,
            warmup_steps=round(n_steps * recipe.warmup_fraction),
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_gradient_norm,
            optim="adamw_torch_fused",
            use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            logging_steps=1,
            eval_strategy="steps" if validates else "no",
            eval_steps=math.ceil(n_steps / recipe.evaluations) if validates else None,
            save_steps=recipe.checkpoint_steps,
            save_total_limit=2,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,  # every matrix of the adapter is used
            report_to=[],
            seed=recipe.seed,
            disable_tqdm=None,
            dataloader_num_workers=0,
        ),
        train_dataset=PlannedRows(plan.rows),
        eval_dataset=PlannedRows(validation_rows(validation, plan.row_tokens))
        if validates
        else None,
        sampler=sampler,
        data_collator=Collator(
            train, crosses_documents=plan.crosses_documents, pads_rows=plan.pads_rows
        ),
        eval_collator=Collator(validation, crosses_documents=False),
        callbacks=[throughput],
    )


def validation_rows(validation: Documents, row_tokens: int) -> Rows:
    """Validation documents apart, whatever the plan does to those of training.

    One longer than a row is cut, each piece with half a row of context: every token counts once.
    """
    settings = PackingSettings(row_tokens=row_tokens, overlap_tokens=row_tokens // 2)
    return best_fit(fit(validation, settings).pieces, row_tokens=row_tokens, seed=0)


def read_history(log_history: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """The Trainer's log as two lists, `train` and `validation`, units in the keys' names.

    Raises:
        StageError: a loss or gradient norm is not finite, or every gradient was zero.
    """
    train = [
        {
            "step": entry["step"],
            "loss_nats_per_token": entry["loss"],
            "gradient_norm": entry["grad_norm"],
            "learning_rate": entry["learning_rate"],
        }
        for entry in log_history
        if "loss" in entry
    ]
    validation = [
        {"step": entry["step"], "loss_nats_per_token": entry["eval_loss"]}
        for entry in log_history
        if "eval_loss" in entry
    ]
    for entry in train:
        for key in ("loss_nats_per_token", "gradient_norm"):
            if not math.isfinite(entry[key]):
                raise log.StageError(
                    "training diverged",
                    where=f"step {entry['step']}, {key}",
                    found=entry[key],
                    to_fix="lower recipes.<name>.learning_rate",
                )
    if not any(entry["gradient_norm"] for entry in train):
        raise log.StageError("training changed nothing", found="a gradient norm of 0 at every step")
    return {"train": train, "validation": validation}


def save_adapter(model: Any, checkpoint: Path, folder: Path) -> None:
    """The adapter alone, as PEFT loads it; its base is named by where it came from."""
    source = checkpoint / "source.json"
    name = files.read_json(source)["source"] if source.is_file() else str(checkpoint)
    for config in model.peft_config.values():
        config.base_model_name_or_path = name
    with files.atomic_folder(folder / ".saved") as saved:
        model.save_pretrained(str(saved))
        for path in ("adapter_model.safetensors", "adapter_config.json"):
            (saved / path).replace(folder / path)
    shutil.rmtree(folder / ".saved")


def peak_memory_bytes() -> int:
    """Most memory this process took: of the GPU where there is one, else resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
