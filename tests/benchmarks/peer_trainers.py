"""Other people's trainers on our documents: TRL, plain transformers with PEFT, Unsloth.

Each has the same documents, labels, base, ranks, learning rate and clipping as ours, and for the
rest the settings that make it fastest.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.model_shapes import shape_of
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.tokens.documents import Documents

FLASH_ATTENTION_KERNEL = "kernels-community/flash-attn2"
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@dataclass(frozen=True)
class Work:
    """What a peer is asked to train on, and how."""

    config: dict[str, Any]
    """Content of a config.json."""
    recipe: RecipeSettings
    documents: Documents
    row_tokens: int
    rows_per_micro_batch: int
    documents_per_batch: int
    """Of a padded batch."""
    batches_per_step: int
    """Padded ones, so that a step has about as many tokens as of packed rows."""
    gradient_checkpointing: bool
    attention: str
    """transformers' name of the implementation."""
    scratch: Path


def best_attention() -> str:
    """transformers' fastest attention that is installed here: FlashAttention as a package, or as
    a kernel that lies in the Hub's cache; else PyTorch's, with a dense mask."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import is_flash_attn_2_available

    if is_flash_attn_2_available():
        return "flash_attention_2"
    if importlib.util.find_spec("kernels"):
        try:
            snapshot_download(FLASH_ATTENTION_KERNEL, local_files_only=True)
        except LocalEntryNotFoundError:
            return "sdpa"
        return FLASH_ATTENTION_KERNEL
    return "sdpa"


def trl_trainer(work: Work) -> Any:
    """SFTTrainer with its own packing, which flattens a micro-batch as ours does.

    TRL keeps the adapter of a 4-bit base in bfloat16, and has no option for it.
    """
    from trl import SFTConfig, SFTTrainer

    from tests.benchmarks.random_models import random_base
    from workflow_scripts.train.lora import lora_config

    return SFTTrainer(
        model=random_base(work.config, attention=work.attention, seed=work.recipe.seed),
        args=SFTConfig(**_packing_options(work), **_options(work)),
        train_dataset=_columns(work.documents),
        processing_class=word_tokenizer(),
        peft_config=lora_config(work.recipe, shape_of(work.config)),
    )


def transformers_peft_trainer(work: Work) -> Any:
    """What most scripts do: a document a row, padded to the longest of a batch in random order,
    `prepare_model_for_kbit_training`, a plain Trainer."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from tests.benchmarks.random_models import random_base
    from workflow_scripts.train.lora import lora_config

    model = prepare_model_for_kbit_training(
        random_base(work.config, attention=work.attention, seed=work.recipe.seed),
        use_gradient_checkpointing=work.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    options = _options(work) | {
        "per_device_train_batch_size": work.documents_per_batch,
        "gradient_accumulation_steps": work.batches_per_step,
    }
    return Trainer(
        model=get_peft_model(model, lora_config(work.recipe, shape_of(work.config))),
        args=TrainingArguments(**options),
        train_dataset=_columns(work.documents),
        data_collator=DataCollatorForSeq2Seq(word_tokenizer(), padding=True),
    )


def unsloth_trainer(work: Work) -> Any:
    """Unsloth's model and patches, trained as its notebooks do, by TRL's trainer with packing.

    It only loads checkpoints, so the random base is written as one, in NF4. `unsloth` must have
    been imported before transformers. Unsloth chooses its own attention and kernels.
    """
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    checkpoint = work.scratch / "checkpoint"
    write_checkpoint(work.config, checkpoint, seed=work.recipe.seed)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=work.row_tokens, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=work.recipe.rank,
        lora_alpha=work.recipe.alpha,
        lora_dropout=0,
        bias="none",
        target_modules=LINEAR,
        use_gradient_checkpointing="unsloth" if work.gradient_checkpointing else False,
        random_state=work.recipe.seed,
    )
    return SFTTrainer(
        model=model,
        args=SFTConfig(**_packing_options(work), **_options(work)),
        train_dataset=_columns(work.documents),
        processing_class=tokenizer,
    )


def _packing_options(work: Work) -> dict[str, Any]:
    import torch

    return {
        "packing": True,
        "packing_strategy": "bfd",  # turns padding_free on
        "max_length": work.row_tokens,
        "use_liger_kernel": torch.cuda.is_available()
        and importlib.util.find_spec("liger_kernel") is not None,
    }


def _options(work: Work) -> dict[str, Any]:
    """TrainingArguments that all have, also ours."""
    import torch

    from workflow_scripts.models.checkpoint import compute_dtype, default_device

    device = default_device()
    dtype = compute_dtype(device)
    recipe = work.recipe
    return {
        "output_dir": str(work.scratch / "output"),
        "max_steps": recipe.max_steps or -1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": work.rows_per_micro_batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_gradient_norm,
        "optim": "adamw_torch_fused",
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_checkpointing": work.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "seed": recipe.seed,
        "disable_tqdm": True,
    }


def _columns(documents: Documents) -> Any:
    """A dataset of token ids and labels."""
    import numpy as np
    from datasets import Dataset

    from workflow_scripts.train.batches import IGNORED

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for document in documents:
        columns["input_ids"].append(document.input_ids)
        columns["labels"].append(
            np.where(document.is_supervised, document.input_ids, IGNORED).astype(np.int32)
        )
    return Dataset.from_dict(columns)


def packed_lengths(examples: list[dict[str, Any]]) -> list[int]:
    """Of the documents in rows that TRL packed."""
    return [length for row in examples for length in row["seq_lengths"]]


def document_lengths(examples: list[dict[str, Any]]) -> list[int]:
    """Of documents that have a row each."""
    return [len(row["input_ids"]) for row in examples]


def word_tokenizer() -> Any:
    """Trainers ask for a tokenizer; of this one they take the padding token and no more."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
    )


def write_checkpoint(config: dict[str, Any], folder: Path, *, seed: int) -> None:
    """The random base as a folder in NF4, with a tokenizer; once."""
    from tests.benchmarks.random_models import random_base

    if (folder / "tokenizer_config.json").is_file():
        return
    random_base(config, attention="sdpa", seed=seed).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def missing_package(contestant: str) -> str | None:
    """Why a contestant cannot even be tried; None where it can."""
    packages = {"trl": "trl", "trl_our_attention": "trl", "unsloth": "unsloth"}
    name = packages.get(contestant)
    if name and importlib.util.find_spec(name) is None:
        return f"not installed: {name}"
    return None
