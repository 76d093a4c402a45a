"""Build the demo's base model: a small real Mistral, pre-trained for a few minutes on this machine.

Random weights, the official v3 tokenizer that mistral-common carries, and the standard library's
own documentation as text: nothing is downloaded.

python -m workflow_scripts.models.build_demo_model --settings '{"n_pretraining_steps": 160}'
    --checkpoint results/models/demo/checkpoint
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.models import demo_pretraining
from workflow_scripts.settings import DemoModelSettings, settings_from_json

OUTPUT_VERSION = 3
TOKENIZER = "mistral_instruct_tokenizer_240323.model.v3"
N_HEADS, N_KV_HEADS = 8, 2
logger = log.stage_logger("build_demo_model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `models.<name>.generate`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(DemoModelSettings, arguments.settings)

    import mistral_common
    import torch
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    from transformers import MistralConfig, MistralForCausalLM

    from workflow_scripts.models.checkpoint import default_device

    logger.info("started %s settings=%s", log.versions("torch", "transformers"), arguments.settings)
    tokenizer_file = Path(mistral_common.__file__).parent / "data" / TOKENIZER
    tokenizer = MistralTokenizer.from_file(tokenizer_file).instruct_tokenizer.tokenizer
    torch.manual_seed(settings.seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=tokenizer.n_words,
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
    ).to(default_device())
    losses = demo_pretraining.pretrain(
        model,
        lambda text: tokenizer.encode(text, bos=False, eos=False),
        n_steps=settings.n_pretraining_steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        logger=logger,
    )
    with files.atomic_folder(arguments.checkpoint) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model.v3")
        rows = {"step": list(range(1, len(losses) + 1)), "loss_nats_per_token": losses}
        files.write_json(folder / "pretraining.json", rows)
    logger.info(
        "wrote n_parameters=%d loss_nats_per_token=%.3f path=%s",
        model.num_parameters(),
        losses[-1],
        arguments.checkpoint,
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
