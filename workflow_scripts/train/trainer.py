"""transformers' Trainer for packed rows, with the loss as a mean over a step's supervised tokens.

Packing must not change the objective: the loss is the sum over supervised tokens divided by their
number in the whole optimizer step, over all accumulated micro-batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from workflow_scripts import log
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import compute_dtype, default_device
from workflow_scripts.packing.balance import NO_ROW
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train import optimization, processes
from workflow_scripts.train.batches import IGNORED, Collator, PlannedRows
from workflow_scripts.train.checkpoints import Checkpoints
from workflow_scripts.train.job import Job
from workflow_scripts.train.sampler import StepSampler
from workflow_scripts.train.trackers import trackers_ready
from workflow_scripts.train.validation import validation_rows

logger = log.stage_logger("train_adapter")


class PackedTrainer(Trainer):
    """Trainer for flat micro-batches of packed rows; the model sums its loss (`loss.sum_loss`).

    Args:
        recipe: for the optimizer and its schedule.
        sampler: order of the training rows.
        eval_collator: collator of the validation rows.
        checkpoints: where to save.
        n_kept: number of newest checkpoints to keep.
    """

    model: torch.nn.Module
    eval_dataset: Any  # transformers allows several; here it is one dataset of rows

    def __init__(
        self,
        *,
        recipe: RecipeSettings,
        sampler: StepSampler,
        eval_collator: Any,
        checkpoints: Checkpoints,
        n_kept: int,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._recipe = recipe
        self._sampler = sampler
        self._eval_collator = eval_collator
        self._checkpoints = checkpoints
        self._n_kept = n_kept
        self._save_to = str(checkpoints.folder)
        self.n_failed_checkpoints = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return self._sampler

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = optimization.optimizer(model or self.model, self._recipe)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = optimization.scheduler(
                optimizer or self.create_optimizer(), self._recipe, num_training_steps
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Run an epoch unless all steps are taken.

        transformers takes a step before it checks that, so a run killed between its last checkpoint
        and its adapter would take one step too many.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],  # untyped: the model's inputs, as transformers passes them
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum over this micro-batch ÷ supervised tokens of the whole step."""
        assert num_items_in_batch is not None and not return_outputs
        loss = model(**inputs).loss / num_items_in_batch
        # The gradients are averaged over processes later, but the count already covers all of them.
        return loss * self.accelerator.num_processes

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss over all supervised tokens of the validation rows, nats."""
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        n_rows, n_processes = len(self.eval_dataset), self.args.world_size
        # Every process takes the same number of turns: a sharded model needs them all to compute.
        turns = [*range(n_rows), *[NO_ROW] * (-n_rows % n_processes)]
        mine = turns[self.args.process_index :: n_processes]
        rows = DataLoader(self.eval_dataset, sampler=mine, collate_fn=self._eval_collator)
        with torch.no_grad():
            for batch in rows:
                n_tokens = (batch["labels"] != IGNORED).sum().item()
                loss = self.model(**self._prepare_inputs(batch)).loss
                sums += torch.tensor([loss.item(), n_tokens])
        total, n_tokens = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        metrics = {"eval_loss": total / n_tokens}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self.model.train()
        return metrics

    def _get_output_dir(self, trial: Any = None) -> str:
        return self._save_to

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Save a checkpoint that appears only when it is complete; transformers writes in place.

        If it cannot be written, for example on a full disk, the error is logged and training goes
        on.
        """
        step = self.state.global_step
        wait = self.accelerator.wait_for_everyone if self.args.world_size > 1 else None
        try:
            with self._checkpoints.writing(
                step, is_main=self.is_world_process_zero(), wait=wait
            ) as folder:
                self._save_to = str(folder)
                super()._save_checkpoint(model, trial)
        # A full disk raises OSError in Python, RuntimeError in torch.save, StageError in `files`.
        except (OSError, RuntimeError, SafetensorError, StageError) as error:
            if self.args.world_size > 1:
                raise
            self.n_failed_checkpoints += 1
            logger.error("could not write a checkpoint step=%d reason=%s", step, error)
        else:
            if self.is_world_process_zero():
                self._checkpoints.keep_newest(self._n_kept)
        finally:
            self._save_to = str(self._checkpoints.folder)


def make_trainer(
    model: Any,
    job: Job,
    checkpoints: Checkpoints,
    *,
    rows_per_micro_batch: int,
    curves: Path | None = None,
    name: str = "run",
    callbacks: Sequence[Any] = (),
) -> Any:
    """The Trainer of one run.

    Validation rows never mix documents, however the training rows are packed.

    Raises:
        StageError: the rows of a step cannot be divided evenly.
    """
    recipe, training, plan = job.recipe, job.training, job.plan
    n_micro_batches = micro_batches_per_step(recipe, rows_per_micro_batch)
    sampler = StepSampler(
        plan,
        n_ranks=processes.n_processes(),
        micro_batches_per_step=n_micro_batches,
        rows_per_micro_batch=rows_per_micro_batch,
        seed=recipe.seed,
    )
    n_steps = math.ceil(sampler.n_steps * recipe.epochs)
    if recipe.max_steps is not None:
        n_steps = min(n_steps, recipe.max_steps)
    validation = None
    if recipe.evaluations > 0 and len(job.validation) > 0:
        validation = PlannedRows(
            validation_rows(
                job.validation,
                job.facts,
                row_tokens=plan.row_tokens,
                n_conversations=recipe.validation_conversations,
            )
        )
    trainer = PackedTrainer(
        model=model,
        recipe=recipe,
        args=_arguments(
            recipe,
            training,
            output_dir=str(checkpoints.folder),
            run_name=name,
            max_steps=n_steps,
            per_device_train_batch_size=rows_per_micro_batch,
            gradient_accumulation_steps=n_micro_batches,
            eval_strategy="no" if validation is None else "steps",
            eval_steps=None if validation is None else math.ceil(n_steps / recipe.evaluations),
            report_to=trackers_ready(training, curves=curves),
            **processes.sharding(training, model),
        ),
        train_dataset=PlannedRows(plan.rows),
        eval_dataset=validation,
        sampler=sampler,
        checkpoints=checkpoints,
        n_kept=training.checkpoints_kept,
        data_collator=Collator(
            job.train, crosses_documents=plan.crosses_documents, pads_rows=plan.pads_rows
        ),
        eval_collator=Collator(job.validation, crosses_documents=False),
        callbacks=list(callbacks),
    )
    for chatty in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(chatty)
    return trainer


def _arguments(
    recipe: RecipeSettings, training: TrainingSettings, **options: Any
) -> TrainingArguments:
    """transformers' arguments: `options`, and those that depend on the settings alone."""
    device = default_device()
    dtype = compute_dtype(device)
    return TrainingArguments(
        **options,
        learning_rate=recipe.learning_rate,
        max_grad_norm=recipe.max_gradient_norm,
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would wait for the GPU at every micro-batch
        save_steps=training.checkpoint_steps,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every matrix of the adapter is used
        seed=recipe.seed,
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


def micro_batches_per_step(recipe: RecipeSettings, rows_per_micro_batch: int) -> int:
    """Micro-batches of each process in one optimizer step.

    Raises:
        StageError: the rows of a step cannot be divided evenly.
    """
    at_once = rows_per_micro_batch * processes.n_processes()
    n_micro_batches, rest = divmod(recipe.rows_per_step, at_once)
    if rest or not n_micro_batches:
        raise StageError(
            "the rows of a step cannot be divided evenly over processes and micro-batches",
            where="recipes.<name>.rows_per_step",
            found=f"{recipe.rows_per_step} rows for {processes.n_processes()} processes ×"
            f" {rows_per_micro_batch} rows per micro-batch",
            expected=f"a multiple of {at_once}, such as"
            f" {max(1, round(recipe.rows_per_step / at_once)) * at_once}",
        )
    return n_micro_batches
