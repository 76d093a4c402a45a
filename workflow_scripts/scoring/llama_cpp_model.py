"""A GGUF in llama.cpp as a source of logits, in bounded memory.

The high-level `Llama(logits_all=True)` would hold n_ctx × n_vocab floats. Here each token of a
batch is marked if its logits are needed, and they are read before the next batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import llama_cpp
import numpy as np

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from torch import Tensor

# llama.cpp's default. With 256, two layers of a 7B in Q4_K_M took 3 to 9 % more processor time
# (AVX2; two runs each, on a machine with other jobs).
BATCH_TOKENS = 512


@cache
def _silence_log() -> object:
    """Turn llama.cpp's own log off. The cache keeps the callback alive, as the library may call it
    until the process ends."""
    silent = llama_cpp.llama_log_callback(lambda level, text, _: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return silent


class LlamaCppModel:
    """A GGUF file that gives logits. Use as a context manager: llama.cpp's memory is freed at its
    end.

    Args:
        path: the GGUF.
        context_tokens: longest input; for `decode_together`, the sum of all sequences.
        n_threads: CPU threads.
        batch_tokens: most tokens in one batch.
        n_sequences: most sequences in one call of `decode_together`.
        observe: called with every node of the graph, as `ggml_backend_sched_eval_callback`; it must
            not raise.
    Raises:
        StageError: llama.cpp cannot load the file.
    """

    engine: Literal["llama.cpp"] = "llama.cpp"

    def __init__(
        self,
        path: Path,
        *,
        context_tokens: int,
        n_threads: int,
        batch_tokens: int = BATCH_TOKENS,
        n_sequences: int = 1,
        observe: Callable[[int, bool, object], bool] | None = None,
    ) -> None:
        self._path = path
        _silence_log()
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = -1 if llama_cpp.llama_supports_gpu_offload() else 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self._model:
            raise StageError("llama.cpp cannot load the GGUF", where=path, to_fix="make it again")
        context_params = llama_cpp.llama_context_default_params()
        context_params.n_ctx = context_tokens
        context_params.n_batch = context_params.n_ubatch = min(batch_tokens, context_tokens)
        context_params.n_threads = context_params.n_threads_batch = n_threads
        context_params.n_seq_max = n_sequences
        context_params.kv_unified = True  # sequences of any length share the context
        if observe is not None:
            # Kept alive here: llama.cpp stores only the address.
            self._observe = llama_cpp.ggml_backend_sched_eval_callback(observe)
            context_params.cb_eval = self._observe
        self._context = llama_cpp.llama_init_from_model(self._model, context_params)
        if not self._context:
            llama_cpp.llama_model_free(self._model)
            raise StageError("llama.cpp cannot make a context", where=path, found=context_tokens)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocabulary: int = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama_cpp.llama_batch_init(batch_tokens, 0, 1)
        self._batch_tokens = batch_tokens
        # Tokens in the cache that `resumed_logit_blocks` may build on.
        self._resumable = np.zeros(0, dtype=np.int64)

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(self, *_: object) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def forget(self) -> None:
        """Empty the key-value cache."""
        self._resumable = np.zeros(0, dtype=np.int64)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def decode(
        self, tokens: np.ndarray, *, first: int, wants_logits: np.ndarray
    ) -> np.ndarray | None:
        """Run tokens after those that are in the cache.

        Args:
            tokens: (n,) integer, n at most `batch_tokens`.
            first: position of the first of them.
            wants_logits: (n,) bool.
        Returns:
            (wanted, vocabulary) float32 in llama.cpp's own memory, valid until the next call; None
            if no logits are wanted.
        """
        self._run(
            tokens,
            positions=np.arange(first, first + len(tokens)),
            sequences=np.zeros(len(tokens), dtype=int),
            wants_logits=wants_logits,
        )
        n_wanted = int(wants_logits.sum())
        if not n_wanted:
            return None
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(n_wanted, self.n_vocabulary))

    def decode_together(self, sequences: Sequence[np.ndarray]) -> None:
        """Run several independent inputs at once, each from position 0, and compute the logits of
        all tokens.

        Args:
            sequences: (n,) integer each; together at most `batch_tokens`.
        """
        lengths = [len(sequence) for sequence in sequences]
        self.forget()
        self._run(
            np.concatenate(sequences),
            positions=np.concatenate([np.arange(length) for length in lengths]),
            sequences=np.repeat(np.arange(len(lengths)), lengths),
            wants_logits=np.ones(sum(lengths), dtype=bool),
        )

    def _run(
        self,
        tokens: np.ndarray,
        *,
        positions: np.ndarray,
        sequences: np.ndarray,
        wants_logits: np.ndarray,
    ) -> None:
        batch, n = self._batch, len(tokens)
        batch.n_tokens = n
        for field, values in (
            (batch.token, tokens),
            (batch.pos, positions),
            (batch.n_seq_id, 1),
            (batch.logits, wants_logits),
        ):
            np.ctypeslib.as_array(field, shape=(n,))[:] = values
        for at, sequence in enumerate(sequences.tolist()):
            batch.seq_id[at][0] = sequence
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise StageError(
                "llama.cpp cannot decode", found=f"code {code}", where=f"token {positions[0]}"
            )

    def logit_blocks(self, input_ids: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        # One token more than needed: llama.cpp's kernels take four rows at a time and round the
        # remaining rows differently. With this token the rows are llama-perplexity's; without it,
        # perplexity in Q4_K_M is off by 1e-4.
        end = min(len(input_ids), int(positions[-1]) + 2)
        wants_logits = np.zeros(end, dtype=bool)
        wants_logits[positions] = True
        wants_logits[-1] = True
        n_left = len(positions)
        self.forget()
        for block in self._blocks(input_ids[:end], wants_logits):
            if n_left:
                yield block[:n_left]
                n_left -= min(len(block), n_left)

    def resumed_logit_blocks(
        self, input_ids: np.ndarray, positions: np.ndarray
    ) -> Iterator[Tensor]:
        """Like `logit_blocks`, but the tokens at the start that the previous input shares are not
        run again.

        The cost of questions after the same examples, or of choices after the same question, is
        then that of the tokens in which they differ.
        """
        end = int(positions[-1]) + 1
        wants_logits = np.zeros(end, dtype=bool)
        wants_logits[positions] = True
        # The token with the first wanted logits must be run.
        comparable = min(len(self._resumable), int(positions[0]))
        differs = np.flatnonzero(self._resumable[:comparable] != input_ids[:comparable])
        n_shared = int(differs[0]) if len(differs) else comparable
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, 0, n_shared, -1)
        self._resumable = input_ids[:n_shared]
        yield from self._blocks(input_ids[:end], wants_logits, n_done=n_shared)
        self._resumable = input_ids[:end]

    def _blocks(
        self, input_ids: np.ndarray, wants_logits: np.ndarray, *, n_done: int = 0
    ) -> Iterator[Tensor]:
        """Run an input batch by batch, and yield the wanted logits of each batch that has any.

        Args:
            n_done: tokens that are in the cache already.
        """
        # Not at the top: the memory that is measured of a GGUF must not include PyTorch's.
        import torch

        for first in range(n_done, len(input_ids), self._batch_tokens):
            batch = slice(first, first + self._batch_tokens)
            block = self.decode(input_ids[batch], first=first, wants_logits=wants_logits[batch])
            if block is not None:
                yield torch.from_numpy(block)

    def read(self, tokens: np.ndarray, *, first: int = 0) -> np.ndarray | None:
        """Run tokens in batches, and compute only the logits of the last token.

        Args:
            first: position of the first token, after those in the cache; 0 empties the cache.
        Returns:
            (1, vocabulary) float32, valid until the next call; None without tokens.
        """
        if not first:
            self.forget()
        wants_logits = np.zeros(len(tokens), dtype=bool)
        wants_logits[-1:] = True
        logits = None
        for start in range(0, len(tokens), BATCH_TOKENS):
            batch = slice(start, start + BATCH_TOKENS)
            logits = self.decode(
                tokens[batch], first=first + start, wants_logits=wants_logits[batch]
            )
        return logits

    def tokenize(self, text: str, *, adds_bos: bool, parses_control: bool) -> list[int]:
        """Token ids of a text.

        Args:
            adds_bos: put BOS in front.
            parses_control: control tokens in the text (`[INST]`) become the tokens they name.
        """
        raw = text.encode()
        room = len(raw) + 8
        tokens = (llama_cpp.llama_token * room)()
        n = llama_cpp.llama_tokenize(
            self._vocabulary, raw, len(raw), tokens, room, adds_bos, parses_control
        )
        assert n >= 0, n
        return list(tokens[:n])

    def metadata(self, key: str) -> str:
        """A value of the file's metadata, as text.

        Raises:
            StageError: the file has no such key.
        """
        size = llama_cpp.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            raise StageError("the GGUF lacks metadata", where=f"{self._path}, {key}")
        buffer = ctypes.create_string_buffer(size + 1)
        llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode()

    def control_text(self, which: Literal["bos", "eos"]) -> str:
        """Text of the BOS or EOS token."""
        read = {"bos": llama_cpp.llama_vocab_bos, "eos": llama_cpp.llama_vocab_eos}[which]
        return llama_cpp.llama_vocab_get_text(self._vocabulary, read(self._vocabulary)).decode()
