"""lm-evaluation-harness as a package that need not be installed."""

from __future__ import annotations

import importlib.util

from workflow_scripts.log import StageError


def check_installed() -> None:
    """
    Raises:
        StageError: the harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise StageError(
            "lm-evaluation-harness is not installed",
            where="evaluation.tasks.names",
            found="no module lm_eval",
            to_fix="`make tasks`, or `snakemake tasks --sdm conda`; docs/evaluation.md says how",
        )
