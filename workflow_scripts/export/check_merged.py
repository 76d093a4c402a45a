"""Gate: the merged model is the base with the adapter added, and no worse than the adapter it came
from; its folder is complete.

Arithmetic: merged against PEFT applying the same adapter live to the same base (as published, or
its NF4 weights dequantized; a full fine-tune's in its place), both in float32; what remains is the
one rounding of each weight to 16 bits. Quality: perplexity on validation text against the model
that training saw, its base in the precision of training. The files judged are read, never changed.
A model that was merged elsewhere comes without an adapter: its folder is judged, and its perplexity
taken.

python -m workflow_scripts.export.check_merged --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --precision nf4 --merge-base original --tokenizer tokenizer/
    --merged merged/ --tokens tokens/validation.arrow --settings '{}' --check merged_check.json
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import files, log
from workflow_scripts.data.documents import Documents
from workflow_scripts.export import merge_base
from workflow_scripts.models.checkpoint import check_shards
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeGateSettings, settings_from_json

if TYPE_CHECKING:
    from workflow_scripts.scoring.transformers_model import TransformersModel

OUTPUT_VERSION = 2
KL_DIVERGENCE_NATS = 1e-5
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
    parser.add_argument("--adapter", type=Path, help="what was merged; none for a model as given")
    parser.add_argument(
        "--precision", choices=TRAINED_AS, default="native", help="of the base in training"
    )
    parser.add_argument("--merge-base", default="original", help=merge_base.HELP)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="documents of the validation split"
    )
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates.merge`")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(MergeGateSettings, arguments.settings)
    facts = files.read_json(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    check_folder(arguments.merged, arguments.tokenizer, facts)
    measure = compared_with_adapter if arguments.adapter else scored_alone
    report = {"n_conversations": len(documents), **measure(arguments, facts, pieces)}
    logger.info("measured %s", log.fields(report))
    judge(report, settings, arguments)
    files.write_json(arguments.check, report)


def compared_with_adapter(
    arguments: argparse.Namespace, facts: dict[str, Any], pieces: Sequence[cutting.Piece]
) -> dict[str, Any]:
    """The merged model against what it was made of, on validation text."""
    import torch

    from workflow_scripts.export import merged_weights
    from workflow_scripts.export.base_weights import BaseWeights
    from workflow_scripts.scoring.likelihood import (
        all_logits,
        divergence,
        score_documents,
        summarize,
    )
    from workflow_scripts.scoring.transformers_model import (
        TransformersModel,
        as_trained,
        measured_precision,
    )

    shape = {"window": facts["sliding_window"], "rope": facts["rope_parameters"]}
    base_name = merge_base.chosen(arguments.merge_base)
    device = roomy_device(facts)
    live = TransformersModel(arguments.checkpoint, **shape, precision="float32", device=device)
    nf4_dtype = merge_base.nf4_dtype(base_name, arguments.adapter, arguments.checkpoint)
    if nf4_dtype is not None:
        merged_weights.overwrite(live.model, BaseWeights(arguments.checkpoint, nf4_dtype))
    live.model = as_trained(live.model, arguments.adapter).eval()
    reference = [all_logits(live, piece) for piece in pieces]
    del live
    merged = as_users_get_it(arguments.merged, facts)
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
        arguments.checkpoint, **shape, precision=precision, adapter=arguments.adapter
    )
    adapter_scores = summarize(score_documents(trained, pieces))
    return {
        "merge_base": base_name,
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


def scored_alone(
    arguments: argparse.Namespace, facts: dict[str, Any], pieces: Sequence[cutting.Piece]
) -> dict[str, Any]:
    """Of a model that was merged elsewhere: nothing to compare it with came along."""
    from workflow_scripts.scoring.likelihood import score_documents, summarize

    scores = summarize(score_documents(as_users_get_it(arguments.merged, facts), pieces))
    return {
        "n_scored_tokens": scores["n_scored_tokens"],
        "merged_perplexity": scores["perplexity"],
    }


def as_users_get_it(merged: Path, facts: dict[str, Any]) -> TransformersModel:
    """Loaded in float32, by its own config.json but for the window: the positions there are what
    its users get."""
    from workflow_scripts.scoring.transformers_model import TransformersModel

    return TransformersModel(
        merged, window=facts["sliding_window"], precision="float32", device=roomy_device(facts)
    )


def judge(
    report: dict[str, Any], settings: MergeGateSettings, arguments: argparse.Namespace
) -> None:
    """
    Raises:
        StageError: a figure is beyond its gate; so is NaN, which compares as false.
    """
    if not math.isfinite(report["merged_perplexity"]):
        raise log.StageError(
            "the merged model computes no numbers",
            where=arguments.merged,
            found=f"perplexity {report['merged_perplexity']}",
            expected="a finite one",
        )
    if arguments.adapter is None:
        return
    if not report["kl_divergence_nats"] <= KL_DIVERGENCE_NATS:
        raise log.StageError(
            "the merged model differs from base + adapter",
            where=f"{arguments.merged}, mean over {report['n_scored_tokens']} tokens",
            found=f"KL divergence {report['kl_divergence_nats']:.3g} nats a token",
            expected=f"at most {KL_DIVERGENCE_NATS:.3g}",
            to_fix="merge again with this version; if it stays, please report it",
        )
    if not report["perplexity_increase_fraction"] <= settings.perplexity_increase_fraction:
        raise log.StageError(
            "the merged model is worse than the adapter it was made of",
            where=f"{arguments.merged}, {report['n_conversations']} validation conversations",
            found=f"perplexity {report['merged_perplexity']:.4f} against"
            f" {report['adapter_perplexity']:.4f} of {TRAINED_AS[arguments.precision]}",
            expected=f"at most {settings.perplexity_increase_fraction:.1%} more"
            " (evaluation.gates.merge.perplexity_increase_fraction)",
            to_fix="set runs.<name>.merge_base: auto (a run trained in 4 bits), train longer, or"
            " raise the gate if you accept the loss",
        )


def check_folder(merged: Path, tokenizer: Path, facts: dict[str, Any]) -> None:
    """All that a user of the folder needs is there: the tokenizer that ships, and a config that
    says what was trained.

    Args:
        tokenizer: folder of export_tokenizer, which its own gate has judged.
    Raises:
        StageError: the first thing that is missing, or differs.
    """
    from transformers import AutoConfig, AutoTokenizer

    expected = {path.name: files.sha256(path) for path in sorted(tokenizer.iterdir())}
    for name in (*expected, "generation_config.json"):
        if not (merged / name).is_file():
            raise log.StageError(
                "the merged folder is not complete",
                where=merged,
                found=f"no {name}",
                expected=", ".join((*expected, "generation_config.json")),
                to_fix="merge again",
            )
    for name, digest in expected.items():
        if files.sha256(merged / name) != digest:
            raise log.StageError(
                "the merged folder has another tokenizer than training",
                where=merged / name,
                found="other bytes",
                expected=f"those of {tokenizer / name}",
                to_fix="merge again; the tokenizer and its template are the base's",
            )
    check_shards(merged)
    config = AutoConfig.from_pretrained(merged)
    window = getattr(config, "sliding_window", None)
    if window != facts["sliding_window"]:
        raise log.StageError(
            "the merged folder loads with another sliding window",
            where=f"{merged / 'config.json'}, sliding_window",
            found=window,
            expected=facts["sliding_window"],
            to_fix="merge again",
        )
    n_tokens = len(AutoTokenizer.from_pretrained(merged))
    if n_tokens != config.vocab_size:
        raise log.StageError(
            "the tokenizer does not fit the merged model",
            where=merged,
            found=f"{n_tokens} tokens",
            expected=f"{config.vocab_size}, the rows of its embeddings",
            to_fix="take a base model whose tokenizer holds the tokens that were added",
        )


def roomy_device(facts: dict[str, Any], *, times_its_size: float = 2.5) -> str | None:
    """The GPU where the model fits, else the CPU.

    Args:
        times_its_size: memory wanted, in sizes of the base's files; 2.5 is a base of 16 bits in
            float32.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    n_bytes = sum(entry["size_bytes"] for entry in facts["files"].values())
    torch.cuda.empty_cache()  # of the model before
    free, _ = torch.cuda.mem_get_info()
    return None if times_its_size * n_bytes < free else "cpu"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
