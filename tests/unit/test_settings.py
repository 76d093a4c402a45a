from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, strategies as st

from workflow_scripts.settings import (
    Config,
    ModelSettings,
    PackingSettings,
    RecipeSettings,
    SettingsError,
    config_schema,
    load_config,
    settings_from_json,
)

SMALLEST = {
    "models": {"demo": {"generate": {}}, "hub": {"source": "mistralai/Mistral-7B-v0.3"}},
    "datasets": {"stdlib-help": {"generate": {}}},
    "packings": {"best-fit": {}},
    "recipes": {"qlora": {}},
    "runs": {
        "demo": {
            "model": "demo",
            "dataset": "stdlib-help",
            "packing": "best-fit",
            "recipe": "qlora",
        }
    },
    "build": ["demo"],
}


def with_value(path: str, value: object) -> dict:
    """The smallest config with one key set, its tables made on the way."""
    config = copy.deepcopy(SMALLEST)
    *tables, key = path.split(".")
    table = config
    for name in tables:
        table = table.setdefault(name, {})
    table[key] = value
    return config


@pytest.mark.parametrize("base", ["dequantized", "auto"])
def test_only_a_base_of_four_bits_can_be_merged_into_as_it_was_trained(base):
    config = with_value("runs.demo.merge_base", base)
    assert load_config(config).runs["demo"].merge_base == base
    config["recipes"]["qlora"] = {"method": "lora"}
    with pytest.raises(SettingsError) as caught:
        load_config(config)
    for part in (
        f"runs.demo.merge_base: found '{base}', expected 'original'",
        "recipes.qlora.method is 'lora'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("given", [{"adapter": "./mine"}, {"merged": "owner/tuned"}])
def test_a_run_may_begin_with_what_is_there_already(given):
    config = copy.deepcopy(SMALLEST)
    kept = {key: SMALLEST["runs"]["demo"][key] for key in ("model", "dataset")}
    config["runs"]["demo"] = kept | given
    run = load_config(config).runs["demo"]
    assert not run.is_trained
    assert load_config(SMALLEST).runs["demo"].is_trained


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"adapter": "./a", "merged": "./m"}, "found both `adapter` and `merged`"),
        ({"adapter": "./a", "recipe": "qlora"}, "with `adapter`: such a run is not trained"),
        ({"adapter": "mine"}, "'mine' is neither a Hub id (owner/name) nor a folder (./name)"),
        ({"adapter": "./a", "revision": "v1"}, "`revision` belongs to"),
        ({"merged": "./m", "merge_base": "auto"}, "a merged model is not merged again"),
        ({"merged": "./m", "precision": "nf4"}, "`precision` belongs to an `adapter`"),
        ({"adapter": "./a", "merge_base": "auto"}, "runs.demo.precision is 'native'"),
        ({}, "recipe: missing"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(changes, part):
    config = copy.deepcopy(SMALLEST)
    given = {key: SMALLEST["runs"]["demo"][key] for key in ("model", "dataset")}
    config["runs"]["demo"] = given | changes
    with pytest.raises(SettingsError) as caught:
        load_config(config)
    assert part in str(caught.value)


def test_how_an_adapter_was_trained_is_said_by_its_recipe_or_by_itself():
    config = copy.deepcopy(SMALLEST)
    given = {key: SMALLEST["runs"]["demo"][key] for key in ("model", "dataset")}
    config["runs"]["given"] = given | {"adapter": "./a", "precision": "nf4", "merge_base": "auto"}
    config["recipes"]["other"] = {"method": "lora_int8"}
    config["runs"]["int8"] = SMALLEST["runs"]["demo"] | {"recipe": "other"}
    loaded = load_config(config)
    found = {name: loaded.trained_precision(name) for name in loaded.runs}
    assert found == {"demo": "nf4", "given": "nf4", "int8": "int8"}


def test_the_smallest_config_loads_with_its_defaults():
    config = load_config(SMALLEST)
    assert config.recipes["qlora"] == RecipeSettings()
    assert config.packings["best-fit"].row_tokens == 4096
    assert config.max_steps is None


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("recipes.qlora.rnk", 4, ["unknown key", "did you mean 'rank'?"]),
        ("models.demo.generate.n_layer", 4, ["unknown key", "did you mean 'n_layers'?"]),
        ("evaluation.gates.nonsense", 1, ["unknown key", "known: ", "merge_base"]),
        ("evaluation.gates.gguf.kl_divergence", 1, ["did you mean 'kl_divergence_nats'?"]),
        (
            "evaluation.gates.merge_kl_divergence_nats",
            1e-5,
            ["unknown key", "dropped"],
        ),
        (
            "evaluation.gates.merge_perplexity_increase_fraction",
            0.02,
            ["unknown key", "now evaluation.gates.merge.perplexity_increase_fraction"],
        ),
        (
            "evaluation.gates.gguf_kl_divergence_nats",
            1e-5,
            ["unknown key", "now evaluation.gates.gguf.kl_divergence_nats"],
        ),
        (
            "evaluation.gates.n_conversations",
            5,
            ["unknown key", "n_conversations in evaluation.gates.merge, .merge_base and .gguf"],
        ),
        (
            "evaluation.gates.parity_conversations",
            5,
            ["unknown key", "now evaluation.gates.tokens.n_conversations"],
        ),
        ("bild", ["demo"], ["unknown key", "did you mean 'build'?"]),
        ("packings.best-fit.row_tokens", "many", ["found 'many'", "integer"]),
        ("packings.best-fit.row_tokens", 8, ["found 8", "16"]),
        ("packings.best-fit.strategy", "best-fit", ["did you mean 'best_fit'?"]),
        ("datasets.stdlib-help.files", "chats.jsonl", ["found 'chats.jsonl'", "list"]),
        ("recipes.qlora", None, ["found None"]),
        ("models", None, ["found None", "dictionary"]),
        ("runs.demo.recipe", "qlra", ["found 'qlra'", "`recipes`", "did you mean 'qlora'?"]),
        ("runs.demo.model", "x", ["found 'x'", "`models`", "known: demo, hub"]),
        ("build", ["dem"], ["found 'dem'", "`runs`", "did you mean 'demo'?"]),
        ("build", ["demo", "demo"], ["twice"]),
        ("gguf.quantizations", ["Q8_0", "Q8_0"], ["twice"]),
        ("recipes.qlora.rank", True, ["number is expected"]),
        ("recipes.qlora.alpha", True, ["number is expected"]),
        ("recipes.qlora.seed", False, ["number is expected"]),
        ("recipes.qlora.weight_decay", True, ["number is expected"]),
        ("recipes.qlora.warmup_fraction", False, ["number is expected"]),
        ("max_steps", True, ["number is expected"]),
        ("recipes.qlora.learning_rate", float("nan"), ["found nan"]),
        ("recipes.qlora.learning_rate", 0, ["found 0", "greater than 0"]),
        ("packings.best-fit.row_tokens", 8192, ["found 8192", "at most", "context_tokens (4096)"]),
        ("models.a/b", {"generate": {}}, ["found 'a/b'"]),
    ],
)
def test_a_bad_value_is_one_error_that_names_its_key(path, value, parts):
    with pytest.raises(SettingsError) as caught:
        load_config(with_value(path, value))
    what, *problems = str(caught.value).splitlines()
    assert what == "the config cannot be built"
    assert len(problems) == 1
    # Checks over a whole table begin with the table's path and name the key after it.
    table = path.rpartition(".")[0]
    assert problems[0].startswith((f"  {path}: ", f"  {table}: {path.rpartition('.')[2]}: "))
    for part in parts:
        assert part in problems[0]


def test_a_quantization_that_does_not_exist_is_named_with_its_place():
    with pytest.raises(SettingsError) as caught:
        load_config(with_value("gguf.quantizations", ["Q8_0", "Q4_K_X"]))
    assert "  gguf.quantizations.1: found 'Q4_K_X', expected" in str(caught.value)
    assert "did you mean 'Q4_K_" in str(caught.value)


MIXES = {
    "Q4_K_L": {"type": "Q4_K_M", "output": "Q8_0", "token_embd": "Q8_0"},
    "small": {"type": "Q8_0", "tensors": {"ffn_down": "IQ3_XXS"}},
    "mixed": {"type": "Q8_0", "tensors": {"ffn_down": "Q4_K"}},
    "plain": {"type": "Q8_0", "output": "BF16"},
}


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("gguf.mixes.Q8_0", {"type": "Q8_0"}, ["mixes: the name 'Q8_0' is taken"]),
        ("gguf.mixes.adapter", {"type": "Q8_0"}, ["mixes: the name 'adapter' is taken"]),
        ("gguf.mixes.awq", {"type": "Q8_0"}, ["mixes: the name 'awq' is taken"]),
        ("awq.group_size", 48, ["found 48, expected 32, 64 or 128"]),
        ("gguf.mixes.a", {"type": "Q4"}, ["gguf.mixes.a.type: found 'Q4'", "did you mean"]),
        ("gguf.mixes.a", {"type": "Q8_0", "output": "Q4_K_M"}, ["found 'Q4_K_M'", "'Q4_K'"]),
        ("gguf.mixes.a", {"type": "Q8_0", "output": "IQ1_S"}, ["output: IQ1_S needs an import"]),
        ("gguf.mixes.a", {"type": "Q8_0", "outputs": "Q8_0"}, ["did you mean 'output'?"]),
        ("gguf.mixes.a", {"type": "Q8_0", "tensors": {"(": "Q8_0"}}, ["not a regular expression"]),
        ("gguf.quantizations", ["Q4_K_L"], ["gguf.quantizations.0: found 'Q4_K_L'", "gguf.mixes"]),
        ("gguf.imatrix.use", "sometimes", ["gguf.imatrix.use: found 'sometimes'", "'always'"]),
    ],
)
def test_a_quantization_that_cannot_be_made_is_one_error(path, value, parts):
    with pytest.raises(SettingsError) as caught:
        load_config(with_value(path, value))
    what, *problems = str(caught.value).splitlines()
    assert len(problems) == 1
    for part in parts:
        assert part in problems[0]


@pytest.mark.parametrize("name", ["IQ2_XS", "small"])
def test_a_type_that_needs_an_imatrix_is_refused_where_there_is_none(name):
    config = with_value("gguf.mixes", MIXES)
    config["gguf"] |= {"quantizations": ["Q8_0", name], "imatrix": {"use": "never"}}
    with pytest.raises(SettingsError) as caught:
        load_config(config)
    assert f"gguf.quantizations.1: found '{name}', which llama.cpp makes" in str(caught.value)
    assert "gguf.imatrix.use: auto" in str(caught.value)


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("always", {"Q4_K_M", "IQ2_XS", "IQ4_XS", "Q4_K_L", "small", "mixed"}),
        ("auto", {"IQ2_XS", "small"}),
        ("never", set()),
    ],
)
def test_an_imatrix_is_used_where_it_is_needed_and_where_it_changes_something(use, expected):
    config = with_value("gguf.mixes", MIXES)
    config["gguf"] |= {"imatrix": {"use": use}}
    gguf = load_config(config).gguf
    names = ["Q8_0", "BF16", "Q4_K_M", "IQ2_XS", "IQ4_XS", *MIXES]
    if use == "never":  # where these are refused
        names = [name for name in names if not gguf.mix(name).needs_imatrix]
    assert {name for name in names if gguf.uses_imatrix(name)} == expected


@pytest.mark.parametrize("value", [True, 0, -1, 1.5, "1.5", "many", "", None, [], {}, [4]])
def test_a_kv_rank_that_is_not_a_rank_is_an_error(value):
    with pytest.raises(SettingsError) as caught:
        load_config(with_value("recipes.qlora.kv_rank", value))
    _, *problems = str(caught.value).splitlines()
    assert problems == [
        f"  recipes.qlora.kv_rank: found {value!r}, expected 'uniform', 'matched' or an"
        " integer from 1"
        + ("; for a run of each value set recipes.qlora.sweep: true" if value == [4] else "")
    ]


@pytest.mark.parametrize(
    ("value", "kept"), [("uniform", "uniform"), ("matched", "matched"), (8, 8), ("8", 8)]
)
def test_a_kv_rank_is_a_word_or_a_number(value, kept):
    config = load_config(with_value("recipes.qlora.kv_rank", value))
    assert config.recipes["qlora"].kv_rank == kept


@pytest.mark.parametrize(
    ("key", "value", "kept"),
    [
        ("gradient_checkpointing", False, "off"),  # what YAML makes of a bare `off`
        ("gradient_checkpointing", True, "full"),
        ("gradient_checkpointing", "off", "off"),
        ("gradient_checkpointing", "12", 12),
        ("rows_per_micro_batch", "auto", "auto"),
        ("rows_per_micro_batch", "4", 4),
        ("offload_activations", True, True),
        ("memory_gb", "7.5", 7.5),
        ("trackers", [], []),
    ],
)
def test_how_training_runs_is_a_word_or_a_number(key, value, kept):
    config = load_config(with_value(f"training.{key}", value))
    assert getattr(config.training, key) == kept


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("training.gradient_checkpointing", "some", ["'auto', 'off', 'full' or an integer"]),
        ("training.gradient_checkpointing", 0, ["found 0", "'off'"]),
        ("training.rows_per_micro_batch", True, ["found True", "'auto' or an integer"]),
        ("training.rows_per_step", 8, ["unknown key"]),
        ("recipes.qlora.micro_batches_per_step", 8, ["unknown key"]),
        ("recipes.qlora.gradient_checkpointing", True, ["unknown key"]),
    ],
)
def test_what_is_learned_and_how_it_runs_are_kept_apart(path, value, parts):
    with pytest.raises(SettingsError) as caught:
        load_config(with_value(path, value))
    _, *problems = str(caught.value).splitlines()
    assert len(problems) == 1
    for part in (f"  {path}: ", *parts):
        assert part in problems[0]


CONFIGS = Path(__file__).parents[2] / "config"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_an_editor_finds_no_fault_with_a_config_that_ships(path):
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), config_schema())


def test_an_editor_finds_no_fault_with_an_overlay_of_two_lines():
    mine = {
        "datasets": {"mine": {"files": ["a"]}},
        "runs": {"mistral-7b-v0.3": {"dataset": "mine"}},
    }
    jsonschema.validate(mine, config_schema())


@pytest.mark.parametrize(
    ("recipe", "is_right"),
    [
        ({"sweep": True, "rank": [4, 8], "kv_rank": ["matched", 2]}, True),
        ({"sweep": True, "target_modules": ["all-linear", ["q_proj"]]}, True),
        ({"rank": 8, "target_modules": ["q_proj"], "modules_to_save": []}, True),
        ({"rank": ["many"]}, False),
        ({"rank": []}, False),
        ({"rank": [[4]]}, False),
        ({"sweep": [True]}, False),
    ],
)
def test_an_editor_takes_a_list_for_each_value_of_a_recipe(recipe, is_right):
    validator = jsonschema.Draft202012Validator(config_schema())
    assert validator.is_valid({"recipes": {"some": recipe}}) == is_right


def test_a_whole_config_reports_every_problem_at_once():
    config = with_value("recipes.qlora.rnk", 4)
    config["packings"]["best-fit"]["row_tokens"] = "many"
    config["gguf"] = {"quantizations": ["Q9"]}
    with pytest.raises(SettingsError) as caught:
        load_config(config)
    _, *problems = str(caught.value).splitlines()
    assert {problem.split(":")[0].strip() for problem in problems} == {
        "recipes.qlora.rnk",
        "packings.best-fit.row_tokens",
        "gguf.quantizations.0",
    }


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({}, "exactly one of `source`, `transplant` and `generate`"),
        ({"source": "a/b", "generate": {}}, "exactly one of `source`, `transplant` and"),
        ({"transplant": {}, "generate": {}}, "exactly one of `source`, `transplant` and"),
        ({"source": "mistral"}, "'mistral' is neither a Hub id"),
        ({"source": "a/b/c"}, "'a/b/c' is neither a Hub id"),
        ({"source": "./folder", "revision": "main"}, "`revision` belongs to a Hub id"),
    ],
)
def test_a_model_without_one_clear_origin_is_an_error(model, part):
    with pytest.raises(SettingsError) as caught:
        load_config(with_value("models.other", model))
    assert "  models.other: " in str(caught.value)
    assert part in str(caught.value)


@pytest.mark.parametrize("source", ["./folder", "../folder", "/folder", "~/folder"])
def test_a_folder_is_a_local_source(source):
    assert ModelSettings(source=source).is_local


def test_splits_that_leave_nothing_to_train_on_are_an_error():
    cleaning = {"validation_fraction": 0.5, "test_fraction": 0.5}
    with pytest.raises(SettingsError, match="datasets.stdlib-help.cleaning: validation_fraction"):
        load_config(with_value("datasets.stdlib-help.cleaning", cleaning))


@given(number=st.floats(min_value=1e-9, max_value=1.0))
def test_a_number_written_as_text_is_that_number(number):
    # `--config` hands nested values on as text, and YAML reads 2e-4 as text.
    config = load_config(with_value("recipes.qlora.learning_rate", repr(number)))
    assert config.recipes["qlora"].learning_rate == number


def test_2e_4_as_text_is_accepted():
    config = load_config(with_value("recipes.qlora.learning_rate", "2e-4"))
    assert config.recipes["qlora"].learning_rate == 0.0002


@given(
    limit=st.integers(1, 10_000),
    recipe_limit=st.none() | st.integers(1, 10_000),
    healing=st.integers(0, 10_000),
)
def test_max_steps_caps_recipes_and_the_training_of_the_demos_base(limit, recipe_limit, healing):
    config = with_value("max_steps", limit)
    config["recipes"]["qlora"]["max_steps"] = recipe_limit
    config["models"]["demo"] = {"transplant": {"n_healing_steps": healing}}
    loaded = load_config(config)
    transplant = loaded.entry("models", "demo").transplant
    assert transplant.n_healing_steps == min(limit, healing)
    steps = loaded.entry("recipes", "qlora").max_steps
    assert steps == min(limit, limit if recipe_limit is None else recipe_limit)
    # The smoke setting changes what stages are handed, and nothing else.
    assert loaded.recipes["qlora"].max_steps == recipe_limit
    assert loaded.entry("packings", "best-fit") == loaded.packings["best-fit"]
    assert loaded.entry("models", "hub") == loaded.models["hub"]


def test_without_max_steps_an_entry_is_as_written():
    loaded = load_config(SMALLEST)
    assert loaded.entry("recipes", "qlora") is loaded.recipes["qlora"]
    with pytest.raises(KeyError):
        loaded.entry("recipes", "no-such-recipe")


def test_a_loaded_value_never_changes():
    config = load_config(SMALLEST)
    with pytest.raises(ValueError, match="frozen"):
        config.max_steps = 3


def test_an_entry_handed_over_as_json_is_the_same_entry():
    recipe = RecipeSettings(rank=7, kv_rank="matched", learning_rate=3e-5, max_steps=11)
    assert settings_from_json(RecipeSettings, recipe.model_dump_json()) == recipe
    config = load_config(SMALLEST)
    assert settings_from_json(Config, config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["--settings is not JSON", "{", "line 1 column 2"]),
        ("row_tokens=4", ["--settings is not JSON", "row_tokens=4"]),
        ("[]", ["--settings cannot be used", "found []", "dictionary"]),
        ('{"row_token": 64}', ["--settings cannot be used", "row_token: unknown key"]),
        ('{"row_tokens": 1}', ["--settings cannot be used", "row_tokens: found 1"]),
    ],
)
def test_settings_that_do_not_fit_their_table_are_an_error(text, parts):
    with pytest.raises(SettingsError) as caught:
        settings_from_json(PackingSettings, text)
    for part in parts:
        assert part in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
option_paths = st.sampled_from(
    ["models", "runs", "build", "gguf", "evaluation", "max_steps", "recipes.qlora.rank"]
    + ["models.demo.generate", "datasets.stdlib-help.cleaning", "gguf.quantizations", "runs.demo"]
    + ["recipes.qlora.kv_rank", "packings.best-fit.strategy", "evaluation.gates"]
)


@given(path=option_paths, value=json_values)
def test_nonsense_anywhere_is_accepted_or_a_settings_error(path, value):
    try:
        config = load_config(with_value(path, value))
    except SettingsError as error:
        assert len(str(error).splitlines()) > 1
    else:
        assert json.loads(config.model_dump_json())
