from __future__ import annotations

from importlib import metadata

from tests.conftest import REPOSITORY
from tests.unit.doctor.conftest import by_name
from workflow_scripts.doctor import packages


def test_this_environment_is_that_of_the_lock():
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


def test_the_tag_of_a_build_is_no_other_version():
    torch = metadata.version("torch")
    assert packages.installed_version("torch") == torch.partition("+")[0]


def yaml_version() -> str:
    return metadata.version("pyyaml")
