"""A GGUF through llama.cpp as a source of logits, in bounded memory.

The high-level `Llama(logits_all=True)` would hold n_ctx × n_vocab floats; here each token of a
batch says whether its logits are wanted, and they are read before the next batch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from workflow_scripts.log import StageError

if TYPE_CHECKING:
    from torch import Tensor

# llama.cpp's own. With 256, two layers of a 7B in Q4_K_M took 3 to 9 % more processor time (AVX2;
# two runs each, other jobs beside).
BATCH_TOKENS = 512


@cache
def _silence_log() -> object:
    """Turn llama.cpp's own log off; the callback is kept, as the library may call it to the end."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, _: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    return silent


class LlamaCppModel:
    """Scores with a GGUF file. Use as a context manager: llama.cpp's memory is freed at the end.

    Args:
        path: the GGUF.
        context_tokens: longest input; all sequences of `decode_together`.
        n_threads: CPU threads.
        batch_tokens: run at once, at most.
        n_sequences: run at once by `decode_together`, at most.
        observe: called with every node of the graph, as `ggml_backend_sched_eval_callback`; it must
            not raise.
    Raises:
        StageError: llama.cpp cannot load the file.
    """

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
        import llama_cpp

        self._api = llama_cpp
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
        context_params.kv_unified = True  # sequences share the context, however long each is
        if observe is not None:
            # Kept: llama.cpp has only its address.
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
        # What the cache holds, as far as `resumed_logit_blocks` may build on it.
        self._resumable = np.zeros(0, dtype=np.int64)

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._api.llama_batch_free(self._batch)
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def forget(self) -> None:
        """Empty the key-value cache."""
        self._resumable = np.zeros(0, dtype=np.int64)
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def decode(
        self, tokens: np.ndarray, *, first: int, wants_logits: np.ndarray
    ) -> np.ndarray | None:
        """Run up to `batch_tokens` tokens after what is in the cache.

        Args:
            tokens: (n,) integer.
            first: position of the first of them.
            wants_logits: (n,) bool.
        Returns:
            (wanted, vocabulary) float32, llama.cpp's own memory, valid until the next call; None
            where none is wanted.
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
        logits = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(n_wanted, self.n_vocabulary))

    def decode_together(self, sequences: Sequence[np.ndarray]) -> None:
        """Run several inputs at once, each from its first position and blind to the others, with
        the logits of all tokens computed.

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
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise StageError(
                "llama.cpp cannot decode", found=f"code {code}", where=f"token {positions[0]}"
            )

    def logit_blocks(self, input_ids: np.ndarray, positions: np.ndarray) -> Iterator[Tensor]:
        import torch

        # Tokens after the last wanted one change nothing, but for the next: llama.cpp's kernels
        # take four rows at a time and round those left over otherwise. With it the rows of a text
        # are llama-perplexity's; without, perplexity in Q4_K_M is off by 1e-4.
        end = min(len(input_ids), int(positions[-1]) + 2)
        wants_logits = np.zeros(end, dtype=bool)
        wants_logits[positions] = True
        wants_logits[-1] = True
        n_left = len(positions)
        self.forget()
        for first in range(0, end, self._batch_tokens):
            stretch = slice(first, min(end, first + self._batch_tokens))
            block = self.decode(input_ids[stretch], first=first, wants_logits=wants_logits[stretch])
            if block is not None and n_left:
                yield torch.from_numpy(block[:n_left])
                n_left -= min(len(block), n_left)

    def resumed_logit_blocks(
        self, input_ids: np.ndarray, positions: np.ndarray
    ) -> Iterator[Tensor]:
        """As `logit_blocks`; tokens that the input before began with as well are not run again.

        Questions after the same examples, and choices after the same question, cost what they
        differ in.
        """
        import torch

        wants_logits = np.zeros(len(input_ids), dtype=bool)
        wants_logits[positions] = True
        end = int(positions[-1]) + 1
        # The first wanted logits are those of a token that is run.
        comparable = min(len(self._resumable), int(positions[0]))
        differs = np.flatnonzero(self._resumable[:comparable] != input_ids[:comparable])
        n_shared = int(differs[0]) if len(differs) else comparable
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_seq_rm(memory, 0, n_shared, -1)
        for first in range(n_shared, end, self._batch_tokens):
            self._resumable = input_ids[:first]
            stretch = slice(first, min(end, first + self._batch_tokens))
            block = self.decode(input_ids[stretch], first=first, wants_logits=wants_logits[stretch])
            self._resumable = input_ids[: stretch.stop]
            if block is not None:
                yield torch.from_numpy(block)

    def tokenize(self, text: str, *, adds_bos: bool, parses_control: bool) -> list[int]:
        """Token ids of text.

        Args:
            text: what to read.
            adds_bos: put BOS in front.
            parses_control: control tokens written out (`[INST]`) become the tokens they name.
        """
        raw = text.encode()
        room = len(raw) + 8
        tokens = (self._api.llama_token * room)()
        n = self._api.llama_tokenize(
            self._vocabulary, raw, len(raw), tokens, room, adds_bos, parses_control
        )
        assert n >= 0, n
        return list(tokens[:n])

    def metadata(self, key: str) -> str:
        """A value of the file's metadata as text.

        Raises:
            StageError: the file has no such key.
        """
        size = self._api.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            raise StageError("the GGUF lacks metadata", where=f"{self._path}, {key}")
        buffer = ctypes.create_string_buffer(size + 1)
        self._api.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode()

    def control_text(self, which: Literal["bos", "eos"]) -> str:
        """How the BOS or EOS token is written."""
        read = {"bos": self._api.llama_vocab_bos, "eos": self._api.llama_vocab_eos}[which]
        return self._api.llama_vocab_get_text(self._vocabulary, read(self._vocabulary)).decode()
