"""The merged model in AWQ's 4 bits (arXiv:2306.00978): a folder that vLLM, SGLang and others serve.

auto-round scales the channels that the chats drive most, chooses a clipping limit for each group of
weights, and packs the weights. It is calibrated on chats of the training split, never on validation
or test text; each chat is a separate sequence, cut to the window. Arithmetic is float32, one block
at a time on the GPU. Without a GPU the log says how long it will take.

python -m workflow_scripts.quantize.quantize_awq --merged merged/ --facts facts.json
    --tokens tokens/train.arrow --settings '{}' --awq awq/
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.settings import AwqSettings, settings_from_json

OUTPUT_VERSION = 1
PACKAGE = "auto-round==0.16.1"
# auto-round skips a layer whose inputs or outputs are not a multiple of this.
ALIGNMENT = 32
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
    from workflow_scripts.quantize import awq, calibration
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
    logger.info("started %s", log.versions("auto-round", "torch", "transformers"))
    awq.tell_duration(facts, n_tokens, logger)
    started = time.perf_counter()
    with files.atomic_folder(arguments.awq) as folder:
        quantization = awq.quantize(
            arguments.merged, facts, sequences, settings.group_size, folder=folder
        )
        awq.check_packed(folder, facts)
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
            expected=f"{PACKAGE}, as in requirements.lock",
            to_fix=f"pip install -r requirements.lock (or {PACKAGE} alone), or set awq.use: false",
        )


def check_shape(facts: ModelShape, group_size: int, where: Path) -> None:
    """Check that every linear layer can be packed.

    Raises:
        StageError: the model is a mixture of experts, or a layer does not consist of whole groups.
    """
    if facts.n_experts:
        raise StageError(
            "AWQ is not supported for a mixture of experts",
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
            "the model's layers do not consist of whole groups",
            where=where,
            found=", ".join(f"{name} {size}" for name, size in broken.items()),
            expected=f"multiples of awq.group_size ({group_size})",
            to_fix=f"set awq.group_size: {fitting[0]}" if fitting else "set awq.use: false",
        )
    if outputs % ALIGNMENT:
        raise StageError(
            "the model's key layers cannot be packed",
            where=where,
            found=f"n_kv_heads × head_dim {outputs}",
            expected=f"a multiple of {ALIGNMENT}",
            to_fix="set awq.use: false",
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
