"""The base of every record: a JSON file whose keys, types and units are those of a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from workflow_scripts import files
from workflow_scripts.log import StageError

# `field: int | None = LEFT_OUT`: where the value is None, the file does not have the key.
# Any other None is written as null.
LEFT_OUT: Any = Field(default=None, exclude_if=lambda value: value is None)


class Record(BaseModel):
    """Content of a JSON file between two stages. Frozen; an unknown key is an error.

    The meaning and unit of a field are in the docstring below it. Keys are in the order of the
    fields: those of the last base class first, those of the class itself last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            StageError: no such file, not JSON, or the file of another version of this workflow.
        """
        content = files.read_json(path)
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise StageError(
                f"the file does not hold {cls.__name__}",
                where=f"{path}, {'.'.join(map(str, first['loc'])) or 'its top level'}",
                found=first["msg"],
                expected="what this version of the workflow writes",
                to_fix=f"make it again: snakemake --cores 1 --force {path}",
            ) from error

    def changed(self, **values: object) -> Self:
        """The same with other values, checked as when it is read."""
        return self.model_validate(self.model_dump() | values)

    def content(self) -> dict[str, Any]:  # untyped: what JSON can hold
        """The content of the file."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        files.write_json(path, self.content())
