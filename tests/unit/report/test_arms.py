from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, strategies as st

from tests.conftest import REPOSITORY
from workflow_scripts.log import StageError
from workflow_scripts.report.arms import STUDENT_T, Difference, difference, find_arms
from workflow_scripts.settings import config_files, load_config

EXPERIMENTS = sorted((REPOSITORY / "config" / "experiments").glob("*.yaml"))


def run(strategy="best_fit", *, packing_seed=0, recipe_seed=0, rank=32, model="demo"):
    return {
        "model": model,
        "dataset": "chats",
        "packing": {"strategy": strategy, "row_tokens": 4096, "seed": packing_seed},
        "recipe": {"rank": rank, "seed": recipe_seed},
    }


def both(n_seeds=3):
    return {
        f"{strategy}-{seed}": run(strategy, packing_seed=seed, recipe_seed=10 + seed)
        for seed in range(n_seeds)
        for strategy in ("concatenate", "best_fit")
    }


def test_runs_are_grouped_by_the_settings_that_differ_besides_the_seeds():
    factors, arms = find_arms(both())
    assert factors == ["packing.strategy"]
    assert [arm.name for arm in arms] == ["concatenate", "best_fit"]
    for arm in arms:
        assert list(arm.runs.values()) == [f"{arm.name}-{seed}" for seed in range(3)]
    assert list(arms[0].runs) == list(arms[1].runs)
    assert list(arms[0].runs)[1] == (("packing.seed", 1), ("recipe.seed", 11))


def test_all_settings_that_differ_are_named():
    runs = {"a": run(rank=8), "b": run("concatenate", rank=16), "c": run("concatenate", rank=8)}
    factors, arms = find_arms(runs)
    assert factors == ["packing.strategy", "recipe.rank"]
    assert [arm.name for arm in arms] == ["a", "b", "c"]
    assert [list(arm.values.values()) for arm in arms] == [
        ["best_fit", "8"],
        ["concatenate", "16"],
        ["concatenate", "8"],
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("low-0", "low-1", "high-0", "high-1"), ["low", "high"]),
        (("a-0", "a-1", "a-2", "a-3"), ["a-0", "a-2"]),  # both have the prefix `a`
        (("0-low", "1-low", "high_0", "high_1"), ["0-low", "high"]),
    ],
)
def test_an_arm_has_the_name_its_runs_begin_with(names, expected):
    one, two, three, four = names
    runs = {
        one: run(recipe_seed=0),
        two: run(recipe_seed=1),
        three: run(rank=8, recipe_seed=0),
        four: run(rank=8, recipe_seed=1),
    }
    assert [arm.name for arm in find_arms(runs)[1]] == expected


def test_a_setting_that_one_run_lacks_is_a_difference():
    longer = run()
    longer["packing"]["overlap_tokens"] = 64
    factors, arms = find_arms({"a": run(), "b": longer, "c": run(model="other")})
    assert factors == ["model", "packing.overlap_tokens"]
    assert len(arms) == 3


@pytest.mark.parametrize(
    ("runs", "parts"),
    [
        ({"a": run(), "b": run()}, ["have the same settings", "a, b"]),
        ({"a": run(), "b": run(packing_seed=1)}, ["differ only in their seeds", "2 runs"]),
        ({"a": run()}, ["must differ in a setting", "config/experiments"]),
        (
            {**both(2), "best_fit-2": run(packing_seed=2, recipe_seed=12)},
            ["cannot be paired", "packing.strategy", "best_fit-2"],
        ),
        (
            {"a": run(), "b": run("concatenate", recipe_seed=1)},
            ["cannot be paired", "found:    a / b"],
        ),
    ],
    ids=["twice", "seeds alone", "one run", "a seed too many", "other seeds"],
)
def test_runs_that_cannot_be_compared_are_a_stage_error(runs, parts):
    with pytest.raises(StageError) as caught:
        find_arms(runs)
    for part in parts:
        assert part in str(caught.value)


def t_distribution(t, freedom):
    """P(T ≤ t) of Student's t, by Simpson's rule over its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    n = 20_000
    values = [(1 + (t * at / n) ** 2 / freedom) ** (-(freedom + 1) / 2) for at in range(n + 1)]
    area = values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    return 0.5 + scale * area * t / n / 3


@pytest.mark.parametrize("freedom", range(1, len(STUDENT_T) + 1))
def test_the_table_of_students_t_has_97_5_per_cent_below(freedom):
    # Half a unit of the third decimal, where the density is 0.06 at most: 3e-5 of probability.
    assert t_distribution(STUDENT_T[freedom - 1], freedom) == pytest.approx(0.975, abs=3e-5)


def by_seed(values):
    return {(("seed", seed),): value for seed, value in enumerate(values)}


def test_a_difference_of_three_seeds_equals_the_one_computed_by_hand():
    # The pairs are 1, 2, 3: mean 2, deviation 1; t with two degrees of freedom is 4.303.
    found = difference(by_seed([11, 22, 33]), by_seed([10, 20, 30]))
    assert found.mean == 2
    assert found.half_width == pytest.approx(4.303 / math.sqrt(3))
    assert not found.is_significant


def test_the_effect_of_a_seed_on_both_arms_cancels():
    found = difference(by_seed([101.5, 2.5, 53.4]), by_seed([102.0, 3.1, 53.9]))
    assert found.mean == pytest.approx(-1.6 / 3)
    assert found.half_width < 0.2 and found.is_significant


@given(
    first=st.lists(st.floats(-100, 100), min_size=2, max_size=40),
    shift=st.floats(-10, 10),
)
def test_swapping_the_arms_changes_the_sign(first, shift):
    second = [value + shift * at for at, value in enumerate(first)]
    one = difference(by_seed(second), by_seed(first))
    other = difference(by_seed(first), by_seed(second))
    assert one.mean == pytest.approx(-other.mean)
    assert one.half_width == pytest.approx(other.half_width)
    pairs = [b - a for a, b in zip(first, second, strict=True)]
    assert one.mean == pytest.approx(statistics.mean(pairs))


def test_with_one_seed_no_difference_is_significant():
    assert difference(by_seed([5]), by_seed([1])) == Difference(4, None)
    assert not Difference(4, None).is_significant


def test_a_difference_as_large_as_its_error_is_not_significant():
    assert not Difference(-1.0, 1.0).is_significant
    assert Difference(-1.01, 1.0).is_significant


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_changes_one_thing_and_repeats_it_with_three_seeds(overlay):
    files = [config_files.read(path) for path in (config_files.DEMO, overlay)]
    config = load_config(config_files.layered(files))
    runs = {
        name: {
            "model": config.runs[name].model,
            "dataset": config.runs[name].dataset,
            "packing": config.entry("packings", config.runs[name].packing).model_dump(),
            "recipe": config.entry("recipes", config.runs[name].recipe).model_dump(),
        }
        for name in config.build
    }
    factors, (first, *others) = find_arms(runs)
    assert others
    for arm in others:
        differing = {key for key in factors if arm.values[key] != first.values[key]}
        # The adapter's scale is alpha ÷ rank, so alpha may change with the rank.
        assert len(differing - {"recipe.alpha"}) == (1 if arm.name != "all" else len(factors) - 1)
    for arm in (first, *others):
        for place in ("packing.seed", "recipe.seed"):
            assert len({dict(seeds)[place] for seeds in arm.runs}) >= 3


def test_there_are_experiments_on_the_settings_that_the_demo_compares():
    assert {path.stem for path in EXPERIMENTS} == {"packing", "recipe", "window"}
