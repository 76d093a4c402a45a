"""Gates: which settings a gate passed with, and whether its verdict still stands.

A changed tolerance runs its gate again and nothing else. So what follows takes the verdict as
`ancient()`, and the gate writes it with `update()`: the file stays in place while the gate runs.
That alone would let a failed gate through (Snakemake 9.27):

- Snakemake records the params of a failed job as it does those of a successful one, and `update()`
  restores the verdict of before. The next start finds nothing to do, and runs what follows. So a
  gate has a second output, `.passed`, which a failed job loses, and a param that changes for as
  long as that file is missing.
- Snakemake does not look at jobs downstream of one that runs: it assumes that their inputs change,
  which `ancient()` inputs do not. A new quantization in the same edit as a new tolerance would be
  left out, with exit status 0. So a gate that runs again over finished work is a checkpoint, after
  which Snakemake looks again.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

# Recorded params of the output at a path, as Snakemake writes them: the `repr` of each.
RecordedParams = Callable[[str], Sequence[str] | None]
ATTEMPT = "no attempt passed before "


class Gate(NamedTuple):
    """A gate as its rule sees it."""

    verdict: str
    """Path of the JSON that it writes, with wildcards."""
    settings: str
    """JSON of its table."""
    version: int
    """OUTPUT_VERSION of its stage."""

    @property
    def passed(self) -> str:
        """Path of the file that says with which settings it passed, with wildcards."""
        return str(Path(self.verdict).with_suffix(".passed"))

    @property
    def asked(self) -> str:
        """Content of that file where the verdict stands."""
        return f"{self.settings} {self.version}"

    def stands(self, names: dict[str, str]) -> bool:
        """Whether the last attempt passed, with the settings of now.

        Args:
            names: values of the wildcards.
        """
        passed = Path(self.passed.format(**names))
        return passed.is_file() and passed.read_text(encoding="utf-8") == self.asked

    def judges_again(self, places: Iterable[dict[str, str]]) -> bool:
        """Whether there is a verdict that no longer stands.

        Args:
            places: values of the wildcards of each of its jobs.
        """
        return any(
            Path(self.verdict.format(**names)).exists() and not self.stands(names)
            for names in places
        )

    def last_attempt(self, names: dict[str, str], recorded: RecordedParams) -> str:
        """A param that makes Snakemake run the gate until it passes.

        Args:
            names: values of the wildcards.
        Returns:
            What was recorded, where the last attempt passed; else a text never seen before.
        """
        if not Path(self.passed.format(**names)).is_file():
            return f"{ATTEMPT}{time.time_ns()}"
        params = map(ast.literal_eval, recorded(self.verdict.format(**names)) or ())
        return next((one for one in params if str(one).startswith(ATTEMPT)), "")
