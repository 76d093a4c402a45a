"""The merged model in AWQ's 4 bits (arXiv:2306.00978): a folder that vLLM, SGLang and others serve.

auto-round scales the channels that the chats drive, chooses where each group of weights is clipped,
and packs. It is calibrated on chats of the training split, never on validation or test text, each
chat apart and cut to the window. Arithmetic is float32, of a block at a time on the GPU; without
one the log says how long it will take.

python -m workflow_scripts.quantize.quantize_awq --merged merged/ --facts facts.json
    --tokens tokens/train.arrow --settings '{}' --awq awq/
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models import tensors
from workflow_scripts.settings import AwqSettings, settings_from_json

if TYPE_CHECKING:
    import numpy as np

OUTPUT_VERSION = 1
PACKAGE = "auto-round==0.16.1"
LAYERS_OF_A_BLOCK = 7  # q, k, v, o, gate, up, down
# Both of them multiples of this, or auto-round passes a layer by.
ALIGNMENT = 32
# What the search tries: strengths of scaling; limits to clip at, on so many tokens.
N_STRENGTHS = 20
N_CLIPS = 10
CLIP_TOKENS = 512
logger = log.stage_logger("quantize_awq")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--merged", type=Path, required=True, help="folder of the merged model")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokens", type=Path, required=True, help="training documents")
    parser.add_argument("--settings", required=True, help="JSON of `awq`")
    parser.add_argument("--awq", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(AwqSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    check_package()
    check_shape(facts, settings.group_size, arguments.facts)

    from workflow_scripts.models.checkpoint_files import weight_files
    from workflow_scripts.quantize import calibration
    from workflow_scripts.tokens.documents import Documents

    sequences = list(
        calibration.chats(
            Documents(arguments.tokens),
            chunk_tokens=min(settings.sequence_tokens, facts.served_context_tokens),
            n_tokens=settings.n_tokens,
        )
    )
    if not sequences:
        raise StageError("there is no text to calibrate on", where=arguments.tokens)
    n_tokens = sum(map(len, sequences))
    tell_duration(facts, n_tokens)
    started = time.perf_counter()
    with files.atomic_folder(arguments.awq) as folder:
        quantization = quantize(
            arguments.merged, facts, sequences, settings.group_size, folder=folder
        )
        check_packed(folder, facts)
        for path in arguments.merged.iterdir():
            if ".safetensors" not in path.suffixes:  # shards, and their index
                shutil.copyfile(path, folder / path.name)
        config = files.read_json(arguments.merged / "config.json")
        config.pop("torch_dtype", None)
        config |= {"dtype": "float16", "quantization_config": quantization}
        files.write_json(folder / "config.json", config)
        size_bytes = sum(path.stat().st_size for path in weight_files(folder))
    logger.info(
        "quantized n_sequences=%d n_tokens=%d size_bytes=%d duration_seconds=%.1f path=%s",
        len(sequences),
        n_tokens,
        size_bytes,
        time.perf_counter() - started,
        arguments.awq,
    )


def check_package() -> None:
    """
    Raises:
        StageError: auto-round is not installed.
    """
    if importlib.util.find_spec("auto_round") is None:
        raise StageError(
            "the package that quantizes to AWQ is not in this environment",
            where="awq.use",
            found="no module auto_round",
            expected=f"{PACKAGE}, as requirements.lock has it",
            to_fix=f"pip install -r requirements.lock (or {PACKAGE} alone), or set awq.use: false",
        )


def check_shape(facts: ModelShape, group_size: int, where: Path) -> None:
    """Every linear layer must be one that can be packed.

    Raises:
        StageError: a mixture, or a layer that is not made of whole groups.
    """
    if facts.n_experts:
        raise StageError(
            "a mixture of experts is not quantized to AWQ here",
            where=f"{where}, n_experts",
            found=facts.n_experts,
            expected="none",
            to_fix="set awq.use: false; GGUF quantizes mixtures",
        )
    sizes = {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.intermediate_size,
        "n_heads × head_dim": facts.n_heads * facts.head_dim,
    }
    broken = {name: size for name, size in sizes.items() if size % group_size}
    outputs = facts.n_kv_heads * facts.head_dim
    if broken:
        fitting = [size for size in (64, 32) if not any(found % size for found in sizes.values())]
        raise StageError(
            "the model's layers are not made of whole groups",
            where=where,
            found=", ".join(f"{name} {size}" for name, size in broken.items()),
            expected=f"multiples of awq.group_size ({group_size})",
            to_fix=f"set awq.group_size: {fitting[0]}" if fitting else "set awq.use: false",
        )
    if outputs % ALIGNMENT:
        raise StageError(
            "the model's keys are too few to be packed",
            where=where,
            found=f"n_kv_heads × head_dim {outputs}",
            expected=f"a multiple of {ALIGNMENT}",
            to_fix="set awq.use: false",
        )


def tell_duration(facts: ModelShape, n_tokens: int) -> None:
    """Without a GPU: about how long it will take, by what is computed and this machine's rates."""
    import torch

    if torch.cuda.is_available():
        return
    hidden, inner = facts.hidden_size, facts.intermediate_size
    keys = hidden * facts.head_dim * facts.n_kv_heads
    queries = hidden * facts.head_dim * facts.n_heads
    attention, mlp = 2 * (queries + keys), 3 * hidden * inner
    # Tried: q, k, v by what attention makes of them, gate and up by the whole MLP, down alone.
    tried = (N_STRENGTHS + 1) * (attention + mlp + hidden * inner)
    products = facts.n_layers * n_tokens * (tried + 2 * (attention + mlp))
    # Clipped: all but q and k, each output's groups apart.
    clipped = facts.n_layers * (keys + queries + mlp)
    clips = (N_CLIPS + 1) * min(n_tokens, CLIP_TOKENS) * clipped
    inputs, weights = torch.rand(128, hidden), torch.rand(256, hidden)
    seconds = products * seconds_each(lambda: inputs @ weights.T, 128 * 256 * hidden)
    groups, rows = inputs.view(1, 128, -1, ALIGNMENT), weights.view(256, 1, -1, ALIGNMENT)
    seconds += clips * seconds_each(lambda: (groups * rows).sum(-1), 128 * 256 * hidden)
    logger.warning(
        "found no GPU: the CPU will take about duration_hours=%.2g (n_tokens=%d; awq.n_tokens"
        " makes it less)",
        seconds / 3600,
        n_tokens,
    )


def seconds_each(compute: Callable[[], object], n: int) -> float:
    """Of one of the `n` products that a call computes, after a call to warm up."""
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
        sequences: to calibrate on, token ids of each.
        folder: gets the shards and, of several, their index.
    Returns:
        `quantization_config` of the config.json.
    """
    import torch
    from auto_round import AutoRound
    from auto_round.algorithms.quantization.rtn.config import RTNConfig
    from auto_round.algorithms.transforms.awq import AWQConfig
    from transformers import AutoTokenizer

    from workflow_scripts.models import awq_weights
    from workflow_scripts.models.checkpoint import default_device, load_model

    logger.info("started %s", log.versions("auto-round", "torch", "transformers"))
    logging.getLogger("autoround").setLevel(logging.WARNING)
    model = load_model(
        merged,
        window=facts.sliding_window,
        # auto-round's choice on a GPU is bfloat16, which would round what was scaled.
        precision="float32",
        rope=facts.rope_parameters,
        # Has a mask at every length: auto-round's cache takes no None among them.
        attention="eager",
        device="cpu",  # from where auto-round takes a block at a time to the GPU
    )
    scheme = {"bits": awq_weights.BITS, "group_size": group_size, "sym": False}
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(merged),
        scheme="W4A16",
        alg_configs=[
            # 0: no sequence is cut again.
            AWQConfig(
                n_grid=N_STRENGTHS,
                apply_clip=True,
                clip_n_grid=2 * N_CLIPS,  # of which it tries the upper half
                clip_n_sample_token=CLIP_TOKENS,
                awq_seqlen=0,
                **scheme,
            ),
            RTNConfig(disable_opt_rtn=True, **scheme),
        ],
        # Without a mask of its own, a sequence is seen to its end. One at a time, none is padded.
        dataset=[
            {"input_ids": torch.from_numpy(sequence.astype("int64"))[None], "attention_mask": None}
            for sequence in sequences
        ],
        batch_size=1,
        nsamples=len(sequences),
        seqlen=1,  # the shortest that it takes
        device_map=str(default_device()),
        low_gpu_mem_usage=True,
        low_cpu_mem_usage=False,
        amp=False,
    )
    made = folder / "made"
    rounding.quantize_and_save(str(made), format="auto_awq")
    # In a folder in it, named by the model and the scheme.
    for path in made.rglob("*.safetensors*"):
        path.replace(folder / path.name)
    (written,) = made.rglob("quantization_config.json")
    quantization = files.read_json(written)
    shutil.rmtree(made)
    return quantization


def check_packed(folder: Path, facts: ModelShape) -> None:
    """
    Raises:
        StageError: a linear layer was passed by.
    """
    names = tensors.stored(list(folder.glob("*.safetensors")))
    n_packed = sum(name.endswith(".qweight") for name in names)
    if n_packed != LAYERS_OF_A_BLOCK * facts.n_layers:
        raise StageError(
            "not every linear layer was quantized",
            where=folder,
            found=f"{n_packed} packed",
            expected=f"{LAYERS_OF_A_BLOCK * facts.n_layers}",
            to_fix=f"is this {PACKAGE}? if it is, please report it",
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
