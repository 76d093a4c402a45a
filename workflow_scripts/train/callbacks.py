"""Callbacks of a training run: its pace, its best weights, and signals that end it early."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import TrainerCallback

from workflow_scripts import files, log

logger = log.stage_logger("train_adapter")


class Progress(TrainerCallback):
    """Measures the seconds of each optimizer step, without evaluations and checkpoints, and reports
    progress: a bar on a terminal, in a log file a line every 30 s.

    Args:
        tokens_per_step: mean over the plan.
    """

    def __init__(self, *, tokens_per_step: float) -> None:
        self.seconds: dict[int, float] = {}
        self._tokens_per_step = tokens_per_step
        self._started = math.nan
        self._reported = time.monotonic()
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit=" steps", disable=None
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[state.global_step] = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        recent = list(self.seconds.values())[-20:]
        mean = sum(recent) / len(recent)
        tokens_per_second = self._tokens_per_step / mean
        self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, {tokens_per_second:,.0f} tokens/s")
        self._bar.update(state.global_step - self._bar.n)
        now = time.monotonic()
        if now - self._reported > log.SECONDS_BETWEEN_LINES and not sys.stderr.isatty():
            logger.info(
                "passed step=%d of=%d loss=%.4f gradient_norm=%.4g tokens_per_second=%.0f"
                " left_seconds=%.0f",
                state.global_step,
                state.max_steps,
                logs["loss"],
                logs["grad_norm"],
                tokens_per_second,
                (state.max_steps - state.global_step) * mean,
            )
            self._reported = now

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def tokens_per_second(self) -> float | None:
        """Mean over the run; None before a step was measured."""
        # The first step includes warming up, so it counts only if it is the only one.
        seconds = list(self.seconds.values())
        measured = seconds[1:] or seconds
        return len(measured) * self._tokens_per_step / sum(measured) if measured else None


class BestWeights(TrainerCallback):
    """Keeps the weights of the lowest validation loss, and stops when the loss no longer falls.

    The weights are stored next to the checkpoints, so that a resumed run still has them.

    Args:
        folder: the run's checkpoints.
        keeps: the best weights are kept.
        patience: training stops after this many evaluations in a row without a lower loss; None:
            it never does.
    """

    def __init__(self, folder: Path, *, keeps: bool, patience: int | None) -> None:
        self._folder = folder / "best"
        self._keeps = keeps
        self._patience = patience
        self.has_stopped = False

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        best = min(losses)
        n_since_best = len(losses) - 1 - losses.index(best)
        if self._keeps and n_since_best == 0:
            self._save(model, state)
        if self._patience is not None and n_since_best >= self._patience:
            logger.info(
                "stopped early step=%d validation_loss=%.5g best_loss=%.5g",
                state.global_step, losses[-1], best,
            )  # fmt: skip
            self.has_stopped = True
            control.should_training_stop = True
            # A run resumed from a checkpoint of this step would train on.
            control.should_save = False

    def _save(self, model: Any, state: Any) -> None:
        weights = trained_weights(model)
        if not state.is_world_process_zero:
            return
        with files.atomic_folder(self._folder) as folder:
            save_file(weights, folder / "weights.safetensors")
            files.write_json(folder / "best.json", {"step": state.global_step})

    def restore(self, model: Any) -> int | None:
        """Load the best weights into the model.

        Returns:
            The step that they are from; None if none were kept.
        """
        if not (self._folder / "best.json").is_file():
            return None
        weights = load_file(self._folder / "weights.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(weights[name])
        return files.read_json(self._folder / "best.json")["step"]


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that train, whole and on the CPU; all processes of a sharded model must call."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().cpu().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


class Interruption(TrainerCallback):
    """After a signal to end (Slurm's time limit, Ctrl-C), finishes the step, saves a checkpoint and
    stops."""

    def __init__(self) -> None:
        self.received: str | None = None

    def receive(self, number: int, _: Any) -> None:
        """Handle a signal; a second one ends the process at once."""
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        # A single write: the signal may arrive while a log line is being written.
        os.write(2, f"received {self.received}: finishing and saving the step\n".encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._agreed(args.device):
            # An evaluation that is due still runs first: the resumed run would skip it.
            control.should_save = True
            control.should_training_stop = True

    def _agreed(self, device: torch.device) -> bool:
        """True if any process received a signal, so that all stop at the same step."""
        if not torch.distributed.is_initialized():
            return self.received is not None
        told = torch.tensor(int(self.received is not None), device=device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        if told.item() and not self.received:
            self.received = "a signal to another process"
        return self.received is not None
