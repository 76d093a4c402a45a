"""Prompts for an answer: a conversation up to one of its supervised answers, as token ids."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import numpy as np

from workflow_scripts.scoring.token_scores import turns
from workflow_scripts.tokens.documents import Document, Documents


class Prompt(NamedTuple):
    """A prompt and the answer that the conversation gives."""

    conversation: str
    prompt: np.ndarray
    """(n,) int32."""
    reference: np.ndarray
    """(n,) int32, EOS at its end."""


def before_first_answer(documents: Documents | list[Document], longest: int) -> Iterator[Prompt]:
    """Yield the prompt of each conversation's first answer, in the order of their ids.

    Args:
        longest: tokens of a prompt; conversations with a longer one are left out.
    """
    ids = documents.ids if isinstance(documents, Documents) else [one.id for one in documents]
    for number in sorted(range(len(documents)), key=ids.__getitem__):
        prompt = _before_answer(documents[number], 1)
        if 0 < len(prompt.prompt) <= longest and len(prompt.reference):
            yield prompt


def before_last_answer(
    documents: Documents | list[Document], conversations: Container[str]
) -> Iterator[Prompt]:
    """Yield the prompt of the last answer of some conversations.

    A conversation whose last answer is not supervised (weight 0) is left out.

    Args:
        conversations: their ids.
    """
    for document in documents:
        if document.id in conversations and document.is_supervised[-1]:
            prompt = _before_answer(document, int(turns(document)[-1]))
            if len(prompt.prompt):
                yield prompt


def _before_answer(document: Document, turn: int) -> Prompt:
    """Split a document at a supervised answer; the reference is empty if there is none."""
    answer = np.flatnonzero(document.is_supervised & (turns(document) == turn))
    return Prompt(
        document.id,
        document.input_ids[: answer.min(initial=len(document.input_ids))],
        document.input_ids[answer],
    )
