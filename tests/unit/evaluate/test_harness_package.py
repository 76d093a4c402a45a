"""lm-evaluation-harness as a package that may be missing or broken."""

from __future__ import annotations

import pytest

CHECK = """
from workflow_scripts.evaluate import harness_package
from workflow_scripts.log import StageError
try:
    harness_package.check_installed()
except StageError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "package",
    ["raise ImportError('no module sacrebleu')", "import a_module_that_nobody_installed"],
    ids=["broken", "without a dependency"],
)
def test_a_broken_harness_is_reported_with_its_reason(run_python, tmp_path, package):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").write_text(package)
    done = run_python(CHECK, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "lm-evaluation-harness is not installed" in done.stdout
    assert "sacrebleu" in done.stdout or "a_module_that_nobody_installed" in done.stdout
    assert "make tasks" in done.stdout
