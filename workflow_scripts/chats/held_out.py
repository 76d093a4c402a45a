"""Held-out splits: a check that each split with a share holds a conversation.

A hash chooses a conversation's split, so a small dataset may leave a split empty. The check reports
this as soon as the sizes are known, together with a share that would fill the split; otherwise a
step after training would fail. A share of 0 holds nothing out on purpose, and passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.log import StageError

# With fewer conversations, intervals are wider than most differences between runs.
USEFUL = 20
# Probability that a split is empty in spite of the proposed share.
MISSED = 0.05
# Held-out conversations are lost to training. A share above the first is proposed only if the split
# would be empty otherwise, and never one above the second.
USUAL_SHARE, LARGEST_SHARE = 0.2, 0.3
HELD_OUT = ("validation", "test")


def check_splits(cleaning_report: CleaningReport, where: Path) -> list[str]:
    """Check that every split with a share holds a conversation.

    Args:
        cleaning_report: nothing is checked if it does not state the shares.
        where: path of the report, for messages.
    Returns:
        Warnings about splits with few conversations.
    Raises:
        StageError: a split is empty.
    """
    n_kept, n_by_split = cleaning_report.n_kept, cleaning_report.n_by_split
    fractions = cleaning_report.held_out_fractions or {}
    shares = {split: share for split, share in fractions.items() if share}
    empty = [split for split in shares if not n_by_split[split]]
    if empty:
        raise StageError(
            f"the {' and the '.join(empty)} split {'is' if len(empty) == 1 else 'are'} empty, but"
            " gates and scores need conversations",
            where=f"{where}; datasets.<name>.cleaning."
            + ", ".join(f"{split}_fraction" for split in empty),
            found="; ".join(
                f"a share of {shares[split]:g} of {n_kept} conversations for {split}: about"
                f" {shares[split] * n_kept:.2g} expected, none assigned"
                for split in empty
            ),
            expected=f"at least one in each; {USEFUL} or more to tell runs apart",
            to_fix="; ".join(remedy(split, n_kept, shares[split]) for split in empty)
            + "; or set the share to 0 and build only targets that do not score the split:"
            " `snakemake train` and `snakemake export` need no test split",
        )
    return [
        f"found {n_by_split[split]} conversations in the {split} split, too few to tell"
        f" runs apart; {remedy(split, n_kept, share)}"
        for split, share in shares.items()
        if n_by_split[split] < USEFUL
    ]


def check_rendered(
    n_cleaned: Mapping[str, int], n_supervised_tokens: Mapping[str, int], where: Path
) -> None:
    """Check that every held-out split still has a token to score after rendering.

    Args:
        n_cleaned: conversations of each split before rendering.
        n_supervised_tokens: supervised tokens of each split after rendering.
        where: path of the rejected conversations, for messages.
    Raises:
        StageError: all conversations of a split were rejected.
    """
    emptied = [split for split in HELD_OUT if n_cleaned[split] and not n_supervised_tokens[split]]
    if emptied:
        raise StageError(
            f"no conversation of the {' and the '.join(emptied)} split could be rendered",
            where=where,
            found=", ".join(
                f"{n_cleaned[split]} conversations, none with a supervised token"
                for split in emptied
            ),
            expected="at least one",
            to_fix="raise datasets.<name>.rendering.max_document_tokens if it rejects them, or hold"
            " out more conversations",
        )


def remedy(split: str, n_conversations: int, share: float) -> str:
    """Return advice on the share to hold out instead."""
    wanted = proposed_share(n_conversations, share)
    if wanted is None:
        return f"add conversations: {n_conversations} are too few for both training and scoring"
    return (
        f"set {split}_fraction: {wanted:g}, which holds out about {wanted * n_conversations:.0f} of"
        f" {n_conversations}"
    )


def proposed_share(n_conversations: int, share: float) -> float | None:
    """Return the smallest share, in hundredths, that holds out a useful number of conversations.

    If the dataset is too small for that, return a share that leaves the split empty with a
    probability of at most 5 %.

    Args:
        share: the present share.
    Returns:
        The share; None if the dataset is too small to hold anything out.
    """
    if not n_conversations:
        return None
    useful = USEFUL / n_conversations
    sure = 1 - MISSED ** (1 / n_conversations)
    wanted = max(sure, min(useful, USUAL_SHARE))
    wanted = math.ceil(100 * max(wanted, share)) / 100
    return wanted if wanted <= LARGEST_SHARE else None
