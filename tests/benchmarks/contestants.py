"""The ways from a file of chats to token ids that are compared, each as the commands a user types.

A contestant works in an empty folder and finds no cache but the operating system's; all use the
same tokenizer and the same number of worker processes.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files

if TYPE_CHECKING:
    import numpy as np

# What no peer does: comparing every conversation with every other.
SAME_WORK = {"near_duplicates": None, "decontamination": None}
# All that axolotl's preprocessing reads of a model, beside its tokenizer.
MODEL_CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 32_768,
    "max_position_embeddings": 32_768,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Stage:
    """One command of a contestant."""

    name: str
    command: list[object]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """One way from a file of chats to token ids."""

    name: str
    stages: Callable[[Path, Path], list[Stage]]
    """Of the chats, and of the folder to work in."""
    written: str
    """Where in the folder its Arrow files with `input_ids` are, as a glob."""


def tramontane(
    tokenizer: Path, *, n_processes: int, name: str, cleaning: Mapping[str, Any]
) -> Contestant:
    """`clean_dataset` and `render_chats`, as the workflow's rules start them.

    Args:
        tokenizer: folder of export_tokenizer.
        cleaning: `datasets.<name>.cleaning`.
    """

    def stages(chats: Path, folder: Path) -> list[Stage]:
        clean, tokens = folder / "clean", folder / "tokens"
        python, spread = [sys.executable, "-m"], ["--processes", n_processes]
        return [
            Stage(
                "clean_dataset",
                [*python, "workflow_scripts.chats.clean_dataset", "--source", "synthetic", chats]
                + ["--settings", json.dumps({"cleaning": cleaning}), *spread, "--clean", clean],
            ),
            Stage(
                "render_chats",
                [*python, "workflow_scripts.tokens.render_chats", "--clean", clean]
                + ["--tokenizer", tokenizer, "--settings", "{}", *spread, "--tokens", tokens],
            ),
        ]

    return Contestant(name, stages, written="tokens/*.arrow")


def datasets_map(tokenizer: Path, *, n_processes: int) -> Contestant:
    """mistral-common under `datasets.map`."""

    def stages(chats: Path, folder: Path) -> list[Stage]:
        command = [sys.executable, "-m", "tests.benchmarks.datasets_peer", "--chats", chats]
        command += ["--tokenizer", next(tokenizer.glob("tokenizer.model.v*"))]
        command += ["--processes", n_processes, "--out", folder / "tokens"]
        return [Stage("datasets_map", command, _fresh_hub_cache(folder))]

    return Contestant("datasets_map", stages, written="tokens/*.arrow")


def axolotl(program: Path, tokenizer: Path, *, n_processes: int) -> Contestant:
    """Its `preprocess` command, which reads a model's config and tokenizer but no weights.

    Args:
        program: in an environment of its own, whose versions differ from ours.
    """

    def stages(chats: Path, folder: Path) -> list[Stage]:
        model = folder / "model"
        shutil.copytree(tokenizer, model)
        files.write_json(model / "config.json", MODEL_CONFIG)
        chats_source = {"path": str(chats), "ds_type": "json", "type": "chat_template"}
        settings = {
            "base_model": str(model),
            "chat_template": "tokenizer_default",
            "datasets": [{**chats_source, "field_messages": "messages"}],
            "dataset_prepared_path": str(folder / "prepared"),
            "dataset_num_proc": n_processes,
            "output_dir": str(folder / "run"),
            "sequence_len": 32_768,
            "val_set_size": 0,
            # Wanted by its validation, read by nothing here.
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_epochs": 1,
            "learning_rate": 1e-4,
            "optimizer": "adamw_torch",
            "bf16": False,
            "fp16": False,
            "tf32": False,
        }
        files.write_json(folder / "config.yml", settings)  # JSON is YAML
        environment = {**_fresh_hub_cache(folder), "AXOLOTL_DO_NOT_TRACK": "1"}
        return [Stage("axolotl", [program, "preprocess", folder / "config.yml"], environment)]

    return Contestant("axolotl", stages, written="prepared/*/*.arrow")


def _fresh_hub_cache(folder: Path) -> dict[str, str]:
    """Nothing is read from an earlier run's cache, nor from the network."""
    cache = str(folder / "hub_cache")
    return {"HF_HOME": cache, "HF_DATASETS_CACHE": f"{cache}/datasets", "HF_HUB_OFFLINE": "1"}


def written_documents(paths: Iterable[Path]) -> Iterator[np.ndarray]:
    """The token ids of each document, int32, of Arrow files or streams (datasets writes these)."""
    import numpy as np
    import pyarrow as pa

    for path in paths:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
            for batch in batches:
                column = batch["input_ids"]
                offsets = column.offsets.to_numpy()
                tokens = column.values.to_numpy().astype(np.int32, copy=False)
                for start, end in zip(offsets[:-1], offsets[1:], strict=True):
                    yield tokens[start:end]
