"""Answers of several links to the same prompts, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import log, pages
from workflow_scripts.handover.answers import Answer, Answers
from workflow_scripts.handover.chain import Chain

REMARK = (
    "Greedy answers to the first questions of the test split, none of which was trained on. They"
    " are examples to read; the scores are in the chain."
)
MOST_CHARACTERS = 100
"""Of a line that stands for a prompt."""


def read(chain: Chain, links: Sequence[str] = ()) -> dict[str, tuple[Answer, ...]]:
    """Answers by link, the base first.

    Args:
        links: the links that are wanted; empty: all that answered.
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


def as_html(answers: Mapping[str, Sequence[Answer]]) -> str:
    """One table per prompt: the reference, then the answer of every link."""
    parts = []
    for number, first in enumerate(answers["base"]):
        rows = [["reference", first.reference]]
        rows += [[link, shown(given[number])] for link, given in answers.items()]
        parts.append(
            f"<details><summary>{pages.visible(in_short(first.prompt))}</summary>"
            f"<pre>{pages.visible(first.prompt)}</pre></details>"
            + pages.table(["", "answer"], rows, is_of_words=True)
        )
    return "".join(parts)


def in_short(prompt: str) -> str:
    """The first and the last line of a prompt: a question is before or after a pasted text."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip()] or [""]
    ends = [lines[0], lines[-1]] if len(lines) > 1 else lines
    return " … ".join(textwrap.shorten(line, MOST_CHARACTERS, placeholder=" …") for line in ends)


def shown(answer: Answer) -> str:
    """The answer; one that was cut off says so."""
    return answer.answer if answer.is_ended else f"{answer.answer} … (not ended)"
