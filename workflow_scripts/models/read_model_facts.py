"""Read a model's facts from its own files: window, heads, context, vocabulary, file hashes.

Every stage takes facts about the model from the written file, never from the model's name. If the
config sets a RoPE scaling, the facts are those of the scaled model.

This program also refuses an unusable checkpoint before chats are rendered: one that is already
quantized, lacks a tensor or has an extra one, has a weight that is not a finite number, or has more
or fewer embeddings than its tokenizer has tokens.

python -m workflow_scripts.models.read_model_facts --checkpoint results/models/m/checkpoint
    --facts results/models/m/facts.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, FileFacts
from workflow_scripts.models import checkpoint_files, tensors, tokenizer_files
from workflow_scripts.settings import RopeScalingSettings, settings_from_json

OUTPUT_VERSION = 2
logger = log.stage_logger("read_model_facts")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--version", default="", help="version of the tokenizer; empty reads it")
    parser.add_argument("--rope-scaling", help="JSON of `models.<name>.rope_scaling`")
    parser.add_argument("--facts", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    scaling = (
        settings_from_json(RopeScalingSettings, arguments.rope_scaling)
        if arguments.rope_scaling
        else None
    )

    shape = checkpoint_files.read_shape(arguments.checkpoint, scaling)
    tokenizer = tokenizer_files.find_tokenizer(arguments.checkpoint, arguments.version or None)
    checkpoint_files.check_whole(arguments.checkpoint, shape)
    tokenizer_files.check_vocabulary(
        tokenizer, shape.vocabulary_size, where=arguments.checkpoint / "config.json"
    )
    counted = [
        arguments.checkpoint / "config.json",
        tokenizer,
        *checkpoint_files.weight_files(arguments.checkpoint),
    ]
    found: dict[str, FileFacts] = {}
    for path in log.progress(counted, logger, total=len(counted), unit="files"):
        if path.suffix == ".safetensors":
            # Checked here because the hash reads every byte anyway.
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
            "found no sliding_window in config.json: used full attention (transformers would assume"
            " 4096)"
        )
    if facts.model_type == "ministral":
        logger.warning(
            "found a Ministral: training and merging work, but llama.cpp has no converter for it,"
            " so `export` will fail; build the target `train`"
        )
    if scaling and scaling.type == "dynamic":
        logger.warning(
            "found rope_scaling.type: dynamic: training and merging work, but GGUF cannot store it,"
            " so `export` will fail; build the target `train`. In packed rows the scaling follows"
            " the longest document of the micro-batch"
        )
    window = facts.sliding_window
    if scaling and window and window < facts.context_tokens:
        logger.warning(
            "found a sliding window of %d tokens: attention sees no further, even with scaling",
            window,
        )
    facts.write(arguments.facts)
    logger.info("read %s", log.fields(facts.model_dump()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
