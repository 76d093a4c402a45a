"""The folder of a merged model, next to its weights: config, generation settings, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError

GENERATION = "generation_config.json"
# Keys of a config.json that do not change what the model computes.
UNJUDGED_KEYS = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "quantization_config", "sliding_window", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def complete(folder: Path, tokenizer: Path) -> None:
    """Add the files that plain `from_pretrained` and `generate` need besides weights and config.

    Args:
        tokenizer: folder of export_tokenizer.
    """
    if not (folder / GENERATION).is_file():
        config = files.read_json(folder / "config.json")
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        files.write_json(folder / GENERATION, tokens)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


def check(merged: Path, tokenizer: Path, facts: ModelShape) -> None:
    """Check that the folder is complete: it has the tokenizer that ships, and loads with the window
    and vocabulary that were trained.

    Args:
        tokenizer: folder of export_tokenizer, which its own gate has judged.
    Raises:
        StageError: the first thing that is missing, or differs.
    """
    expected = {path.name: files.sha256(path) for path in sorted(tokenizer.iterdir())}
    for name in (*expected, GENERATION):
        if not (merged / name).is_file():
            raise StageError(
                "the merged folder is not complete",
                where=merged,
                found=f"no {name}",
                expected=", ".join((*expected, GENERATION)),
                to_fix="merge again",
            )
    for name, digest in expected.items():
        if files.sha256(merged / name) != digest:
            raise StageError(
                "the merged folder has another tokenizer than training",
                where=merged / name,
                found="other bytes",
                expected=f"those of {tokenizer / name}",
                to_fix="merge again; the tokenizer and its template are the base's",
            )
    config = AutoConfig.from_pretrained(merged)
    window = getattr(config, "sliding_window", None)
    if window != facts.sliding_window:
        raise StageError(
            "the merged folder loads with another sliding window",
            where=f"{merged / 'config.json'}, sliding_window",
            found=window,
            expected=facts.sliding_window,
            to_fix="merge again",
        )
    n_tokens = len(AutoTokenizer.from_pretrained(merged))
    if n_tokens != config.vocab_size:
        raise StageError(
            "the tokenizer does not fit the merged model",
            where=merged,
            found=f"{n_tokens} tokens",
            expected=f"{config.vocab_size}, the rows of its embeddings",
            to_fix="take a base model whose tokenizer holds the tokens that were added",
        )


def check_config(merged: Path, checkpoint: Path, facts: ModelShape) -> None:
    """Check that the merged model's config.json says what the base's says, with the positions of
    the facts.

    Args:
        checkpoint: folder of the base model.
    Raises:
        StageError: a key that changes what the model computes has another value.
    """
    found = AutoConfig.from_pretrained(merged).to_dict()
    expected = AutoConfig.from_pretrained(checkpoint).to_dict()
    unjudged = set(UNJUDGED_KEYS)
    if facts.rope_scaling:
        expected["rope_parameters"] = facts.rope_parameters
        unjudged |= {"max_position_embeddings", "head_dim"}
    for key in sorted(expected.keys() - unjudged):
        if found.get(key) != expected[key]:
            raise StageError(
                "the merged model's config differs from its base's",
                where=f"{merged / 'config.json'}, {key}",
                found=found.get(key),
                expected=expected[key],
                to_fix="merge again",
            )
