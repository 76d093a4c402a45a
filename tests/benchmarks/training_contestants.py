"""One way to train on packed documents, once, in a process of its own: speed, memory, loss.

`none`, `concatenate` and `best_fit` are the product's own plan, sampler, collator, model and
trainer. `best_fit_transformers` differs from `best_fit` in attention alone: transformers' own,
whose mask is made from the positions. `trl` is TRL's trainer with its own packing.

python -m tests.benchmarks.training_contestants --contestant best_fit --shape demo
    --documents documents.arrow --row-tokens 4096 --rows 2 --scratch scratch/ --measured run.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.model_shapes import CONFIGS, facts_of
from tests.benchmarks.resident_memory import reset_peak, resident_bytes
from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.settings import PackingSettings, RecipeSettings

# Strategy of the plan; the attention is ours where there is none named.
OURS = {
    "none": ("none", None),
    "concatenate": ("concatenate", None),
    "best_fit": ("best_fit", None),
    "best_fit_transformers": ("best_fit", "sdpa"),
}
CONTESTANTS = (*OURS, "trl")
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--shape", choices=CONFIGS, required=True)
    parser.add_argument("--documents", type=Path, required=True, help="as render_chats writes them")
    parser.add_argument("--row-tokens", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of a micro-batch, one a step")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--most-steps", type=int, help="default: an epoch")
    parser.add_argument("--warm-up-steps", type=int, default=2, help="not measured")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the trainer")
    parser.add_argument("--measured", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    import torch

    recipe = RecipeSettings(
        rank=32,
        alpha=64,
        schedule="constant",
        warmup_fraction=0.0,
        rows_per_micro_batch=arguments.rows,
        micro_batches_per_step=1,
        max_steps=arguments.most_steps,
        evaluations=0,
        checkpoint_steps=1_000_000,
        gradient_checkpointing=arguments.gradient_checkpointing,
        seed=SEED,
    )
    documents = Documents(arguments.documents)
    meter = Meter()
    try:
        if arguments.contestant in OURS:
            strategy, attention = OURS[arguments.contestant]
            trainer = our_trainer(
                CONFIGS[arguments.shape],
                recipe,
                documents,
                PackingSettings(strategy=strategy, row_tokens=arguments.row_tokens, seed=SEED),
                attention=attention,
                scratch=arguments.scratch,
                meter=meter,
            )
        else:
            trainer = trl_trainer(
                CONFIGS[arguments.shape],
                recipe,
                documents,
                row_tokens=arguments.row_tokens,
                scratch=arguments.scratch,
                meter=meter,
            )
        trainer.train()
        measured = meter.measured(trainer, n_warm_up=arguments.warm_up_steps)
    except torch.OutOfMemoryError as error:
        measured = {"out_of_memory": str(error).partition("\n")[0]}
    cuda = torch.cuda.is_available()
    files.write_json(
        arguments.measured,
        {"device": torch.cuda.get_device_name() if cuda else "cpu", **measured},
    )


def our_trainer(
    config: dict[str, Any],
    recipe: RecipeSettings,
    documents: Documents,
    packing: PackingSettings,
    *,
    attention: str | None,
    scratch: Path,
    meter: Meter,
) -> Any:
    """The product's trainer over the product's plan.

    Args:
        attention: transformers' name; None is ours.
    """
    from workflow_scripts.data.pack_sequences import make_plan
    from workflow_scripts.train import attention as our_attention
    from workflow_scripts.train.train_adapter import adapt, make_trainer

    facts = facts_of(config)
    # No document is longer than a row, so none is split and no tokenizer read.
    plan, _ = make_plan(documents, facts, packing, Path())
    name = our_attention.register() if attention is None else attention
    model = adapt(random_base(config, attention=name, seed=recipe.seed), facts, recipe)
    trainer = make_trainer(model, recipe, plan, documents, documents, scratch, meter.callback())
    trainer.data_collator = meter.counting(
        trainer.data_collator, lambda rows: sum(piece.length for row in rows for piece in row)
    )
    return trainer


def trl_trainer(
    config: dict[str, Any],
    recipe: RecipeSettings,
    documents: Documents,
    *,
    row_tokens: int,
    scratch: Path,
    meter: Meter,
) -> Any:
    """SFTTrainer with its default packing, which flattens a micro-batch as ours does; the same
    documents, labels, base, adapter and optimizer.

    Attention is FlashAttention where its package is installed, else transformers' own. TRL keeps
    the adapter of a 4-bit base in bfloat16, and has no option for it.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer

    from workflow_scripts.models.checkpoint import compute_dtype, default_device
    from workflow_scripts.train.batches import IGNORED
    from workflow_scripts.train.lora import lora_config

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for document in documents:
        columns["input_ids"].append(document.input_ids)
        columns["labels"].append(
            np.where(document.is_supervised, document.input_ids, IGNORED).astype(np.int32)
        )
    device = default_device()
    dtype = compute_dtype(device)
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    trainer = SFTTrainer(
        model=random_base(config, attention=attention, seed=recipe.seed),
        args=SFTConfig(
            output_dir=str(scratch),
            packing=True,
            packing_strategy="bfd",
            max_length=row_tokens,
            max_steps=recipe.max_steps or -1,
            num_train_epochs=1,
            per_device_train_batch_size=recipe.rows_per_micro_batch,
            gradient_accumulation_steps=1,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type=recipe.schedule,
            weight_decay=recipe.weight_decay,
            max_grad_norm=recipe.max_gradient_norm,
            optim="adamw_torch_fused",
            use_cpu=device.type == "cpu",
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            gradient_checkpointing=recipe.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=recipe.seed,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=word_tokenizer(),
        peft_config=lora_config(recipe, facts_of(config)),
        callbacks=[meter.callback()],
    )
    trainer.data_collator = meter.counting(
        trainer.data_collator, lambda rows: sum(len(row["input_ids"]) for row in rows)
    )
    return trainer


def random_base(config: dict[str, Any], *, attention: str, seed: int) -> Any:
    """The 4-bit base, the same for every contestant."""
    from transformers import set_seed

    from tests.benchmarks.random_models import random_nf4_model
    from workflow_scripts.models.checkpoint import default_device

    set_seed(seed)  # of the adapter that follows
    return random_nf4_model(config, attention=attention, place=default_device(), seed=seed)


def word_tokenizer() -> Any:
    """SFTTrainer asks for a tokenizer; of this one it takes the padding token and no more."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@dataclass
class Meter:
    """What training costs, step by step."""

    ends: list[float] = field(default_factory=list)
    """Clock at the end of each step."""
    n_tokens: list[int] = field(default_factory=list)
    """Of the documents, by micro-batch."""
    n_supervised: list[int] = field(default_factory=list)
    n_computed: list[int] = field(default_factory=list)
    """Padding included."""
    memory_before_bytes: int = 0
    peak_memory_bytes: int = 0

    def counting(
        self, collate: Callable[[Any], dict[str, Any]], count: Callable[[Any], int]
    ) -> Callable[[Any], dict[str, Any]]:
        """The collator, counting what it is given and what it makes."""
        from workflow_scripts.train.batches import IGNORED

        def counted(examples: Any) -> dict[str, Any]:
            batch = collate(examples)
            self.n_tokens.append(count(examples))
            self.n_supervised.append(int((batch["labels"] != IGNORED).sum()))
            self.n_computed.append(batch["input_ids"].numel())
            return batch

        return counted

    def callback(self) -> Any:
        """For a Trainer."""
        import torch
        from transformers import TrainerCallback

        meter = self
        cuda = torch.cuda.is_available()

        class Callback(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    meter.memory_before_bytes = torch.cuda.memory_allocated()
                else:
                    reset_peak()
                    meter.memory_before_bytes = resident_bytes("VmRSS")

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if cuda:
                    torch.cuda.synchronize()
                    meter.peak_memory_bytes = torch.cuda.max_memory_allocated()
                else:
                    meter.peak_memory_bytes = resident_bytes("VmHWM")
                meter.ends.append(time.perf_counter())

        return Callback()

    def measured(self, trainer: Any, *, n_warm_up: int) -> dict[str, Any]:
        """The figures of a run; a step's time is that between its end and the last one's.

        Raises:
            StageError: there are no more steps than those to warm up, a loss or gradient norm is
                not finite, or every gradient was zero.
        """
        from workflow_scripts.train.train_adapter import read_history

        n_steps = len(self.ends)
        if n_steps <= max(1, n_warm_up):
            raise log.StageError(
                "too few steps to measure", found=n_steps, expected=f"more than {max(1, n_warm_up)}"
            )
        history = read_history(trainer.state.log_history)["train"]
        steps = slice(max(1, n_warm_up), n_steps)
        seconds = [self.ends[at] - self.ends[at - 1] for at in range(steps.start, n_steps)]
        n_tokens, n_computed = sum(self.n_tokens[steps]), sum(self.n_computed[steps])
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        return {
            "attention": trainer.model.config._attn_implementation,
            "adapter_dtype": str(trained[0].dtype).removeprefix("torch."),
            "n_trainable_parameters": sum(p.numel() for p in trained),
            "n_steps": n_steps,
            "n_steps_measured": len(seconds),
            "n_tokens_measured": n_tokens,
            "duration_seconds": sum(seconds),
            "tokens_per_second": n_tokens / sum(seconds),
            "supervised_tokens_per_second": sum(self.n_supervised[steps]) / sum(seconds),
            "step_median_seconds": statistics.median(seconds),
            "step_mean_tokens": n_tokens / len(seconds),
            "padding_fraction": 1 - n_tokens / n_computed,
            "memory_before_bytes": self.memory_before_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "training_memory_bytes": self.peak_memory_bytes - self.memory_before_bytes,
            "first_loss_nats_per_token": history[0]["loss_nats_per_token"],
            "final_loss_nats_per_token": history[-1]["loss_nats_per_token"],
            "smallest_gradient_norm": min(entry["gradient_norm"] for entry in history),
            "median_gradient_norm": statistics.median(e["gradient_norm"] for e in history),
        }


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
