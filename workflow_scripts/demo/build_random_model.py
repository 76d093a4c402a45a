"""Build a small Mistral with random weights in seconds, for tests.

The official v3 tokenizer is part of mistral-common; nothing is downloaded.

python -m workflow_scripts.demo.build_random_model --settings '{"n_layers": 2}'
    --checkpoint results/models/tiny/checkpoint
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.models import tokenizer_files
from workflow_scripts.settings import RandomModelSettings, settings_from_json

OUTPUT_VERSION = 1
VOCABULARY = 32_768  # size, v3 tokenizer
N_HEADS, N_KV_HEADS = 8, 2
logger = log.stage_logger("build_random_model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `models.<name>.generate`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(RandomModelSettings, arguments.settings)

    import torch
    from transformers import MistralConfig, MistralForCausalLM

    logger.info("started %s settings=%s", log.versions("torch", "transformers"), arguments.settings)
    torch.manual_seed(settings.seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.n_layers,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_KV_HEADS,
            max_position_embeddings=settings.context_tokens,
            sliding_window=settings.sliding_window,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with files.atomic_folder(arguments.checkpoint) as folder:
        model.bfloat16().save_pretrained(folder)
        shutil.copyfile(tokenizer_files.official_v3(), folder / "tokenizer.model.v3")
    logger.info("wrote n_parameters=%d path=%s", model.num_parameters(), arguments.checkpoint)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
