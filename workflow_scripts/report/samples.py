"""Answers of several links to the same prompts."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from workflow_scripts import log
from workflow_scripts.handover.answers import Answer, Answers
from workflow_scripts.handover.chain import Chain

MOST_CHARACTERS = 100
"""Longest line in the title of a prompt."""


def read(chain: Chain, links: Sequence[str] = ()) -> dict[str, tuple[Answer, ...]]:
    """Answers by link, the base first.

    Args:
        links: names of the links to read; empty for all that answered.
    Raises:
        StageError: two links answered different prompts.
    """
    paths = {
        link.title: Path(link.answers)
        for link in chain.links
        if link.answers and (not links or link.name in links)
    }
    answers = {link: Answers.read(path).answers for link, path in paths.items()}
    asked = [one.conversation for one in answers["base"]]
    for link, given in answers.items():
        found = [one.conversation for one in given]
        if found != asked:
            raise log.StageError(
                "two links answered different prompts",
                where=paths[link],
                found=found,
                expected=f"{asked} ({paths['base']})",
                to_fix="snakemake samples --forcerun answer_prompts",
            )
    return answers


class Question(NamedTuple):
    """A prompt and the answers to it."""

    title: str
    prompt: str
    rows: list[list[str]]
    """The reference, then the answer of each link: name and text."""


def questions(answers: Mapping[str, Sequence[Answer]]) -> list[Question]:
    """Answers by prompt, the reference first.

    Args:
        answers: by link.
    """
    return [
        Question(
            title=in_short(first.prompt),
            prompt=first.prompt,
            rows=[["reference", first.reference]]
            + [[link, shown(given[number])] for link, given in answers.items()],
        )
        for number, first in enumerate(answers["base"])
    ]


def in_short(prompt: str) -> str:
    """The first and last line of a prompt: its question is before or after a quotation."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
    ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
    return " … ".join(textwrap.shorten(line, MOST_CHARACTERS, placeholder=" …") for line in ends)


def shown(answer: Answer) -> str:
    """The answer, marked if it reached the length limit before it ended."""
    return answer.answer if answer.is_ended else f"{answer.answer} … (not ended)"
