"""AWQ with auto-round (arXiv:2306.00978): packed weights of a merged model."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.algorithms.quantization.rtn.config import RTNConfig
from auto_round.algorithms.transforms.awq import AWQConfig
from transformers import AutoTokenizer

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models import awq_weights, tensors
from workflow_scripts.models.checkpoint import default_device, load_model

ALIGNMENT = 32  # the smallest group
LAYERS_OF_A_BLOCK = 7  # q, k, v, o, gate, up, down
# Size of the search: strengths of scaling; limits to clip at, and the tokens they are tried on.
N_STRENGTHS = 20
N_CLIPS = 10
CLIP_TOKENS = 512


def tell_duration(facts: ModelShape, n_tokens: int, logger: logging.Logger) -> None:
    """Without a GPU, log an estimate of the duration, from the operations and the CPU's speed."""
    if torch.cuda.is_available():
        return
    hidden, inner = facts.hidden_size, facts.intermediate_size
    keys = hidden * facts.head_dim * facts.n_kv_heads
    queries = hidden * facts.head_dim * facts.n_heads
    attention, mlp = 2 * (queries + keys), 3 * hidden * inner
    # Search for scales: q, k, v by the output of attention; gate and up by that of the MLP; down
    # by its own.
    tried = (N_STRENGTHS + 1) * (attention + mlp + hidden * inner)
    products = facts.n_layers * n_tokens * (tried + 2 * (attention + mlp))
    # Search for clips: all layers except q and k, each group of each output separately.
    clipped = facts.n_layers * (keys + queries + mlp)
    clips = (N_CLIPS + 1) * min(n_tokens, CLIP_TOKENS) * clipped
    inputs, weights = torch.rand(128, hidden), torch.rand(256, hidden)
    seconds = products * seconds_each(lambda: inputs @ weights.T, 128 * 256 * hidden)
    groups, rows = inputs.view(1, 128, -1, ALIGNMENT), weights.view(256, 1, -1, ALIGNMENT)
    seconds += clips * seconds_each(lambda: (groups * rows).sum(-1), 128 * 256 * hidden)
    logger.warning(
        "found no GPU: the CPU will take about duration_hours=%.2g (n_tokens=%d; a smaller"
        " awq.n_tokens takes less)",
        seconds / 3600,
        n_tokens,
    )


def seconds_each(compute: Callable[[], object], n: int) -> float:
    """Time one of the `n` products that a call computes, after a call to warm up."""
    compute()
    started = time.perf_counter()
    compute()
    return (time.perf_counter() - started) / n


def quantize(
    merged: Path,
    facts: ModelShape,
    sequences: Sequence[np.ndarray],
    group_size: int,
    *,
    folder: Path,
) -> dict[str, Any]:  # untyped: transformers' JSON
    """Write the packed weights of a model.

    Args:
        sequences: token ids of each calibration sequence.
        folder: gets the shards and, if there are several, their index.
    Returns:
        `quantization_config` for config.json.
    """
    logging.getLogger("autoround").setLevel(logging.WARNING)
    model = load_model(
        merged,
        window=facts.sliding_window,
        # auto-round's own choice on a GPU, bfloat16, would round the scaled weights.
        precision="float32",
        rope=facts.rope_parameters,
        # Eager attention always makes a mask: auto-round's cache cannot hold None among masks.
        attention="eager",
        device="cpu",  # auto-round moves one block at a time to the GPU
    )
    scheme = {"bits": awq_weights.BITS, "group_size": group_size, "sym": False}
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(merged),
        scheme="W4A16",
        alg_configs=[
            # awq_seqlen=0: no sequence is cut again.
            AWQConfig(
                n_grid=N_STRENGTHS,
                apply_clip=True,
                clip_n_grid=2 * N_CLIPS,  # auto-round tries the upper half of them
                clip_n_sample_token=CLIP_TOKENS,
                awq_seqlen=0,
                **scheme,
            ),
            RTNConfig(disable_opt_rtn=True, **scheme),
        ],
        # Without an attention mask the whole sequence counts; one at a time, none is padded.
        dataset=[
            {"input_ids": torch.from_numpy(sequence.astype("int64"))[None], "attention_mask": None}
            for sequence in sequences
        ],
        batch_size=1,
        nsamples=len(sequences),
        seqlen=1,  # shortest sequence that auto-round accepts
        device_map=str(default_device()),
        low_gpu_mem_usage=True,
        low_cpu_mem_usage=False,
        amp=False,
    )
    made = folder / "made"
    rounding.quantize_and_save(str(made), format="auto_awq")
    # The files are in a subfolder named after the model and the scheme.
    for path in made.rglob("*.safetensors*"):
        path.replace(folder / path.name)
    (written,) = made.rglob("quantization_config.json")
    quantization = files.read_json(written)
    shutil.rmtree(made)
    return quantization


def check_packed(folder: Path, facts: ModelShape) -> None:
    """
    Raises:
        StageError: auto-round skipped a linear layer.
    """
    names = tensors.stored(list(folder.glob("*.safetensors")))
    n_packed = sum(name.endswith(".qweight") for name in names)
    if n_packed != LAYERS_OF_A_BLOCK * facts.n_layers:
        raise StageError(
            "not every linear layer was quantized",
            where=folder,
            found=f"{n_packed} packed",
            expected=f"{LAYERS_OF_A_BLOCK * facts.n_layers}",
            to_fix="check that auto-round is the version of requirements.lock; if so, report it",
        )
