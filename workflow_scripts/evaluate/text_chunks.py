"""Chunks of a text, cut and scored as llama-perplexity does."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from mistral_common.tokens.tokenizers.base import Tokenizer
from mistral_common.tokens.tokenizers.sentencepiece import is_sentencepiece_tokenizer

from workflow_scripts.tokens.documents import documents_schema


def encode_bare(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Return the (n,) int32 token ids of a text exactly as it is, without BOS.

    SentencePiece puts a space before a text; llama.cpp, given the same vocabulary, does not. Here
    a line end takes that space: it is put in front, is a token of its own bytes, and merges with
    nothing.
    """
    in_front = "\n" if is_sentencepiece_tokenizer(tokenizer) else ""
    line_end, found = (
        tokenizer.encode(each, bos=False, eos=False) for each in (in_front, in_front + text)
    )
    assert found[: len(line_end)] == line_end
    return np.array(found[len(line_end) :], np.int32)


def cut(token_ids: np.ndarray, bos_id: int, *, context_tokens: int) -> np.ndarray:
    """Return (n_chunks, context_tokens) int32; a rest that does not fill a chunk is left out.

    Args:
        token_ids: (n,) of the text, without BOS.
    Source: llama.cpp's tools/perplexity/perplexity.cpp, `perplexity`.
    """
    # BOS also comes before the text as a whole, so that chunks begin where llama.cpp's do.
    with_bos = np.concatenate([np.array([bos_id], np.int32), token_ids])
    n_chunks = len(with_bos) // context_tokens
    chunks = with_bos[: n_chunks * context_tokens].reshape(n_chunks, context_tokens).copy()
    chunks[:, 0] = bos_id
    return chunks


def as_documents(chunks: np.ndarray, *, name: str) -> pa.Table:
    """Return chunks as documents whose second half is scored, except for its first token.

    llama-perplexity reads logits from the middle on, and these predict the tokens after.
    """
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
