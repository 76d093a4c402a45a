from __future__ import annotations

import pytest

from tests.unit.quantize.test_tensor_types import DENSE
from workflow_scripts.handover.plans import QuantizationPlan
from workflow_scripts.quantize import plan_quantizations

STAGE = "workflow_scripts.quantize.plan_quantizations"
# SmolLM2-135M: with its width of 576, 62 % of Q4_K_M became Q5_0.
SMOL = DENSE.changed(
    n_layers=30, hidden_size=576, intermediate_size=1536, n_heads=9, n_kv_heads=3, head_dim=64,
    vocabulary_size=32_768, ties_embeddings=True,
)  # fmt: skip


@pytest.fixture
def arguments(as_json, tmp_path):
    def make(facts, *quantizations, **settings):
        facts.write(tmp_path / "facts.json")
        gguf = as_json(quantizations=quantizations, **settings)
        paths = ["--facts", tmp_path / "facts.json", "--plan", tmp_path / "plan.json"]
        return [*paths, "--model", "smol", "--settings", gguf]

    return make


def test_widths_that_fit_are_planned_without_a_warning(arguments, run_stage, tmp_path):
    done = run_stage(STAGE, *arguments(DENSE, "Q4_K_M", "Q8_0"))
    assert done.returncode == 0, done.stderr
    plan = QuantizationPlan.read(tmp_path / "plan.json").root
    assert plan["Q4_K_M"].fallback_fraction == 0 == plan["Q8_0"].fallback_fraction
    assert "WARNING" not in done.stderr


def test_a_fallback_above_a_twentieth_is_a_warning(arguments, run_stage, tmp_path):
    done = run_stage(STAGE, *arguments(SMOL, "Q4_K_M", "Q8_0"))
    assert done.returncode == 0, done.stderr
    plan = QuantizationPlan.read(tmp_path / "plan.json").root
    assert plan["Q4_K_M"].fallback_fraction > 0.5
    assert plan["Q4_K_M"].type_fractions["Q5_0"] > 0.5
    (warning,) = [line for line in done.stderr.splitlines() if " WARNING " in line]
    for part in (
        "Q4_K_M of models.smol will hold",
        "Q4_K → Q5_0",
        "hidden_size 576",
        "multiples of 256",
    ):
        assert part in warning
    assert plan["Q8_0"].fallback_fraction == 0


@pytest.mark.parametrize(
    ("facts", "quantization", "parts"),
    [
        (
            SMOL.model_dump(),
            "Q1_0",
            ["cannot make Q1_0 of this model's widths", "no tensor type fallback"],
        ),
        ({"model_type": "ministral"}, "Q8_0", ["does not know Ministral", "the target `train`"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "Q8_0", ["no form of dynamic NTK"]),
    ],
)
def test_a_quantization_that_cannot_be_made_is_refused(
    arguments, ends_with_message, tmp_path, facts, quantization, parts
):
    facts = DENSE.changed(**facts)
    message = ends_with_message(plan_quantizations.main, arguments(facts, quantization))
    for part in parts:
        assert part in message
    assert not (tmp_path / "plan.json").exists()


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers", "llama_cpp"})
