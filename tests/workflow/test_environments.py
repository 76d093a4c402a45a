"""Conda environments: in step with the lock, each named by rules, with all that they import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.workflow.conftest import REPOSITORY
from workflow_scripts.doctor.packages import locked
from workflow_scripts.release import provenance

ENVIRONMENTS = sorted((REPOSITORY / "envs").glob("*.yaml"))
RULES = sorted((REPOSITORY / "rules").rglob("*.smk"))
NAMED = re.compile(r"conda:\n +\"\.\./envs/(\w+)\.yaml\"")
# Imported by functions that these programs' rules do not call: loading a model in 4 bits, Liger's
# kernels where they are installed, a GGUF among links that apply the window.
NOT_CALLED = {
    "data": {"torch", "bitsandbytes"},
    "train": {"liger_kernel", "llama_cpp"},
}
# Module → the packages that bring it.
DISTRIBUTIONS = metadata.packages_distributions()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins_of(environment: Path) -> dict[str, str]:
    """Package → version of the pip part."""
    *conda, pip = yaml.safe_load(environment.read_text())["dependencies"]
    assert conda == ["python=3.11", "pip"]
    return dict(line.split("==") for line in pip["pip"])


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_pins_the_versions_of_the_lock(environment):
    pinned = locked(REPOSITORY / "requirements.lock")
    # An environment that has a lock of its own beside it.
    own = REPOSITORY / f"requirements-{environment.stem}.lock"
    if own.is_file():
        pinned |= locked(own)
    lock = {canonical(name): version for name, version in pinned.items()}
    pins = pins_of(environment)
    assert {name: lock.get(canonical(name)) for name in pins} == pins


def test_the_environments_have_the_oldest_python_that_the_project_takes():
    project = (REPOSITORY / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.11"' in project


def test_every_rule_that_runs_a_program_names_an_environment_and_every_one_is_named():
    named = set()
    for path in RULES:
        for rule in re.split(r"^(?:rule|checkpoint|use rule) ", path.read_text(), flags=re.M)[1:]:
            if re.search(r"^    shell:", rule, flags=re.M):
                found = NAMED.findall(rule)
                assert len(found) == 1, f"{path.name}: {rule.splitlines()[0]}"
                named.update(found)
    assert named == {path.stem for path in ENVIRONMENTS}


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_has_what_its_programs_import(environment):
    there = with_dependencies(pins_of(environment))
    lacking = {
        f"{program}: {package}"
        for program in programs_in(environment.stem)
        for package in imported_packages(program) - NOT_CALLED.get(environment.stem, set())
        if not distributions_of(package) & there
    }
    assert lacking == set()


def test_a_release_is_packaged_where_its_provenance_finds_every_package():
    (environment,) = (
        path
        for path in ENVIRONMENTS
        if "workflow_scripts.release.package_release" in programs_in(path.stem)
    )
    assert set(provenance.PACKAGES) <= pins_of(environment).keys()


def programs_in(environment: str) -> set[str]:
    """Modules that the rules of an environment run."""
    found = set()
    for path in RULES:
        for rule in re.split(r"^(?:rule|checkpoint|use rule) ", path.read_text(), flags=re.M)[1:]:
            if NAMED.findall(rule) == [environment]:
                found.update(re.findall(r"python -m (workflow_scripts[\w.]+)", rule))
    assert found
    return found


def with_dependencies(pins: Iterable[str]) -> set[str]:
    """Packages that pip installs for some, by what the installed ones require."""
    found: set[str] = set()
    waiting = [canonical(name) for name in pins]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # another platform's
            continue
        for text in required:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonical(requirement.name))
    return found


def distributions_of(module: str) -> set[str]:
    return {canonical(name) for name in DISTRIBUTIONS.get(module, [module])}


def imported_packages(program: str) -> set[str]:
    """Modules of others that a program imports: its own room's in whole, those of other rooms as
    far as they import when they are imported."""
    found: set[str] = set()
    seen: set[str] = set()
    waiting = [(program, True)]
    room = program.rpartition(".")[0]
    while waiting:
        module, is_whole = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        path = REPOSITORY / Path(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not path.is_file():  # a name out of a module
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name in imports_of(tree.body, is_whole):
            if name.startswith("workflow_scripts"):
                waiting.append((name, name.startswith(room)))
            else:
                found.add(name.partition(".")[0])
    return found - sys.stdlib_module_names - {"workflow_scripts"}


def imports_of(body: Iterable[ast.stmt], is_whole: bool) -> Iterator[str]:
    """Names that statements import; those of functions too, where the whole counts."""
    for node in body:
        match node:
            case ast.Import(names=names):
                yield from (one.name for one in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                if module.startswith("workflow_scripts"):
                    yield from (f"{module}.{one.name}" for one in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
            case ast.FunctionDef() | ast.ClassDef() if not is_whole:
                continue
            case _:
                for _, value in ast.iter_fields(node):
                    if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                        yield from imports_of(value, is_whole)
