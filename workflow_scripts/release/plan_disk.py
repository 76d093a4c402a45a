"""Gate: the disk has room for everything that the runs of a build will write.

Merged model and F16 GGUF have the size of the base in 16 bits. For a quantization, llama.cpp's own
tool states the bits per weight of its type. Releases are hard links and take no space. Files that
exist already are not counted.

python -m workflow_scripts.release.plan_disk --facts m=results/models/m/facts.json
    --settings '{"runs": {"my-run": "m"}, "gguf": {…}, "awq": false}' --results results
    --disk-plan results/disk_plan.json
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.plans import DiskPlan
from workflow_scripts.log import StageError
from workflow_scripts.settings import GgufSettings, settings_from_json
from workflow_scripts.settings.fields import Settings

OUTPUT_VERSION = 2
# Bits per weight of a whole file: the size of an 8B model in tools/quantize/quantize.cpp divided by
# its 8.03e9 weights, or the bits named there.
BITS_PER_WEIGHT = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.52, "Q6_K": 6.57, "Q5_1": 6.04, "Q5_K_M": 5.7,
    "Q5_K_S": 5.57, "Q5_K": 5.7, "Q5_0": 5.57, "Q4_1": 5.11, "Q4_K_M": 4.9, "Q4_K_S": 4.67,
    "Q4_K": 4.9, "IQ4_NL": 4.7, "Q4_0": 4.64, "MXFP4_MOE": 4.7, "MXFP4": 4.7, "IQ4_XS": 4.45,
    "Q3_K_L": 4.31, "Q3_K_M": 4.0, "Q3_K": 4.0, "IQ3_M": 3.86, "IQ3_S": 3.64, "Q3_K_S": 3.65,
    "IQ3_XS": 3.5, "IQ3_XXS": 3.26, "Q2_K": 3.17, "Q2_K_S": 3.17, "IQ2_M": 2.9, "IQ2_S": 2.7,
    "IQ2_XS": 2.51, "Q2_0": 2.45, "IQ2_XXS": 2.26, "TQ2_0": 2.26, "IQ1_M": 1.95, "TQ1_0": 1.89,
    "IQ1_S": 1.76, "Q1_0": 1.33,
}  # fmt: skip
# Weights that a k-quant scales together. A tensor whose rows are not a multiple of this falls back
# to Q5_0 or larger, at most to Q8_0: a model of width 576 in Q4_K_M took 6.0 bits per weight.
K_BLOCK = 256
ANY_WIDTH = {"F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "MXFP4"}
# For a 7B: 4 bits, a scale and a zero point per 128 weights, embeddings and output layer in 16.
AWQ_BITS = 4.6
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# For headers, tokenizer, adapter, scores, and blocks that the file system reserves.
MARGIN = 1.03
logger = log.stage_logger("plan_disk")


class DiskSettings(Settings):
    """The settings that the large files of a build depend on."""

    runs: dict[str, str]
    """Run → model."""
    gguf: GgufSettings
    awq: bool


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--facts", nargs="+", required=True, help="model=facts.json of each model")
    parser.add_argument(
        "--settings", required=True, help="JSON: runs with their models, `gguf`, awq"
    )
    parser.add_argument("--results", type=Path, required=True, help="folder of all results")
    parser.add_argument("--disk-plan", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    wanted = settings_from_json(DiskSettings, arguments.settings)
    facts = {
        name: Facts.read(Path(path))
        for name, _, path in (model.partition("=") for model in arguments.facts)
    }
    planned = {
        path: n_bytes
        for run, model in wanted.runs.items()
        for path, n_bytes in files_of(
            run, facts[model], facts[model].weight_bytes, wanted.gguf, has_awq=wanted.awq
        ).items()
    }
    lacking = missing(planned, arguments.results)
    needed = needed_bytes(lacking)
    free = shutil.disk_usage(arguments.results).free
    if needed > free:
        largest = sorted(lacking, key=lacking.__getitem__, reverse=True)[:6]
        raise StageError(
            "the disk has no room for the files of this build",
            where=arguments.results.resolve(),
            found=f"{free / 1e9:.1f} GB free",
            expected=f"{needed / 1e9:.1f} GB: "
            + ", ".join(f"{path} {lacking[path] / 1e9:.1f}" for path in largest)
            + (", …" if len(lacking) > len(largest) else ""),
            to_fix="make room, name fewer runs in `build` or fewer gguf.quantizations, or set"
            " retention.merged and retention.f16 to false and build one run at a time;"
            f" {log.DOCTOR}",
        )
    DiskPlan(needed_bytes=needed, free_bytes=free, planned_bytes=planned).write(arguments.disk_plan)
    logger.info("fits needed_gb=%.1f free_gb=%.1f", needed / 1e9, free / 1e9)


def files_of(
    run: str, shape: ModelShape, weight_bytes: int, gguf: GgufSettings, *, has_awq: bool = False
) -> dict[str, int]:
    """Path below `results/` → bytes, for the large files of a run.

    Args:
        shape: the base model's.
        weight_bytes: size of the base model's safetensors.
    """
    n_weights = weight_bytes / WEIGHT_BYTES.get(shape.dtype or "", 2)
    sizes = {"merged": 16.0, f"gguf/{run}-F16.gguf": 16.0}
    if has_awq:
        sizes["awq"] = AWQ_BITS
    falls_back = bool(shape.hidden_size % K_BLOCK or shape.intermediate_size % K_BLOCK)
    for name in gguf.quantizations:
        mix = gguf.mix(name)
        types = [mix.type, mix.output, mix.token_embd, *mix.tensors.values()]
        # For a mix, the largest of its types: an upper bound.
        bits = max(BITS_PER_WEIGHT[one] for one in types if one)
        if falls_back and not ANY_WIDTH.issuperset(one for one in types if one):
            bits = max(bits, BITS_PER_WEIGHT["Q8_0"])
        elif falls_back and not mix.output:
            # llama.cpp makes the output layer Q6_K in every type, and falls back to Q8_0 for it.
            n_output = shape.vocabulary_size * shape.hidden_size
            bits += max(0, BITS_PER_WEIGHT["Q8_0"] - bits) * n_output / n_weights
        sizes[f"gguf/{run}-{name}.gguf"] = bits
    return {f"runs/{run}/{path}": round(bits * n_weights / 8) for path, bits in sizes.items()}


def missing(planned: Mapping[str, int], results: Path) -> dict[str, int]:
    """The planned files that do not exist yet."""
    return {path: n_bytes for path, n_bytes in planned.items() if not (results / path).exists()}


def needed_bytes(lacking: Mapping[str, int]) -> int:
    """Space for files, with the margin."""
    return round(MARGIN * sum(lacking.values()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
