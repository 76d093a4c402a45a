from __future__ import annotations

import copy
import itertools
import math

import pytest
from hypothesis import given, strategies as st
from pydantic import TypeAdapter

from workflow_scripts.settings import Name, RecipeSettings, SettingsError, load_config, sweeps

PLAIN = {
    "models": {"demo": {"generate": {}}},
    "datasets": {"chats": {"generate": {}}},
    "packings": {"best-fit": {}},
    "recipes": {"lora": {"rank": 8, "seed": 3}},
    "runs": {
        "one": {"model": "demo", "dataset": "chats", "packing": "best-fit", "recipe": "lora"},
    },
    "build": ["one"],
}


def with_sweep(**values: object) -> dict:
    """PLAIN with a recipe `swept` of these values, and a run `many` that uses it."""
    config = copy.deepcopy(PLAIN)
    config["recipes"]["swept"] = {"sweep": True, "alpha": 16, **values}
    config["runs"]["many"] = {**config["runs"]["one"], "recipe": "swept"}
    return config


def problems_of(config: dict) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load_config(config)
    what, *lines = str(caught.value).splitlines()
    assert what == "the config cannot be built"
    assert all(line.startswith("  ") for line in lines)
    return [line.strip() for line in lines]


rates = st.lists(
    st.floats(min_value=1e-9, max_value=1, exclude_min=True), min_size=1, max_size=4, unique=True
)
ranks = st.lists(st.integers(1, 512), min_size=1, max_size=4, unique=True)


@given(rates=rates, ranks=ranks, modules=st.booleans())
def test_a_sweep_is_one_recipe_and_one_run_of_every_combination(rates, ranks, modules):
    values = {"learning_rate": rates, "rank": ranks}
    if modules:
        values["target_modules"] = ["all-linear", ["q_proj", "v_proj"]]
    config = with_sweep(**values)
    before = copy.deepcopy(config)
    loaded = load_config(config)
    assert config == before  # what was handed in stays as it was
    expected = {tuple(map(repr, picked)) for picked in itertools.product(*values.values())}
    runs = {name: run for name, run in loaded.runs.items() if name != "one"}
    found = {
        tuple(repr(getattr(loaded.recipes[run.recipe], key)) for key in values)
        for run in runs.values()
    }
    assert found == expected
    assert len(runs) == len(expected) == len(loaded.recipes) - 1
    # A swept recipe trains as the same one written out does: same settings, same fingerprint.
    for run in runs.values():
        recipe = loaded.recipes[run.recipe]
        alone = RecipeSettings(alpha=16, **{key: getattr(recipe, key) for key in values})
        assert recipe.model_dump_json() == alone.model_dump_json()
    # Nothing else has changed.
    plain = load_config(PLAIN)
    assert loaded.recipes["lora"] == plain.recipes["lora"]
    assert loaded.runs["one"] == plain.runs["one"]
    assert loaded.model_copy(update={"recipes": {}, "runs": {}}) == plain.model_copy(
        update={"recipes": {}, "runs": {}}
    )


def test_runs_are_named_by_what_they_differ_in():
    config = with_sweep(
        learning_rate=["1e-4", 2e-4, 0.00014, 0.05],
        target_modules=["all-linear", ["q_proj", "v_proj"]],
        dora=[True, False],
        max_steps=[None],
    )
    names = sweeps.expand(config).runs["many"]
    assert names[0] == "many.learning_rate-1e-4.target_modules-all-linear.dora-true.max_steps-null"
    assert names[3] == (
        "many.learning_rate-1e-4.target_modules-q_proj+v_proj.dora-false.max_steps-null"
    )
    assert [name.split(".target")[0] for name in names[::4]] == [
        *("many.learning_rate-1e-4", "many.learning_rate-2e-4"),
        *("many.learning_rate-1.4e-4", "many.learning_rate-0.05"),
    ]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1e-4, "1e-4"),
        ("0.0001", "1e-4"),
        ("1E-4", "1e-4"),
        (0.00014, "1.4e-4"),
        (6.0e-3, "6e-3"),
        (0.01, "0.01"),
        (2.0, "2"),
        (64, "64"),
        ("64", "64"),
        (0, "0"),
        (0.0, "0"),
        (True, "true"),
        (None, "null"),
        ("adamw_8bit", "adamw_8bit"),
        (["q_proj", "v_proj"], "q_proj+v_proj"),
        ([], "none"),
        ("a/b c", "a-b-c"),
    ],
)
def test_a_value_is_short_in_a_name(value, name):
    assert sweeps.short(value) == name


@given(one=st.floats(allow_nan=False, allow_infinity=False), other=st.floats(allow_nan=False))
def test_two_numbers_have_one_name_only_if_they_are_one(one, other):
    assert float(sweeps.short(one)) == one
    assert sweeps.short(repr(one)) == sweeps.short(one)
    if one != other:
        assert sweeps.short(one) != sweeps.short(other)
    beside = math.nextafter(one, 0)
    assert beside == one or sweeps.short(beside) != sweeps.short(one)


@given(
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.text(max_size=5), max_size=3)
)
def test_every_value_makes_a_name_that_is_a_folder_and_a_wildcard(value):
    TypeAdapter(Name).validate_python(f"run.key-{sweeps.short(value)}")


def test_keys_that_are_lists_themselves_are_those_of_the_recipe():
    of_type_list = {
        key
        for key, field in RecipeSettings.model_fields.items()
        if "list[" in str(field.annotation)
    }
    assert of_type_list == sweeps.LIST_KEYS


def test_a_plain_list_of_modules_is_a_value_and_no_sweep():
    loaded = load_config(with_sweep(rank=[4, 8], target_modules=["q_proj", "v_proj"]))
    assert [name for name in loaded.runs if name != "one"] == ["many.rank-4", "many.rank-8"]
    assert loaded.recipes["swept.rank-4"].target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize("yes", [True, "true", "yes"])
def test_a_flag_written_as_text_is_a_flag(yes):
    config = with_sweep(rank=[4, 8])
    config["recipes"]["swept"]["sweep"] = yes
    assert "many.rank-8" in load_config(config).runs


def test_a_config_without_a_sweep_is_handed_on_as_it_is():
    for no in (False, "false", None, "x", [True], {}, 2):
        config = copy.deepcopy(PLAIN)
        config["recipes"]["lora"]["sweep"] = no
        assert sweeps.expand(config).config is config
    for nonsense in (None, [], {"recipes": None}, {"recipes": []}, {"recipes": {"a": None}}):
        assert sweeps.expand(nonsense).config is nonsense


def test_a_run_of_a_sweep_can_be_built_and_a_whole_sweep_cannot():
    config = with_sweep(rank=[4, 8])
    config["build"] = ["one", "many.rank-8"]
    assert load_config(config).build == ["one", "many.rank-8"]
    config["build"] = ["many"]
    (line,) = problems_of(config)
    assert line.startswith("build: found 'many', which is a sweep of 2 runs; ")
    assert "did you mean 'many.rank-4' or 'many.rank-8'?" in line
    config["build"] = ["many.rank-9"]
    (line,) = problems_of(config)
    assert "did you mean 'many.rank-" in line


def test_a_large_sweep_in_build_lists_its_first_ten():
    config = with_sweep(rank=list(range(1, 31)))
    config["build"] = ["many"]
    (line,) = problems_of(config)
    assert "'many.rank-10' or one of the others?" in line
    assert "'many.rank-11'" not in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "recipes.swept: `sweep: true` expects a list of values for at least one key"),
        ({"rank": []}, "recipes.swept.rank: found an empty list, expected the values to try"),
        (
            {"learning_rate": [1e-4, 2e-4, "1e-4"]},
            "recipes.swept.learning_rate[2]: found '1e-4', which is the same as 0.0001",
        ),
        (
            {"rank": [4, "many"], "alpha": [8, 16]},
            "recipes.swept.rank[1]: found 'many'; Input should be a valid integer",
        ),
        ({"rank": [4, [8]]}, "recipes.swept.rank[1]: found [8]; Input should be a valid integer"),
        (
            {"schedule": ["cosine", "linaer"]},
            "recipes.swept.schedule[1]: found 'linaer', expected",
        ),
        ({"kv_rank": ["matched", 0]}, "recipes.swept.kv_rank[1]: found 0, expected 'uniform'"),
        ({"rnk": [4, 8]}, "recipes.swept.rnk: unknown key"),
        (
            {"rank": [4], "alpha": "much"},
            "recipes.swept.alpha: found 'much'",
        ),
        (
            {"early_stopping": [1, 5], "evaluations": 2},
            "recipes.swept.early_stopping-5: early_stopping: found 5",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_sweep_is_named_by_its_place(values, expected):
    # Once, however many combinations hold the value.
    (line,) = problems_of(with_sweep(**values))
    assert line.startswith(expected)
    assert "for a run of each value" not in line


def test_every_wrong_sweep_is_reported_at_once():
    config = with_sweep(rank=[], alpha=[1, 1.0])
    config["recipes"]["other"] = {"sweep": True}
    assert [line.split(": ")[0] for line in problems_of(config)] == [
        "recipes.swept.alpha[1]",
        "recipes.swept.rank",
        "recipes.other",
    ]


@pytest.mark.parametrize(
    "key", ["rank", "learning_rate", "kv_rank", "schedule", "target_modules", "sweep"]
)
def test_a_list_without_sweep_says_how_to_try_each(key):
    values = {"target_modules": [["q_proj"], ["v_proj"]], "schedule": ["cosine", "linear"]}
    config = copy.deepcopy(PLAIN)
    config["recipes"]["lora"][key] = values.get(key, [4, 8])
    for line in problems_of(config):
        assert line.startswith(f"recipes.lora.{key}")
        assert line.endswith("for a run of each value set recipes.lora.sweep: true")


def test_a_name_that_a_sweep_makes_as_well_is_an_error():
    config = with_sweep(rank=[4, 8])
    config["recipes"]["swept.rank-4"] = {}
    config["runs"]["many.rank-8"] = config["runs"]["one"]
    assert problems_of(config) == [
        "recipes.swept.rank-4: a sweep makes an entry with this name too",
        "runs.many.rank-8: a sweep makes an entry with this name too",
    ]
