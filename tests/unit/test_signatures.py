"""Signatures say what a function takes and returns.

A mapping from any key to any value says nothing: it has a record (`handover/`), a settings class or
a TypedDict instead. Where the world outside is untyped, the line says so: `# untyped: reason`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT = REPOSITORY / "workflow_scripts"
MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "OrderedDict"}
ANYTHING = {"Any", "object"}
REASON = re.compile(r"# untyped: \S+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(node: ast.expr) -> str:
    """Last part of a name: `Any` of `typing.Any`."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def _has_reason(node: ast.AST, lines: list[str]) -> bool:
    span = lines[node.lineno - 1 : node.end_lineno]
    return any(REASON.search(line) for line in span)


def _is_untyped_mapping(annotation: ast.expr, aliases: set[str]) -> bool:
    """Whether a mapping of anything, or an alias of one, is part of an annotation."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        try:  # a forward reference; the text of a Literal need not be Python
            return _is_untyped_mapping(ast.parse(annotation.value, mode="eval").body, aliases)
        except SyntaxError:
            return False
    if isinstance(annotation, ast.Subscript):
        if _name(annotation.value) in MAPPINGS:
            arguments = annotation.slice
            values = arguments.elts[-1] if isinstance(arguments, ast.Tuple) else arguments
            return _name(values) in ANYTHING or _is_untyped_mapping(arguments, aliases)
        return _is_untyped_mapping(annotation.slice, aliases)
    if isinstance(annotation, ast.Name | ast.Attribute):
        return _name(annotation) in MAPPINGS or ast.unparse(annotation) in aliases
    children = (child for child in ast.iter_child_nodes(annotation) if isinstance(child, ast.expr))
    return any(_is_untyped_mapping(child, aliases) for child in children)


def untyped_aliases(text: str) -> set[str]:
    """Names that a module gives to mappings of anything, without a reason."""
    found = set()
    lines = text.splitlines()
    for statement in ast.parse(text).body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() as value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                if _name(statement.annotation) != "TypeAlias":
                    continue
            case _:
                continue
        if _is_untyped_mapping(value, set()) and not _has_reason(statement, lines):
            found.add(name)
    return found


def _visible(text: str, aliases: dict[str, set[str]]) -> set[str]:
    """The aliases that a module has or imports, as it writes them."""
    found = untyped_aliases(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                local = name.asname or name.name
                if name.name in aliases.get(node.module or "", ()):
                    found.add(local)
                of_module = aliases.get(f"{node.module}.{name.name}", ())
                found |= {f"{local}.{alias}" for alias in of_module}
    return found


def faults(text: str, of_modules: dict[str, set[str]] | None = None) -> Iterator[str]:
    """`line: fault` for everything a module's signatures leave open.

    Args:
        of_modules: module → its aliases of mappings of anything.
    """
    aliases = _visible(text, of_modules or {})
    lines = text.splitlines()
    tree = ast.parse(text)
    methods = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if isinstance(child, Function) and "staticmethod" not in map(_name, child.decorator_list)
    }
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        arguments = function.args
        given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        given = given[1:] if function in methods else given
        given += [one for one in (arguments.vararg, arguments.kwarg) if one]
        annotations = [(one, one.annotation, f"`{one.arg}`") for one in given]
        annotations.append((function, function.returns, "the return value"))
        for place, annotation, what in annotations:
            if annotation is None:
                yield f"{place.lineno}: {function.name}: {what} has no annotation"
            elif _is_untyped_mapping(annotation, aliases) and not _has_reason(annotation, lines):
                yield f"{annotation.lineno}: {function.name}: {what} is an untyped mapping"


def _all_faults() -> dict[str, list[str]]:
    """File → its faults."""
    modules = _modules()
    of_modules = {
        f"workflow_scripts.{name.removesuffix('.py').replace('/', '.')}": untyped_aliases(text)
        for name, text in modules.items()
    }
    return {name: list(faults(text, of_modules)) for name, text in modules.items()}


def _modules() -> dict[str, str]:
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(ROOT.rglob("*.py"))
    }


def test_no_signature_has_an_untyped_mapping_or_no_annotation() -> None:
    found = [
        f"workflow_scripts/{name}:{fault}"
        for name, of_file in _all_faults().items()
        for fault in of_file
    ]
    assert not found, "\n".join(
        ["give these a record, a TypedDict or a reason (`# untyped: …`):", *found]
    )


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("def f(a: dict[str, Any]) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a: dict[str, object]) -> None: ...", "`a` is an untyped mapping"),
        ("def f(*, a: Mapping[str, typing.Any] | None) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a: list[MutableMapping[str, Any]]) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a: dict[str, dict[str, Any]]) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a: dict) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a: 'Mapping[str, Any]') -> None: ...", "`a` is an untyped mapping"),
        ("def f() -> tuple[int, dict[str, Any]]: ...", "the return value is an untyped mapping"),
        ("def f(a: Report) -> None: ...", "`a` is an untyped mapping"),
        ("def f(a) -> None: ...", "`a` has no annotation"),
        ("def f(**a) -> None: ...", "`a` has no annotation"),
        ("def f(a: int): ...", "the return value has no annotation"),
        ("async def f(a: int): ...", "the return value has no annotation"),
        ("class C:\n    def f(self, a) -> None: ...", "`a` has no annotation"),
    ],
)
def test_a_fault_is_found(signature: str, expected: str) -> None:
    text = f"Report = dict[str, Any]\n{signature}\n"
    (found,) = faults(text)
    assert found.endswith(expected)
    assert found.startswith(f"{text.count(chr(10))}: f: ")


@pytest.mark.parametrize(
    "signature",
    [
        "def f(a: dict[str, int], b: Mapping[str, Facts], *c: Any) -> list[Any]: ...",
        "def f(a: dict[str, Any]) -> None: ...  # untyped: a user's chat",
        "def f(\n    a: Chat,  # untyped: a user's chat\n) -> None: ...",
        "def f(a: Literal['two words']) -> None: ...",
        "class C:\n    def f(self) -> None: ...",
        "f = lambda a: a",
    ],
)
def test_what_says_enough_has_no_fault(signature: str) -> None:
    text = f"Chat = dict[str, Any]  # untyped: what a user brings\n{signature}\n"
    assert not list(faults(text))


def test_an_alias_of_another_module_is_known_by_its_import() -> None:
    aliases = {"workflow_scripts.a": {"Report"}}
    for text, expected in (
        ("from workflow_scripts.a import Report\ndef f(a: Report) -> None: ...", 1),
        ("from workflow_scripts import a\ndef f(b: a.Report) -> None: ...", 1),
        ("from workflow_scripts.b import Report\ndef f(a: Report) -> None: ...", 0),
    ):
        assert len(list(faults(text, aliases))) == expected
