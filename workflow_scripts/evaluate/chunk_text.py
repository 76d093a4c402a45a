"""Cut a text into chunks of one context, scored as llama-perplexity scores them.

The chunks lie end to end; the first token of each is replaced by BOS, and the second half is
scored, so that every scored token has at least half a context before it. They are documents like
any other: every link scores the same token ids.

python -m workflow_scripts.evaluate.chunk_text --text wiki.test.raw --tokenizer tokenizer/
    --facts facts.json --settings '{"text_context_tokens": 512}' --tokens wiki.arrow
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
from workflow_scripts.settings import EvaluationSettings, settings_from_json
from workflow_scripts.tokens.documents import documents_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from mistral_common.tokens.tokenizers.base import Tokenizer

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
            "the chunks of a text are longer than what every link reads alike",
            where="evaluation.text_context_tokens",
            found=context_tokens,
            expected=f"at most {served}, the sliding window or the context ({arguments.facts})",
        )
    official = load_mistral_tokenizer(arguments.tokenizer, for_training=True)
    tokenizer = official.instruct_tokenizer.tokenizer
    token_ids = encode_bare(read_text(arguments.text), tokenizer)
    # BOS stands before the text as a whole too, so that chunks begin where llama.cpp's do.
    n_chunks = (1 + len(token_ids)) // context_tokens
    if n_chunks < 2:
        raise log.StageError(
            "the text is too short to be scored",
            where=arguments.text,
            found=f"{len(token_ids):,} tokens",
            expected=f"at least {2 * context_tokens:,}, two chunks"
            " (evaluation.text_context_tokens: half of it)",
            to_fix="take a longer text, or shorter chunks",
        )
    chunks = cut(token_ids, tokenizer.bos_id, context_tokens=context_tokens)
    files.write_arrow(arguments.tokens, as_documents(chunks, name=arguments.tokens.stem))
    logger.info("cut n_chunks=%d context_tokens=%d text=%s", *chunks.shape, arguments.text)


def read_text(path: Path) -> str:
    """A text as llama.cpp's tools read it: without the line end that closes the file.

    Raises:
        StageError: the file is missing or not UTF-8.
    """
    files.check_whole(path)
    try:
        return path.read_bytes().decode().removesuffix("\n")
    except FileNotFoundError as error:
        raise log.StageError(
            "a text to score is missing", where=path, to_fix="evaluation.texts names it"
        ) from error
    except UnicodeDecodeError as error:
        raise log.StageError(
            "a text to score is not UTF-8", where=path, found=str(error), to_fix="convert it"
        ) from error


def encode_bare(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """(n,) int32 token ids of a text as it stands, without BOS.

    SentencePiece puts a space before a text, which llama.cpp, given the same vocabulary, does not.
    The space goes to a line end put in front, which is a byte of its own and merges with nothing.
    """
    import numpy as np
    from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer

    from workflow_scripts.tokens.segment_cache import TextEncoder

    encoder = TextEncoder(tokenizer)
    if not is_sentencepiece_tokenizer(tokenizer):
        return np.frombuffer(encoder.encode(text), np.int32)
    line_end, found = encoder.encode("\n"), encoder.encode("\n" + text)
    assert found.startswith(line_end)
    return np.frombuffer(found[len(line_end) :], np.int32)


def cut(token_ids: np.ndarray, bos_id: int, *, context_tokens: int) -> np.ndarray:
    """(n_chunks, context_tokens) int32; what does not fill the last chunk is left out.

    Args:
        token_ids: (n,) of the text, without BOS.
    Source: llama.cpp's tools/perplexity/perplexity.cpp, `perplexity`.
    """
    import numpy as np

    with_bos = np.concatenate([np.array([bos_id], np.int32), token_ids])
    n_chunks = len(with_bos) // context_tokens
    chunks = with_bos[: n_chunks * context_tokens].reshape(n_chunks, context_tokens).copy()
    chunks[:, 0] = bos_id
    return chunks


def as_documents(chunks: np.ndarray, *, name: str) -> pa.Table:
    """Chunks as documents whose second half is scored, but for its first token.

    llama-perplexity asks for logits from the middle on, and these predict the tokens after.
    """
    import pyarrow as pa

    n_chunks, context_tokens = chunks.shape
    span = [context_tokens // 2 + 1, context_tokens]
    columns = {
        "id": [f"{name}/{number}" for number in range(n_chunks)],
        "input_ids": list(chunks),
        "supervised_spans": [span] * n_chunks,
        "n_tokens": [context_tokens] * n_chunks,
        "n_supervised_tokens": [span[1] - span[0]] * n_chunks,
        "n_copies": [1] * n_chunks,
    }
    return pa.table(columns, schema=documents_schema())


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
