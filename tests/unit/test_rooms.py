"""The rooms of workflow_scripts/: which may import which, and what a rule file has in common with
its room."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CODE = REPOSITORY / "workflow_scripts"
ORDER = (
    "doctor", "serve", "report", "release", "evaluate", "quantize", "merge", "train", "scoring",
    "packing", "tokens", "demo", "chats", "models", "handover", "settings",
)  # fmt: skip
"""Each imports only from those after it. `orchestration` stands aside: it is Snakemake's."""
RULE_ROOMS = sorted(path.stem for path in (REPOSITORY / "rules").glob("*.smk"))
RULE_ROOMS.remove("common")
PROGRAM = re.compile(r"-m workflow_scripts\.(?!take_gpus)(\w+)\.(\w+)")
STARTS = 'if __name__ == "__main__":'


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)


MODULES = {module_of(path): path for path in CODE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in ORDER])
def test_imports_go_one_way(module):
    rooms = {room_of(name) for name in imported(MODULES[module])} & {*ORDER, "orchestration"}
    allowed = ORDER[ORDER.index(room_of(module)) :]
    assert rooms <= set(allowed), f"{module} imports from {rooms - set(allowed)}"


@pytest.mark.parametrize("room", RULE_ROOMS)
def test_no_program_imports_another(room):
    programs = {
        name for name, path in MODULES.items() if STARTS in path.read_text(encoding="utf-8")
    }
    of_room = {name for name in programs if room_of(name) == room}
    found = {name: imported(MODULES[name]) & programs - {name} for name in of_room}
    assert not {name: others for name, others in found.items() if others}


@pytest.mark.parametrize("room", RULE_ROOMS)
def test_a_rule_file_and_a_room_have_the_same_programs(room):
    """Rule, program and file have one name; a copy of a rule adds to the name."""
    text = (REPOSITORY / "rules" / f"{room}.smk").read_text(encoding="utf-8")
    rules = re.split(r"(?m)^(?=(?:use )?rule )", text)[1:]
    assert rules
    for rule in rules:
        for found, program in PROGRAM.findall(rule):
            assert found == room, rule.splitlines()[0]
            assert (CODE / room / f"{program}.py").exists()


def test_every_room_with_programs_of_rules_has_its_rule_file():
    run = set()
    for path in (REPOSITORY / "rules").rglob("*.smk"):
        run |= {room for room, _ in PROGRAM.findall(path.read_text(encoding="utf-8"))}
    assert run == set(RULE_ROOMS)
