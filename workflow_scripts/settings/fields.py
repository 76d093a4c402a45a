"""The base class of every table of the config, and types that many options share."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Settings(BaseModel):
    """Base of every config table: an unknown key is an error, a loaded value never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def not_a_boolean(value: object) -> object:
    # pydantic would accept `true` as 1. Numbers written as text ("2e-4", --config) are accepted.
    if isinstance(value, bool):
        raise ValueError("a number is expected, not true or false")
    return value


Count = Annotated[int, BeforeValidator(not_a_boolean), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(not_a_boolean), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(not_a_boolean), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(not_a_boolean), Field(ge=0, le=1)]
NonNegativeNumber = Annotated[
    float, BeforeValidator(not_a_boolean), Field(ge=0, allow_inf_nan=False)
]


def named_or_count(*names: str) -> BeforeValidator:
    """Check a choice of names or a number, with one message instead of pydantic's one per type."""

    def check(value: object) -> object:
        if value not in names and not re.fullmatch("[1-9][0-9]*", str(value)):
            choice = ", ".join(map(repr, names))
            raise ValueError(f"found {value!r}, expected {choice} or an integer from 1")
        return value

    return BeforeValidator(check)


# Names become folder names and wildcards.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_local(source: str) -> bool:
    """True if a source is a folder, not a Hub id."""
    return source.startswith((".", "/", "~"))
