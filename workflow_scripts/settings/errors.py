"""Messages about a config that cannot be built, in the words of its keys."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from workflow_scripts.log import StageError
from workflow_scripts.settings import sweeps
from workflow_scripts.settings.fields import Settings
from workflow_scripts.settings.training import RecipeSettings


class SettingsError(StageError):
    """A config that cannot be built. The message names the key."""


# Keys of earlier versions, and the keys that replace them.
_MOVED = {
    "evaluation.gates.merge_kl_divergence_nats": "dropped",
    "evaluation.gates.merge_perplexity_increase_fraction": (
        "now evaluation.gates.merge.perplexity_increase_fraction"
    ),
    "evaluation.gates.gguf_kl_divergence_nats": "now evaluation.gates.gguf.kl_divergence_nats",
    "evaluation.gates.n_conversations": (
        "now n_conversations in evaluation.gates.merge, .merge_base and .gguf"
    ),
    "evaluation.gates.parity_conversations": (
        "now evaluation.gates.tokens.n_conversations and evaluation.gates.gguf.parity_conversations"
    ),
}
# What to write for a key that is missing, by table and key.
_TO_WRITE: dict[tuple[int | str, int | str], str] = {
    ("runs", "dataset"): "name a dataset of yours; config/own-data.yaml shows how",
    ("build", "build"): "name the runs to build, as in build: [my-run]",
}
# Parts of pydantic's paths that are not keys of the config: types of a choice, `[key]` of a table.
_NO_KEY = re.compile(r"constrained-str|\[key\]|(literal|list|dict)\[.*\]")


def _written_path(
    location: Sequence[int | str], swept: Mapping[str, sweeps.Combination]
) -> tuple[int | str, ...]:
    """Path of a value in the config as the user wrote it: `recipes.lora.rank[1]`."""
    match tuple(location):
        case ("recipes", str(name), str(key), *rest) if name in swept:
            combination = swept[name]
            is_one = key in combination.places and key in RecipeSettings.model_fields
            place = f"[{combination.places[key]}]" if is_one else ""
            return "recipes", combination.recipe, f"{key}{place}", *rest
        case path:
            return path


def describe(
    table: type[Settings],
    problem: ErrorDetails,
    swept: Mapping[str, sweeps.Combination],
) -> Iterator[str]:
    """One or more lines per problem: path of the key, value found, value expected."""
    path = ".".join(
        str(part)
        for part in _written_path(problem["loc"], swept)
        if not _NO_KEY.fullmatch(str(part))
    )
    path = path or "top level"
    found = problem["input"]
    lines = _explain(table, problem, path)
    if isinstance(found, list) and found and problem["loc"][:1] == ("recipes",):
        name = problem["loc"][1]
        if len(problem["loc"]) > 2 and name not in swept:
            lines = (
                f"{line}; for a run of each value set recipes.{name}.sweep: true" for line in lines
            )
    yield from lines


def _explain(table: type[Settings], problem: ErrorDetails, path: str) -> Iterator[str]:
    found = problem["input"]
    match problem["type"]:
        case "extra_forbidden":
            known = _keys_beside(table, problem["loc"])
            remedy = _MOVED.get(path) or did_you_mean(str(problem["loc"][-1]), known)
            yield f"{path}: unknown key ({remedy})"
        case "missing":
            to_write = _TO_WRITE.get((problem["loc"][0], problem["loc"][-1]))
            yield f"{path}: missing{f' ({to_write})' if to_write else ''}"
        case "value_error":
            for line in str(problem["ctx"]["error"]).splitlines():
                # Validators of the whole config write the paths themselves.
                yield line if path == "top level" else f"{path}: {line}"
        case "literal_error":
            expected = problem["ctx"]["expected"]
            known = [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]
            remedy = did_you_mean(str(found), known)
            yield f"{path}: found {found!r}, expected {expected} ({remedy})"
        case _:
            yield f"{path}: found {found!r}; {problem['msg']}"


def _keys_beside(table: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid where `location` points to an unknown one."""
    current: Any = table
    for part in location[:-1]:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[str(part)].annotation
        else:  # dict[Name, Table] and Optional: the table is the argument that is a model
            current = _model_within(current)
            continue
        if _model_within(current) is not None and not _is_mapping(current):
            current = _model_within(current)
    model = _model_within(current)
    return list(model.model_fields) if model else []


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _model_within(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = (_model_within(argument) for argument in get_args(annotation))
    return next((model for model in models if model is not None), None)


def did_you_mean(found: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(found, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known) or 'none'}"
