"""Cut a text into chunks of one context, scored as llama-perplexity scores them.

The chunks follow each other without overlap. BOS replaces the first token of each, and the second
half is scored, so every scored token has at least half a context before it. Chunks are documents
like any other: every link scores the same token ids.

python -m workflow_scripts.evaluate.chunk_text --text wiki.test.raw --tokenizer tokenizer/
    --facts facts.json --settings '{"text_context_tokens": 512}' --tokens wiki.arrow
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.settings import EvaluationSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("chunk_text")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation`, its text keys")
    parser.add_argument("--tokens", type=Path, required=True, help="to write: documents")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(EvaluationSettings, arguments.settings)
    context_tokens = settings.text_context_tokens
    served = Facts.read(arguments.facts).served_context_tokens
    if context_tokens > served:
        raise log.StageError(
            "the chunks of a text are longer than the context that every link serves",
            where="evaluation.text_context_tokens",
            found=context_tokens,
            expected=f"at most {served}, the sliding window or the context ({arguments.facts})",
        )

    from workflow_scripts.evaluate import text_chunks
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer

    official = load_mistral_tokenizer(arguments.tokenizer, for_training=True)
    tokenizer = official.instruct_tokenizer.tokenizer
    token_ids = text_chunks.encode_bare(read_text(arguments.text), tokenizer)
    chunks = text_chunks.cut(token_ids, tokenizer.bos_id, context_tokens=context_tokens)
    if len(chunks) < 2:
        raise log.StageError(
            "the text is too short to be scored",
            where=arguments.text,
            found=f"{len(token_ids):,} tokens",
            expected=f"at least {2 * context_tokens:,}, two chunks of"
            " evaluation.text_context_tokens",
            to_fix="take a longer text, or shorter chunks",
        )
    documents = text_chunks.as_documents(chunks, name=arguments.tokens.stem)
    files.write_arrow(arguments.tokens, documents)
    logger.info("cut n_chunks=%d context_tokens=%d text=%s", *chunks.shape, arguments.text)


def read_text(path: Path) -> str:
    """Return a text as llama.cpp's tools read it: without the line end that closes the file.

    Raises:
        StageError: the file is missing or not UTF-8.
    """
    files.check_whole(path)
    try:
        return path.read_bytes().decode().removesuffix("\n")
    except FileNotFoundError as error:
        raise log.StageError(
            "a text to score is missing", where=path, to_fix="correct its path in evaluation.texts"
        ) from error
    except UnicodeDecodeError as error:
        raise log.StageError(
            "a text to score is not UTF-8", where=path, found=str(error), to_fix="convert it"
        ) from error


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
