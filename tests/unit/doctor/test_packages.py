from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

from tests.conftest import REPOSITORY
from tests.unit.doctor.conftest import by_name
from workflow_scripts.doctor import packages


def test_this_environment_matches_the_lock_file():
    found = by_name(packages.findings(REPOSITORY / "requirements.lock"))
    assert {finding.status for finding in found.values()} == {"ok"}
    n_pins = sum(
        "==" in line for line in (REPOSITORY / "requirements.lock").read_text().splitlines()
    )
    assert found["packages"].found.startswith(f"{n_pins}, ")


def test_a_package_that_is_missing_and_one_of_another_version_are_named(tmp_path):
    lock = tmp_path / "own.lock"
    tqdm = metadata.version("tqdm")
    lock.write_text(f"# a comment\nno-such-package==1.0\ntqdm==0.1\nPyYAML=={yaml_version()}\n")
    found = by_name(packages.findings(lock))
    assert found["packages"].status == "missing"
    assert "1 of 3 are not installed: no-such-package" in found["packages"].found
    assert "own.lock" in found["packages"].to_fix
    assert found["versions"].status == "warning"
    assert found["versions"].found == f"tqdm {tqdm} (0.1)"
    assert found["pip check"].found


def test_a_build_tag_does_not_make_another_version():
    torch = metadata.version("torch")
    assert packages.installed_version("torch") == torch.partition("+")[0]


def test_the_harness_is_missing_only_if_every_build_needs_it(tmp_path):
    lock = REPOSITORY / "requirements-tasks.lock"
    wanted = packages.locked(lock)["lm_eval"]
    found = packages.installed_version("lm_eval")  # by `make tasks`, elsewhere
    for is_needed, status in ((True, "missing"), (False, "warning")):
        finding = packages.harness_finding(["mmlu", "gsm8k"], lock, is_needed=is_needed)
        assert "mmlu, gsm8k" in finding.found
        assert finding.status == ("ok" if found == wanted else status)
    # Another version under the same name.
    (tmp_path / "lm_eval-0.0.1.dist-info").mkdir()
    (tmp_path / "lm_eval-0.0.1.dist-info" / "METADATA").write_text(
        "Name: lm_eval\nVersion: 0.0.1\n"
    )
    ask = (
        "from pathlib import Path; from workflow_scripts.doctor import packages;"
        f"print(packages.harness_finding(['mmlu'], Path({str(lock)!r}), is_needed=True))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", ask],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "status='warning', found='0.0.1, for mmlu'" in printed and wanted in printed


def yaml_version() -> str:
    return metadata.version("pyyaml")
