"""lm-evaluation-harness as a package that need not be installed."""

from __future__ import annotations

from workflow_scripts.log import StageError


def check_installed() -> None:
    """
    Raises:
        StageError: the harness is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:  # of the package itself, or of one that it needs
        raise StageError(
            "lm-evaluation-harness is not installed",
            where="evaluation.tasks.names",
            found=error,
            to_fix="`make tasks`, or `snakemake tasks --sdm conda`; docs/evaluation.md says how",
        ) from error
