"""Greedy decoding by either engine, token by token, with its key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

if TYPE_CHECKING:  # an environment may have one engine only
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel
    from workflow_scripts.scoring.transformers_model import TransformersModel

IsDone = Callable[[Sequence[int]], bool]


def never(_: Sequence[int]) -> bool:
    return False


class Greedy(Protocol):
    """Answers a prompt with the likeliest token, again and again."""

    def __call__(self, prompt: np.ndarray, max_tokens: int, is_done: IsDone = never) -> list[int]:
        """Return the tokens of the answer, including the one that ends it.

        Args:
            prompt: (n,) integer.
            max_tokens: longest answer.
            is_done: True if the answer so far is enough; EOS always ends it.
        """
        ...


def by_link(model: LlamaCppModel | TransformersModel, eos: int) -> Greedy:
    """Greedy decoding by a loaded link."""
    if model.engine == "llama.cpp":
        return by_llama_cpp(model, eos)
    return by_transformers(model.model, eos)


def by_llama_cpp(model: LlamaCppModel, eos: int) -> Greedy:
    def answer(prompt: np.ndarray, max_tokens: int, is_done: IsDone = never) -> list[int]:
        logits = model.read(prompt)
        tokens: list[int] = []
        while True:
            assert logits is not None
            tokens.append(int(logits[-1].argmax()))
            if tokens[-1] == eos or len(tokens) == max_tokens or is_done(tokens):
                return tokens
            place = len(prompt) + len(tokens) - 1
            logits = model.read(np.array(tokens[-1:]), first=place)

    return answer


def by_transformers(model: Any, eos: int) -> Greedy:
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
