"""The choice of a layout, and the advice of a refusal."""

from __future__ import annotations

import re

import pytest

from tests.unit.train.shapes import MISTRAL_7B, TINY, setup_of
from workflow_scripts.log import StageError
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train.memory import fit
from workflow_scripts.train.memory.layouts import Layouts
from workflow_scripts.train.memory.prediction import predict
from workflow_scripts.train.memory.shape import PlannedRun

GB = 10**9
MEMORY_GB = (8, 12, 16, 24, 40, 80, 141)


def on_gpu(*, row_tokens=4096, training=None, recipe=None, facts=MISTRAL_7B, **options):
    return PlannedRun(
        facts,
        recipe or RecipeSettings(),
        training or TrainingSettings(kernels="torch"),
        row_tokens=row_tokens,
        device_type="cuda",
        **options,
    )


def chosen(available_gb, *, n_steps_down=0, **options):
    return fit.choose(
        Layouts.of(on_gpu(**options)),
        available_bytes=int(available_gb * GB),
        n_steps_down=n_steps_down,
    )


@pytest.mark.parametrize("row_tokens", [4096, 8192, 32_768])
def test_the_chosen_layout_fits_and_more_memory_never_chooses_a_slower_one(row_tokens):
    times = []
    for available in MEMORY_GB:
        try:
            found = chosen(available, row_tokens=row_tokens)
        except StageError:
            assert not times, "less memory was enough"
            continue
        assert found.peak <= available * GB * (1 - fit.MARGIN)
        assert found.peak == sum(found.parts_bytes.by_name().values())
        times.append(found.flops_per_token)
    assert times and times == sorted(times, reverse=True)


def test_offloading_is_chosen_only_where_nothing_else_fits():
    with_offload = []
    for available in range(10, 40):
        try:
            found = chosen(available, row_tokens=32_768)
        except StageError:
            continue
        if found.offloads_activations:
            without = TrainingSettings(kernels="torch", offload_activations=False)
            with pytest.raises(StageError):
                chosen(available, row_tokens=32_768, training=without)
            with_offload.append(available)
    assert with_offload


def test_explicit_settings_are_kept():
    training = TrainingSettings(
        rows_per_micro_batch=2, gradient_checkpointing=7, offload_activations=False
    )
    assert chosen(80, training=training).setup == setup_of(2, 7, False)


def test_memory_gb_takes_precedence_over_free_memory():
    training = TrainingSettings(kernels="torch", memory_gb=12)
    assert chosen(80, training=training) == chosen(12)


def test_each_step_down_takes_clearly_less():
    peaks = [chosen(40, n_steps_down=n).peak for n in range(4)]
    assert all(
        after <= fit.STEP_DOWN * before for before, after in zip(peaks, peaks[1:], strict=False)
    )
    with pytest.raises(StageError, match="does not fit"):
        chosen(40, n_steps_down=30)


@pytest.mark.parametrize(
    ("available", "row_tokens", "recipe", "training"),
    [
        (8, 32_768, {}, {}),
        (12, 32_768, {}, {}),
        (7.9, 8192, {}, {}),
        (16, 32_768, {}, {"offload_activations": False}),
        (12, 4096, {}, {"gradient_checkpointing": "off"}),
        (24, 8192, {}, {"rows_per_micro_batch": 8, "gradient_checkpointing": "full"}),
        (12, 4096, {"method": "lora"}, {}),
        (24, 4096, {"rank": 512}, {}),
    ],
)
def test_a_refusal_names_settings_that_are_predicted_to_fit(
    available, row_tokens, recipe, training
):
    recipe = RecipeSettings(evaluations=0, **recipe)
    training = TrainingSettings(kernels="torch", **training)
    with pytest.raises(StageError, match="does not fit") as caught:
        chosen(available, row_tokens=row_tokens, recipe=recipe, training=training)
    advice = re.search(r"to fix: +set one of: (.*)", str(caught.value))[1]
    for change in advice.split("; "):
        tables = {"training": {}, "recipes": {}, "packings": {}}
        for table, keys in re.findall(
            r"(training|recipes|packings)(?:\.<name>)?[.:] ?((?:(?!recipes|packings).)*)", change
        ):
            for key, value in re.findall(r"(\w+): ([\w.]+)", keys):
                tables[table][key] = {"true": True}.get(value, value)
        longer = tables["packings"].get("row_tokens", row_tokens)
        chosen(
            available,
            row_tokens=int(longer),
            recipe=RecipeSettings.model_validate(recipe.model_dump() | tables["recipes"]),
            training=TrainingSettings.model_validate(training.model_dump() | tables["training"]),
        )
        assert any(tables.values()), change


def test_a_refusal_shows_the_parts_and_the_limit():
    with pytest.raises(StageError) as caught:
        chosen(3)
    for part in ("base weights 4.14 GB", "at most 2.82 GB", "6%", "GB free, or a smaller model"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("rows", "n_gpus", "nearest"), [(8, 3, "6 or 9"), (2, 4, "4")])
def test_the_error_for_an_indivisible_step_names_the_nearest_numbers(rows, n_gpus, nearest):
    with pytest.raises(StageError, match=f"rows_per_step: {nearest}$"):
        chosen(80, recipe=RecipeSettings(rows_per_step=rows), n_gpus=n_gpus)


def test_the_error_for_a_micro_batch_that_does_not_divide_the_step_names_those_that_do():
    with pytest.raises(StageError, match="one of 1, 2, 4"):
        chosen(80, training=TrainingSettings(rows_per_micro_batch=3), n_gpus=2)


def test_fsdp2_shards_what_ddp_replicates():
    ddp, fsdp = (
        predict(
            on_gpu(training=TrainingSettings(parallelism=name), n_gpus=4), setup_of(1, 32, False)
        )
        for name in ("ddp", "fsdp2")
    )
    for part in ("base_weights", "adapter", "gradients", "optimizer"):
        assert getattr(fsdp, part) == pytest.approx(getattr(ddp, part) / 4, abs=1)
    assert fsdp.peak < ddp.peak


def test_evaluation_counts_if_it_takes_more_than_training():
    facts = MISTRAL_7B.changed(sliding_window=None)
    longest, known, never = (
        predict(on_gpu(row_tokens=1024, facts=facts, **options), setup_of(1, 32, False))
        for options in (
            {},
            {"longest_evaluation": 2000},
            {"recipe": RecipeSettings(evaluations=0)},
        )
    )
    assert longest.evaluation > known.evaluation >= never.evaluation == 0


def test_the_error_for_exhausted_memory_names_what_takes_less():
    run = PlannedRun(
        TINY.changed(n_layers=16, layer_windows=[None] * 16),
        RecipeSettings(evaluations=0, rows_per_step=4),
        TrainingSettings(),
        row_tokens=16_384,
        device_type="cpu",
    )
    error = fit.refusal(
        Layouts.of(run), n_steps_down=0, error="DefaultCPUAllocator: can't allocate memory"
    )
    for part in ("the memory ran out", "can't allocate memory", "training.memory_gb: ", "peak"):
        assert part in str(error)


def test_the_table_marks_the_chosen_layout():
    found = chosen(24)
    text = fit.table(Layouts.of(on_gpu()), available_bytes=24 * GB, chosen=found)
    (line,) = [line for line in text.splitlines() if line.endswith("chosen")]
    assert line.split()[:2] == [str(found.rows_per_micro_batch), str(found.n_checkpointed_layers)]
    assert "too large" in text


def test_the_demo_is_never_refused_on_24_gb():
    facts = TINY.changed(
        n_layers=4,
        intermediate_size=1024,
        vocabulary_size=32_768,
        context_tokens=4096,
        sliding_window=512,
        layer_windows=[512] * 4,
    )
    run = PlannedRun(
        facts,
        RecipeSettings(rank=64, rows_per_step=8),
        TrainingSettings(),
        row_tokens=2560,
        device_type="cpu",
    )
    found = fit.choose(Layouts.of(run), available_bytes=24 * GB)
    assert not found.offloads_activations and found.n_checkpointed_layers == 0
    assert found.peak < 6 * GB
