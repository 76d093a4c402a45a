"""Gate: the merged model is the base with the adapter added, and no worse than the adapter it came
from.

Arithmetic: merged against PEFT applying the same adapter live to the same base (a full fine-tune's
weights in the base's place), both in float32; what remains is the one rounding of each weight to 16
bits. Quality: perplexity on validation text against the model that training saw, its base in the
precision of training. The files judged are read, never changed.

python -m workflow_scripts.export.check_merged --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --precision nf4 --merged merged/ --tokens tokens/validation.arrow
    --settings '{}' --check merged_check.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import GateSettings, settings_from_json

OUTPUT_VERSION = 1
TRAINED_AS = {
    "native": "the model as it was trained",
    "int8": "the adapter on its 8-bit base",
    "nf4": "the adapter on its 4-bit base",
}
logger = log.stage_logger("check_merged")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of train_adapter")
    parser.add_argument(
        "--precision", choices=TRAINED_AS, required=True, help="of the base in training"
    )
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="documents of the validation split"
    )
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates`")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(GateSettings, arguments.settings)

    import torch
    from transformers import AutoTokenizer

    from workflow_scripts.scoring.likelihood import (
        all_logits,
        divergence,
        score_documents,
        summarize,
    )
    from workflow_scripts.scoring.transformers_model import TransformersModel, measured_precision

    facts = files.read_json(arguments.facts)
    model_facts = {"window": facts["sliding_window"], "rope": facts["rope_parameters"]}
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    AutoTokenizer.from_pretrained(arguments.merged)
    device = roomy_device(facts)
    live = TransformersModel(
        arguments.checkpoint,
        **model_facts,
        precision="float32",
        adapter=arguments.adapter,
        device=device,
    )
    reference = [all_logits(live, piece) for piece in pieces]
    del live
    # By its own config.json but for the window: the positions there are what its users get.
    merged = TransformersModel(
        arguments.merged, window=facts["sliding_window"], precision="float32", device=device
    )
    compared = [
        divergence(expected, all_logits(merged, piece))
        for expected, piece in zip(reference, pieces, strict=True)
    ]
    divergences = torch.cat([kl for kl, _ in compared])
    agreements = torch.cat([agrees for _, agrees in compared])
    merged_scores = summarize(score_documents(merged, pieces))
    del merged, reference
    precision = measured_precision(arguments.precision)
    trained = TransformersModel(
        arguments.checkpoint,
        **model_facts,
        precision=precision,
        adapter=arguments.adapter,
    )
    adapter_scores = summarize(score_documents(trained, pieces))
    report = {
        "n_conversations": len(documents),
        "n_scored_tokens": merged_scores["n_scored_tokens"],
        "kl_divergence_nats": float(divergences.mean()),
        "max_kl_divergence_nats": float(divergences.max()),
        "top1_agreement_fraction": float(agreements.double().mean()),
        "merged_perplexity": merged_scores["perplexity"],
        "adapter_precision": precision,
        "adapter_perplexity": adapter_scores["perplexity"],
        "perplexity_increase_fraction": merged_scores["perplexity"] / adapter_scores["perplexity"]
        - 1,
    }
    logger.info("measured %s", log.fields(report))
    # Written so that NaN, which compares as false, does not pass.
    if not report["kl_divergence_nats"] <= settings.merge_kl_divergence_nats:
        raise log.StageError(
            "the merged model differs from base + adapter",
            where=f"{arguments.merged}, mean over {report['n_scored_tokens']} tokens",
            found=f"KL divergence {report['kl_divergence_nats']:.3g} nats a token",
            expected=f"at most {settings.merge_kl_divergence_nats:.3g}"
            " (evaluation.gates.merge_kl_divergence_nats)",
            to_fix="merge again with this version; if it stays, please report it",
        )
    if not report["perplexity_increase_fraction"] <= settings.merge_perplexity_increase_fraction:
        raise log.StageError(
            "the merged model is worse than the adapter it was made of",
            where=f"{arguments.merged}, {len(documents)} validation conversations",
            found=f"perplexity {report['merged_perplexity']:.4f} against"
            f" {report['adapter_perplexity']:.4f} of {TRAINED_AS[arguments.precision]}",
            expected=f"at most {settings.merge_perplexity_increase_fraction:.1%} more"
            " (evaluation.gates.merge_perplexity_increase_fraction)",
            to_fix="train longer, or raise the gate if you accept the loss",
        )
    files.write_json(arguments.check, report)


def roomy_device(facts: dict) -> str | None:
    """The GPU where the model fits in float32, else the CPU: the arithmetic is judged in
    float32."""
    import torch

    if not torch.cuda.is_available():
        return None
    n_bytes = sum(entry["size_bytes"] for entry in facts["files"].values())
    free, _ = torch.cuda.mem_get_info()
    return None if 2.5 * n_bytes < free else "cpu"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
