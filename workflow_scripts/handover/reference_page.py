"""Write `docs/records.md`, which describes the files that pass between stages, field by field.

python -m workflow_scripts.handover.reference_page            (or: make schema)
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, RootModel
from pydantic.fields import FieldInfo

from workflow_scripts import files, handover, log
from workflow_scripts.handover.record import Record

PAGE = Path("docs/records.md")
INTRODUCTION = """\
<!-- made by `make schema` from workflow_scripts/handover/ -->
# Files and records

Stages hand their results on as JSON files. Each file has one class in `workflow_scripts/handover/`,
which writes it and reads it:

```python
from pathlib import Path
from workflow_scripts.handover.facts import Facts

facts = Facts.read(Path("results/models/demo/facts.json"))
print(facts.sliding_window)
```

A class refuses a file with an unknown key, a missing key or a value of another type.

In a file's name, `{link}` stands for a link of the chain: `base`, `base-nf4`, `adapter`, `merged`,
`awq`, or a type of GGUF such as `F16` or `Q4_K_M`. Records without a file are parts of others.
[Where each result is](running.md#where-each-result-is) lists the folders.
"""
# A unit is the end of a field's name.
UNIT = re.compile(
    r"[a-z]+_per_[a-z]+$|(?<=_)(tokens|bytes|seconds|milliseconds|nats|fraction|percent)$"
)
JSON_TYPES = {
    ...: "",  # of `tuple[int, ...]`
    NoneType: "null",
    bool: "boolean",
    float: "number",
    int: "integer",
    str: "text",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.parse_args(argv)
    files.write_text(PAGE, page())


def page() -> str:
    """Return the page as Markdown: a table of the files, then every record of every module."""
    modules = {module: list(records_of(module)) for module in _modules()}
    lines = [INTRODUCTION, "| file | record |", "| --- | --- |"]
    for record in (one for records in modules.values() for one in records):
        if names := files_of(record):
            lines.append(f"| {names} | {_link(record)} |")
    for module, records in modules.items():
        if records:
            name = module.__name__.rpartition(".")[2]
            lines += ["", f"## {name}.py", "", _one_line(inspect.getdoc(module))]
        for record in records:
            lines += ["", *_section(record)]
    return "\n".join(lines) + "\n"


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(handover.__path__))
    return [importlib.import_module(f"{handover.__name__}.{name}") for name in names]


def records_of(module: ModuleType) -> Iterator[type[Record]]:
    """Yield the records that a module defines, in the order of the module."""
    for value in vars(module).values():
        is_record = isinstance(value, type) and issubclass(value, Record) and value is not Record
        if is_record and value.__module__ == module.__name__:
            yield value


def files_of(record: type[Record]) -> str:
    """Return the names of the files that hold a record: its docstring begins with them
    (`` `a.json`: ``). Empty for a record that is part of others."""
    named, separator, _ = _one_line(inspect.getdoc(record)).partition(": ")
    return named if separator and named.startswith("`") and named.endswith("`") else ""


def _section(record: type[Record]) -> Iterator[str]:
    text = _one_line(inspect.getdoc(record))
    names = files_of(record)
    yield f"### {record.__name__}"
    yield ""
    if names:
        yield f"File: {names}"
        yield ""
        text = text.removeprefix(f"{names}: ")
    yield text[:1].upper() + text[1:]
    yield ""
    if issubclass(record, RootModel):
        yield f"The file is an {in_json(record.model_fields['root'].annotation)}."
        return
    yield "| field | type | unit | meaning |"
    yield "| --- | --- | --- | --- |"
    for name, field in record.model_fields.items():
        meaning = _one_line(field.description)
        yield f"| `{name}` | {_type_of(field)} | {unit_of(name)} | {meaning} |"


def unit_of(name: str) -> str:
    """Return the unit at the end of a field's name: `size_bytes` → `bytes`; empty if none."""
    found = UNIT.search(name)
    unit = found[0] if found else ""
    return unit.replace("_", " ")


def _type_of(field: FieldInfo) -> str:
    written = in_json(field.annotation)
    if field.exclude_if is not None:  # null is left out
        written = written.removesuffix(" or null")
    return written if field.is_required() else f"{written}; may be absent"


def in_json(annotation: Any) -> str:
    """Describe a type by how its value is written in JSON."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return in_json(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(in_json, arguments))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    parts = [part for part in map(in_json, arguments) if part]
    parts = [f"({part})" if " or " in part or " by " in part else part for part in parts]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {parts[1]} by name"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {', '.join(parts)}"
    if isinstance(annotation, type) and issubclass(annotation, Record):
        return _link(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"object, as `{annotation.__name__}`"
    return JSON_TYPES.get(annotation, "any value")


def _link(record: type[Record]) -> str:
    return f"[{record.__name__}](#{record.__name__.lower()})"


def _one_line(text: str | None) -> str:
    """Return a docstring as one line for a table cell; JSON calls None null."""
    return re.sub(r"\bNone\b", "null", " ".join((text or "").split())).replace("|", "\\|")


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
