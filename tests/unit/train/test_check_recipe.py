from __future__ import annotations

import pytest

from workflow_scripts import files
from workflow_scripts.train import check_recipe

STAGE = "workflow_scripts.train.check_recipe"


@pytest.fixture
def arguments(facts, as_json, tmp_path):
    """`arguments(heads={…}, **recipe)`: the stage's command line."""

    def make(*, heads: dict | None = None, **recipe):
        facts.changed(**(heads or {})).write(tmp_path / "facts.json")
        paths = ["--facts", tmp_path / "facts.json", "--check", tmp_path / "check.json"]
        return [*paths, "--name", "mine", "--recipe", as_json(**recipe)]

    return make


NINE_HEADS = {"n_heads": 9, "n_kv_heads": 3}


@pytest.mark.parametrize(
    ("heads", "recipe", "parts"),
    [
        (
            NINE_HEADS,
            {"rank": 16, "kv_rank": "matched"},
            ["matched gives 5.33 for k and v; choose a rank divisible by 3", "15 or 18"],
        ),
        ({}, {"rank": 2, "kv_rank": "matched"}, ["gives 0.50", "divisible by 4", "as 4 would"]),
        ({}, {"target_modules": ["w_proj"]}, ["not a linear layer of the model", "w_proj"]),
        ({}, {"adapts_experts": True}, ["settings for experts"]),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(
    arguments, ends_with_message, tmp_path, heads, recipe, parts
):
    message = ends_with_message(check_recipe.main, arguments(heads=heads, **recipe))
    for part in parts:
        assert part in message
    if "kv_rank" in recipe:
        assert "recipes.mine.rank" in message
    assert not (tmp_path / "check.json").exists()


@pytest.mark.parametrize(
    ("heads", "recipe"),
    [
        (NINE_HEADS, {"rank": 18, "kv_rank": "matched"}),
        (NINE_HEADS, {"rank": 16, "kv_rank": "uniform"}),
        (NINE_HEADS, {"rank": 16, "kv_rank": 5}),
        # Without an adapter there is no rank.
        (NINE_HEADS, {"rank": 16, "kv_rank": "matched", "method": "full"}),
        ({}, {"rank": 32, "kv_rank": "matched"}),
    ],
)
def test_a_recipe_that_fits_passes(arguments, run_stage, tmp_path, heads, recipe):
    done = run_stage(STAGE, *arguments(heads=heads, **recipe))
    assert done.returncode == 0, done.stderr
    assert files.read_json(tmp_path / "check.json")["recipe"]["rank"] == recipe["rank"]


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers", "peft"})
