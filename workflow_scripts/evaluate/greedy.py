"""Greedy decoding by either engine, token by token, with its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

IsDone = Callable[[Sequence[int]], bool]


def never(_: Sequence[int]) -> bool:
    return False


class Greedy(Protocol):
    """Answers a prompt with the likeliest token, again and again."""

    def __call__(self, prompt: np.ndarray, max_tokens: int, is_done: IsDone = never) -> list[int]:
        """Tokens of the answer, the one that ends it among them.

        Args:
            prompt: (n,) integer.
            max_tokens: of the answer.
            is_done: whether the answer so far is enough; EOS always is.
        """
        ...


def by_llama_cpp(model: LlamaCppModel, eos: int) -> Greedy:
    """Greedy decoding with llama.cpp's cache."""
    import numpy as np

    from workflow_scripts.scoring.llama_cpp_model import BATCH_TOKENS

    def answer(prompt: np.ndarray, max_tokens: int, is_done: IsDone = never) -> list[int]:
        model.forget()
        wants_logits = np.zeros(len(prompt), dtype=bool)
        wants_logits[-1] = True
        logits = None
        for start in range(0, len(prompt), BATCH_TOKENS):
            stretch = slice(start, start + BATCH_TOKENS)
            logits = model.decode(prompt[stretch], first=start, wants_logits=wants_logits[stretch])
        tokens: list[int] = []
        while True:
            assert logits is not None
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] == eos or len(tokens) == max_tokens or is_done(tokens):
                return tokens
            place = len(prompt) + len(tokens) - 1
            logits = model.decode(
                np.array(tokens[-1:]), first=place, wants_logits=np.ones(1, dtype=bool)
            )

    return answer


def by_transformers(model: Any, eos: int) -> Greedy:
    """Greedy decoding with transformers' cache."""
    import torch

    def answer(prompt: np.ndarray, max_tokens: int, is_done: IsDone = never) -> list[int]:
        tokens = torch.from_numpy(prompt.astype("int64"))[None].to(model.device)
        given: list[int] = []
        cache = None
        with torch.inference_mode():
            while True:
                output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = output.past_key_values
                tokens = output.logits[:, -1:].argmax(dim=-1)
                given.append(int(tokens))
                if given[-1] == eos or len(given) == max_tokens or is_done(given):
                    return given

    return answer
