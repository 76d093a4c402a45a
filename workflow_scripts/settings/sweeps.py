"""Sweeps: a recipe with lists of values is expanded into one recipe and one run per combination.

This works on the config as YAML gave it, before validation. The result is an ordinary config, so
that no other part of the workflow needs to know about sweeps.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

LIST_KEYS = frozenset({"target_modules", "modules_to_save"})
"""Keys of a recipe whose value is a list. A sweep over one of them is a list of lists."""

TRUE = (True, "true", "True", "TRUE", "yes", "on", "1", 1)  # as pydantic reads a flag


@dataclass(frozen=True)
class Combination:
    """The origin of an expanded recipe."""

    recipe: str
    """Name of the recipe in the config."""
    values: Mapping[str, object]
    """Values of the swept keys, in the order of the config."""
    places: Mapping[str, int]
    """Index of each swept key's value in its list, from 0."""


@dataclass(frozen=True)
class Expanded:
    """A config without sweeps, and where its recipes and runs come from."""

    config: object
    recipes: dict[str, Combination] = field(default_factory=dict)
    """Combinations by the name of the expanded recipe."""
    runs: dict[str, list[str]] = field(default_factory=dict)
    """Names of the expanded runs, by the run that uses a sweep."""
    problems: list[str] = field(default_factory=list)
    """Lines `path: what is wrong`. If there are any, `config` must not be used."""


def expand(config: object) -> Expanded:
    """Expand every sweep into one recipe and one run per combination; leave the rest unchanged.

    Recipes are named `<recipe>.<key>-<value>.<key>-<value>`, and runs in the same way.

    Args:
        config: of any shape; everything except sweeps is left to validation.
    """
    if not isinstance(config, Mapping):
        return Expanded(config)
    recipes, runs = (_table(config, name) for name in ("recipes", "runs"))
    combinations: dict[str, dict[str, Combination]] = {}
    problems: list[str] = []
    for name, recipe in recipes.items():
        if isinstance(recipe, Mapping) and _is_true(recipe.get("sweep")):
            swept = {key: value for key, value in recipe.items() if _is_swept(key, value)}
            wrong = list(_wrong_values(f"recipes.{name}", swept))
            problems += wrong
            combinations[name] = {} if wrong else _combine(name, swept)
    if not combinations:
        return Expanded(config)

    all_recipes: dict[str, object] = {}
    origins: dict[str, Combination] = {}
    for name, recipe in recipes.items():
        if name not in combinations:
            all_recipes[name] = recipe
            continue
        assert isinstance(recipe, Mapping)  # it has combinations
        # Without `sweep`, the fingerprint of the training is that of an ordinary recipe.
        plain = {key: value for key, value in recipe.items() if key != "sweep"}
        for suffix, combination in combinations[name].items():
            problems += _taken("recipes", f"{name}{suffix}", recipes, all_recipes)
            all_recipes[f"{name}{suffix}"] = {**plain, **combination.values}
            origins[f"{name}{suffix}"] = combination

    all_runs: dict[str, object] = {}
    swept_runs: dict[str, list[str]] = {}
    for name, run in runs.items():
        recipe = run.get("recipe") if isinstance(run, Mapping) else None
        if not (isinstance(run, Mapping) and isinstance(recipe, str) and recipe in combinations):
            all_runs[name] = run
            continue
        swept_runs[name] = []
        for suffix in combinations[recipe]:
            problems += _taken("runs", f"{name}{suffix}", runs, all_runs)
            all_runs[f"{name}{suffix}"] = {**run, "recipe": f"{recipe}{suffix}"}
            swept_runs[name].append(f"{name}{suffix}")
    problems += _built_whole(config.get("build"), swept_runs)
    expanded = {**config, "recipes": all_recipes, "runs": all_runs}
    return Expanded(expanded, origins, swept_runs, problems)


def _table(
    config: Mapping[str, object],  # untyped: YAML, before it is validated
    name: str,
) -> Mapping[str, object]:  # untyped: the same
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _is_true(value: object) -> bool:
    return isinstance(value, bool | int | str) and value in TRUE


def _is_swept(key: str, value: object) -> bool:
    if not isinstance(value, list) or key == "sweep":
        return False
    return key not in LIST_KEYS or any(isinstance(one, list) for one in value)


def _combine(recipe: str, swept: Mapping[str, list[object]]) -> dict[str, Combination]:
    """Combinations by the suffix of their name; the last key varies fastest."""
    combinations = {}
    for picked in itertools.product(*(enumerate(values) for values in swept.values())):
        values = {key: value for key, (_, value) in zip(swept, picked, strict=True)}
        places = {key: place for key, (place, _) in zip(swept, picked, strict=True)}
        suffix = "".join(f".{key}-{short(value)}" for key, value in values.items())
        combinations[suffix] = Combination(recipe, values, places)
    return combinations


def _wrong_values(path: str, swept: Mapping[str, list[object]]) -> list[str]:
    if not swept:
        return [f"{path}: `sweep: true` expects a list of values for at least one key"]
    problems = []
    for key, values in swept.items():
        if not values:
            problems.append(f"{path}.{key}: found an empty list, expected the values to try")
        names: dict[str, object] = {}
        for place, value in enumerate(values):
            name = short(value)
            if name in names:
                problems.append(
                    f"{path}.{key}[{place}]: found {value!r}, which is the same as {names[name]!r}"
                )
            names.setdefault(name, value)
    return problems


def _taken(table: str, name: str, *known: Container[str]) -> list[str]:
    is_taken = any(name in one for one in known)
    return [f"{table}.{name}: a sweep makes an entry with this name too"] * is_taken


def _built_whole(build: object, swept_runs: Mapping[str, list[str]]) -> list[str]:
    """Problems of `build`: a sweep ends with its scores, so only a single run of it can be
    built."""
    return [
        f"build: found {name!r}, which is a sweep of {len(swept_runs[name])} runs; `snakemake"
        f" sweep` needs none of them here; to export one, did you mean"
        f" {_either(swept_runs[name])}?"
        for name in (build if isinstance(build, list) else [])
        if isinstance(name, str) and swept_runs.get(name)
    ]


def _either(names: list[str]) -> str:
    """The first ten names."""
    return " or ".join([*map(repr, names[:10]), *["one of the others"] * (len(names) > 10)])


def short(value: object) -> str:
    """A value as part of a name. Equal values give the same name, different ones do not.

    Numbers below 0.01 become `2e-4`, however they were written (YAML reads `2e-4` as text). A list
    becomes `q_proj+v_proj`.
    """
    match value:
        case bool():
            return str(value).lower()
        case None:
            return "null"
        case list():
            return "+".join(map(short, value)) or "none"
        case str() if (number := _number(value)) is not None:
            return short(number)
        case float() if 0 < abs(value) < 0.01:
            # The fewest digits that represent the same number.
            digits = next(n for n in range(18) if float(f"{value:.{n}e}") == value)
            mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
            return f"{mantissa}e{int(exponent)}"
        case float():
            return repr(value).removesuffix(".0")
        case _:
            return re.sub(r"[^A-Za-z0-9._+-]+", "-", str(value))


def _number(text: str) -> float | int | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return None
