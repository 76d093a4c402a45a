"""Read what a model is from its own files: window, heads, context, vocabulary, file hashes.

Every stage that needs a fact about the model takes it from this file, never from the model's name.
Where the config stretches the model's positions (RoPE scaling), the facts are those of the
stretched model.

This is also where an unusable checkpoint is refused, before chats are rendered or anything is
trained: one that is already quantized, lacks a tensor or holds another, has a weight that is not a
number, or has more or fewer embeddings than its tokenizer has tokens.

python -m workflow_scripts.models.read_model_facts --checkpoint results/models/m/checkpoint
    --facts results/models/m/facts.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, FileFacts
from workflow_scripts.models import checkpoint as checkpoints, tensors, tokenizer_files
from workflow_scripts.settings import RopeScalingSettings, settings_from_json

OUTPUT_VERSION = 2
logger = log.stage_logger("read_model_facts")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--version", default="", help="of the tokenizer; empty reads it")
    parser.add_argument("--rope-scaling", help="JSON of `models.<name>.rope_scaling`")
    parser.add_argument("--facts", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    scaling = (
        settings_from_json(RopeScalingSettings, arguments.rope_scaling)
        if arguments.rope_scaling
        else None
    )

    shape = checkpoints.read_shape(arguments.checkpoint, scaling)
    tokenizer = tokenizer_files.find_tokenizer(arguments.checkpoint, arguments.version or None)
    checkpoints.check_whole(arguments.checkpoint, shape)
    tokenizer_files.check_vocabulary(
        tokenizer, shape.vocabulary_size, where=arguments.checkpoint / "config.json"
    )
    counted = [
        arguments.checkpoint / "config.json",
        tokenizer,
        *checkpoints.weight_files(arguments.checkpoint),
    ]
    found: dict[str, FileFacts] = {}
    for path in log.progress(counted, logger, total=len(counted), unit="files"):
        if path.suffix == ".safetensors":
            # Here, as its bytes are read anyway.
            tensors.check_all_values([path])
        found[path.name] = FileFacts(sha256=files.sha256(path), size_bytes=path.stat().st_size)
    facts = Facts(
        **shape.model_dump(),
        tokenizer_version=arguments.version or tokenizer_files.tokenizer_version(tokenizer),
        files=found,
    )
    if facts.sliding_window is None and "sliding_window" not in files.read_json(
        arguments.checkpoint / "config.json"
    ):
        logger.warning(
            "found no sliding_window in config.json: taken as full attention (transformers alone"
            " would take 4096)"
        )
    if facts.model_type == "ministral":
        logger.warning(
            "found a Ministral: it trains and merges, but llama.cpp has no converter for it, so"
            " `export` will stop; build the target `train`"
        )
    if scaling and scaling.type == "dynamic":
        logger.warning(
            "found rope_scaling.type: dynamic: it trains and merges, but GGUF has no form of it, so"
            " `export` will stop; build the target `train`. In packed rows it follows the longest"
            " document of the micro-batch"
        )
    window = facts.sliding_window
    if scaling and window and window < facts.context_tokens:
        logger.warning(
            "found a sliding window of %d tokens: attention sees no further, however positions are"
            " stretched",
            window,
        )
    facts.write(arguments.facts)
    logger.info("read %s", log.fields(facts.model_dump()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
