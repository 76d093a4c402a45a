"""Held-out splits: whether the share that a config holds out came to a conversation.

A conversation's split is chosen by a hash, so a small dataset may leave a split empty. This is said
as soon as the sizes are known, with the share that would fill it, and not by a step that fails
after training. A share of 0 holds nothing out on purpose, and passes here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.log import StageError

# With fewer conversations, intervals are wider than most differences between runs.
USEFUL = 20
# Chance that the share which a message proposes leaves the split empty all the same.
MISSED = 0.05
# What is held out is not trained on: more than the first is proposed only where a split would else
# be empty, more than the second never.
USUAL_SHARE, LARGEST_SHARE = 0.2, 0.3
HELD_OUT = ("validation", "test")


def check_splits(cleaning_report: CleaningReport, where: Path) -> list[str]:
    """Every split that the config gives a share holds a conversation.

    Args:
        cleaning_report: without the shares it split by, nothing is checked.
        where: that file, for messages.
    Returns:
        Warnings about splits of few conversations.
    Raises:
        StageError: a split is empty.
    """
    n_kept, n_by_split = cleaning_report.n_kept, cleaning_report.n_by_split
    fractions = cleaning_report.held_out_fractions or {}
    shares = {split: share for split, share in fractions.items() if share}
    empty = [split for split in shares if not n_by_split[split]]
    if empty:
        raise StageError(
            f"the {' and the '.join(empty)} split {'is' if len(empty) == 1 else 'are'} empty: gates"
            " and scores need conversations to work on",
            where=f"{where}; datasets.<name>.cleaning."
            + ", ".join(f"{split}_fraction" for split in empty),
            found="; ".join(
                f"{shares[split]:g} of {n_kept} conversations for {split}, of which"
                f" {shares[split] * n_kept:.2g} are to be expected and none fell into it"
                for split in empty
            ),
            expected=f"at least one in each; from {USEFUL} on, figures tell runs apart",
            to_fix="; ".join(remedy(split, n_kept, shares[split]) for split in empty)
            + "; or set it to 0 and build what scores nothing on it: `snakemake export` needs no"
            " test split, `snakemake train` neither",
        )
    return [
        f"found {n_by_split[split]} conversations in the {split} split: too few to tell"
        f" runs apart; {remedy(split, n_kept, share)}"
        for split, share in shares.items()
        if n_by_split[split] < USEFUL
    ]


def check_rendered(
    n_cleaned: Mapping[str, int], n_supervised_tokens: Mapping[str, int], where: Path
) -> None:
    """Rendering left every split something to score.

    Args:
        n_cleaned: conversations by split, before rendering.
        n_supervised_tokens: by split, after it.
        where: the file of rejected conversations, for messages.
    Raises:
        StageError: it rejected all conversations of a split.
    """
    emptied = [split for split in HELD_OUT if n_cleaned[split] and not n_supervised_tokens[split]]
    if emptied:
        raise StageError(
            f"no conversation of the {' and the '.join(emptied)} split could be rendered",
            where=where,
            found=", ".join(
                f"{n_cleaned[split]} conversations, none with a token to score" for split in emptied
            ),
            expected="at least one",
            to_fix="raise datasets.<name>.rendering.max_document_tokens if it rejects them, or hold"
            " out more",
        )


def remedy(split: str, n_conversations: int, share: float) -> str:
    """The share to hold out instead, in numbers."""
    wanted = proposed_share(n_conversations, share)
    if wanted is None:
        return (
            f"add conversations: a split of {n_conversations} leaves too little for training and"
            " scoring both"
        )
    return (
        f"set {split}_fraction: {wanted:g}, which holds out about {wanted * n_conversations:.0f} of"
        f" {n_conversations}"
    )


def proposed_share(n_conversations: int, share: float) -> float | None:
    """The smallest share, in hundredths, that holds out a useful number of conversations; where the
    dataset is too small for that, one that leaves the split empty with a chance of 5 % at most.

    Args:
        share: of today.
    Returns:
        None: the dataset is too small to hold anything out.
    """
    if not n_conversations:
        return None
    useful = USEFUL / n_conversations
    sure = 1 - MISSED ** (1 / n_conversations)
    wanted = max(sure, min(useful, USUAL_SHARE))
    wanted = math.ceil(100 * max(wanted, share)) / 100
    return wanted if wanted <= LARGEST_SHARE else None
