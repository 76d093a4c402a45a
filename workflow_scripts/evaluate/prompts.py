"""Prompts for an answer: a conversation up to one of its supervised answers, as token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from workflow_scripts.scoring.token_scores import turns
from workflow_scripts.tokens.documents import Document, Documents


class AnsweredPrompt(NamedTuple):
    """A prompt and the answer that the conversation gives."""

    conversation: str
    prompt: np.ndarray
    """(n,) int32."""
    reference: np.ndarray
    """(n,) int32, EOS at its end."""


class MarkedPrompt(NamedTuple):
    """A prompt and the answers that are right."""

    conversation: str
    prompt: np.ndarray
    """(n,) int32."""
    references: list[str]


def before_first_answer(
    documents: Documents | list[Document], longest: int
) -> Iterator[AnsweredPrompt]:
    """Yield the prompt of each conversation's first answer, in the order of their ids.

    Args:
        longest: tokens of a prompt; conversations with a longer one are left out.
    """
    ids = documents.ids if isinstance(documents, Documents) else [one.id for one in documents]
    for number in sorted(range(len(documents)), key=ids.__getitem__):
        document = documents[number]
        answer = np.flatnonzero(document.is_supervised & (turns(document) == 1))
        if len(answer) and 0 < answer[0] <= longest:
            yield AnsweredPrompt(
                document.id, document.input_ids[: answer[0]], document.input_ids[answer]
            )


def before_last_answer(
    documents: Documents | list[Document], references: Mapping[str, list[str]]
) -> Iterator[MarkedPrompt]:
    """Yield the prompt of the last answer of each conversation that has references.

    References belong to the last answer. A conversation whose last answer is not supervised
    (weight 0) is left out.
    """
    for document in documents:
        if document.id in references and document.is_supervised[-1]:
            turn = turns(document)
            start = int(np.searchsorted(turn, turn[-1]))
            if start:
                yield MarkedPrompt(document.id, document.input_ids[:start], references[document.id])
