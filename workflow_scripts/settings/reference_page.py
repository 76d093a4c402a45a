"""The JSON schema and the tables of options, made from the settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic.fields import FieldInfo

from workflow_scripts.settings.config import Config
from workflow_scripts.settings.fields import Settings


def config_schema() -> dict[str, Any]:  # untyped: JSON Schema
    """The JSON schema that editors complete and check `config/*.yaml` with."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "Tramontane config"
    # An overlay holds only what it changes, in an entry of a table too.
    for table in (schema, *schema["$defs"].values()):
        table.pop("required", None)
    # A sweep has lists of values, which are checked when it is expanded.
    recipe = schema["$defs"]["RecipeSettings"]["properties"]
    for key in recipe.keys() - {"sweep"}:
        recipe[key] = _value_or_list(recipe[key])
    return schema


def _value_or_list(value: Mapping[str, Any]) -> dict[str, Any]:  # untyped: JSON Schema
    """The schema of an option that may also be a list of its values."""
    about = {key: value[key] for key in ("title", "description", "default") if key in value}
    one = {key: part for key, part in value.items() if key not in about}
    return about | {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}


def option_tables() -> str:
    """Markdown tables of every option with its meaning, unit and default; one per settings
    class."""
    sections = []
    for table in dict.fromkeys(_tables(Config)):
        path, _, meaning = (table.__doc__ or "").partition(": ")
        title = path if table is not Config else "Top level"
        lines = [f"### {title}", "", _one_line(meaning or path), ""]
        lines += ["| option | default | meaning |", "| --- | --- | --- |"]
        for name, field in table.model_fields.items():
            lines.append(f"| `{name}` | {_default(field)} | {_one_line(field.description)} |")
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _tables(table: type[Settings]) -> Iterator[type[Settings]]:
    """A settings class and the classes of its options, in their order."""
    yield table
    for field in table.model_fields.values():
        for inner in _settings_in(field.annotation):
            yield from _tables(inner)


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes within a type, as in `Table`, `Table | None` or `dict[str, Table]`."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from _settings_in(argument)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Settings):
        return "see below"
    return f"`{json.dumps(field.default)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
