"""Plan the types of the config's quantizations before anything is trained.

llama.cpp's quantizer gives a tensor a fallback type if the length of a row is not a multiple of the
type's block: a width of 576 turns most of Q4_K_M into Q5_0, larger and of another quality. If more
than a twentieth of the weights get fallback types, there is a warning here and a line in the
release. A quantization that llama.cpp cannot make is refused. The types come from a dry run of
llama.cpp's own quantizer.

python -m workflow_scripts.quantize.plan_quantizations --facts facts.json
    --settings '{"quantizations": ["Q4_K_M"]}' --plan quantization_plan.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.plans import QuantizationPlan, TensorTypes
from workflow_scripts.log import StageError
from workflow_scripts.quantize import tensor_types
from workflow_scripts.settings import GgufSettings, settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("plan_quantizations")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", type=Path, required=True, help="model facts: its shapes")
    parser.add_argument("--model", default="<name>", help="its name in the config, for messages")
    parser.add_argument("--settings", required=True, help="JSON of `gguf`")
    parser.add_argument("--plan", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(GgufSettings, arguments.settings)
    facts = Facts.read(arguments.facts)

    check_converts(facts, arguments.model)

    plan = {}
    for name in settings.quantizations:
        plan[name] = one = tensor_types.planned(facts, settings, name)
        logger.info("planned %s %s", name, log.fields(one.model_dump() | one.type_fractions))
        if one.fallback_fraction > tensor_types.TOLD_FRACTION:
            logger.warning("%s", told(name, one, facts, arguments.model))
    QuantizationPlan(plan).write(arguments.plan)


def check_converts(facts: ModelShape, model: str) -> None:
    """Check that llama.cpp's converter knows the architecture and its positions.

    Raises:
        StageError: it does not, so every run of the model would fail at its GGUF.
    """
    way_out = "build the target `train`, which makes no GGUF"
    if facts.model_type == "ministral":
        raise StageError(
            "llama.cpp's converter does not know Ministral's layers with different windows",
            where=f"models.{model}",
            found="model_type: ministral",
            expected="mistral or mixtral, for a GGUF",
            to_fix=way_out,
        )
    rope = facts.rope_parameters.get("rope_type")
    if rope == "dynamic":
        raise StageError(
            "GGUF has no form of dynamic NTK",
            where=f"models.{model}.rope_scaling.type",
            found=rope,
            expected="linear, yarn or none",
            to_fix=f"use yarn, or {way_out}",
        )


def told(name: str, plan: TensorTypes, facts: ModelShape, model: str) -> str:
    """Return the warning about fallback types, with the widths that cause them."""
    types = ", ".join(f"{share:.0%} {kind}" for kind, share in plan.type_fractions.items())
    changes = ", ".join(f"{change} ({n} tensors)" for change, n in plan.fallbacks.items())
    widths = (
        f"hidden_size {facts.hidden_size}, intermediate_size {facts.intermediate_size},"
        f" heads · head_dim {facts.n_heads * facts.head_dim}"
    )
    return (
        f"{name} of models.{model} will hold {plan.fallback_fraction:.0%} of the weights in"
        f" other types than its name says: {changes}; in all {types}. Rows of k-quants and most"
        f" i-quants must be multiples of 256 ({widths}). Q8_0, Q5_0 and Q4_0 need multiples of 32"
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
