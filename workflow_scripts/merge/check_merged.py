"""Gate: the merged model is the base with the adapter added, and no worse than the adapter it came
from; its folder is complete.

Exact: every stored number is the rounded sum of base and adapter, by PEFT's reading of the adapter
and in float64 (`exact_merge`); the config is the base's. Statistical: the folder, as its users load
it, computes what that rounded sum computes, and the loss on validation text is no worse than that
of the model as it was trained, its base in the precision of training. What rounding cost is
measured and reported: KL divergence from the float32 sum, next to that of stochastic rounding.
Models pass through memory a parameter at a time, so that the gate needs no more than training did.
The files judged are read, never changed. A model that was merged elsewhere comes without an
adapter: its folder is judged, and its perplexity taken.

python -m workflow_scripts.merge.check_merged --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --precision nf4 --merge-base original --tokenizer tokenizer/
    --merged merged/ --tokens tokens/validation.arrow --settings '{}' --check merged_check.json
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.handover.gates import GivenMergedCheck, MergeBase, MergedCheck
from workflow_scripts.merge import merge_base
from workflow_scripts.models.checkpoint_files import check_shards
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeGateSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

if TYPE_CHECKING:
    import numpy as np
    import torch

    from workflow_scripts.merge.exact_merge import Reference
    from workflow_scripts.merge.live_adapter import LiveAdapter
    from workflow_scripts.merge.model_weights import LiveWeights
    from workflow_scripts.scoring.streamed_model import StreamedModel

OUTPUT_VERSION = 3
TRAINED_AS = {
    "native": "the model as it was trained",
    "int8": "the adapter on its 8-bit base",
    "nf4": "the adapter on its 4-bit base",
}
# Reported, not judged: weights lie on the grid of their type, so rounding to nearest loses changes
# below half a step, all in one direction. Rounding at random keeps them on average.
N_ROUNDINGS = 3
# Weights that are right differ from the rounded sum only where float32 could not decide between two
# neighbours. Measured on real weights: no divergence at all.
ROUNDED_SHARE = 0.05
# Tokens on which divergences are measured: enough for a mean that every weight has a part in.
DIVERGENCE_TOKENS = 1024
# Logits of two float32 computations of the same model.
ARITHMETIC_NATS = 1e-7
# A difference in loss counts where it is larger than so many of its standard errors.
STANDARD_ERRORS = 2
# Keys of a config.json that do not change what the model computes.
UNJUDGED_KEYS = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
    "quantization_config", "sliding_window", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip
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
    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    check_folder(arguments.merged, arguments.tokenizer, facts)
    report: GivenMergedCheck | MergedCheck
    if arguments.adapter is None:
        report = scored_alone(arguments.merged, facts, pieces, n_conversations=len(documents))
    else:
        check_config(arguments.merged, arguments.checkpoint, facts)
        exact = compared_exactly(arguments)
        report = compared_by_scores(arguments, facts, pieces, exact, n_conversations=len(documents))
    logger.info("measured %s", log.fields(report.model_dump(mode="json")))
    judge(report, settings, arguments)
    report.write(arguments.check)


class ExactResult(NamedTuple):
    """How the merged model's tensors compare with base + adapter."""

    merge_base: MergeBase
    n_tensors: int
    n_adapted_tensors: int
    roundings: Mapping[str, str]
    """Parameter → what was rounded on the way (`exact_merge.TensorResult`)."""

    @property
    def rounding(self) -> str | None:
        """All kinds of `roundings`; None where there are none."""
        return ", ".join(sorted(set(self.roundings.values()))) or None


def compared_exactly(arguments: argparse.Namespace) -> ExactResult:
    """Every tensor against base + adapter.

    Raises:
        StageError: naming the tensors that differ, and what seems to have happened to them.
    """
    import torch

    from workflow_scripts.merge import exact_merge
    from workflow_scripts.merge.live_adapter import LiveAdapter
    from workflow_scripts.merge.tensor_names import part

    base_name = merge_base.chosen(arguments.merge_base)
    live = LiveAdapter(arguments.adapter, arguments.checkpoint)
    base = exact_merge.Files(arguments.checkpoint)
    merged = exact_merge.Files(arguments.merged)

    def reference(name: str) -> Reference:
        dtype = merge_base.nf4_dtype(name, arguments.adapter, arguments.checkpoint)
        return exact_merge.Reference(base, live, dtype)

    expected = reference(base_name)
    difference = exact_merge.layout_difference(expected, merged)
    if difference is not None:
        raise _differs(arguments, difference)
    results = []
    for result in log.progress(
        exact_merge.compare_all(expected, merged, torch.get_num_threads()),
        logger,
        total=len(base.entries),
        unit="tensors",
    ):
        results.append(result)
    wrong = [result for result in results if result.n_wrong]
    if wrong:
        from workflow_scripts.merge.merge_difference import described

        other = None
        if arguments.precision == "nf4":
            other = reference(next(name for name in merge_base.BASES if name != base_name))
        lines = described(wrong, expected, merged, other)
        raise _differs(arguments, f"{len(wrong)} of {len(results)} tensors: " + "; ".join(lines))
    roundings = {part(each.name).parameter: each.rounding for each in results if each.rounding}
    return ExactResult(
        merge_base=base_name,
        n_tensors=len(results),
        n_adapted_tensors=sum(result.rounding is not None for result in results),
        roundings=roundings,
    )


def _differs(arguments: argparse.Namespace, found: str) -> log.StageError:
    return log.StageError(
        "the merged model differs from base + adapter",
        where=arguments.merged,
        found=found,
        expected=f"{arguments.checkpoint} + {arguments.adapter}, each number rounded to the type"
        " it is stored in",
        to_fix="merge again; if it stays, please report it with this message",
    )


def compared_by_scores(
    arguments: argparse.Namespace,
    facts: ModelShape,
    pieces: Sequence[cutting.Piece],
    exact: ExactResult,
    *,
    n_conversations: int,
) -> MergedCheck:
    """Divergences, and the loss next to that of the model as it was trained."""
    from workflow_scripts.merge.live_adapter import LiveAdapter
    from workflow_scripts.scoring.likelihood import paired_difference, score_documents, summarize
    from workflow_scripts.scoring.transformers_model import TransformersModel, measured_precision

    live = LiveAdapter(arguments.adapter, arguments.checkpoint)
    unrounded = summed(arguments, facts, live)
    merged = as_users_get_it(arguments.merged, facts)
    measured = divergences(arguments, facts, live, unrounded, merged, few(pieces), exact.roundings)
    merged_scores = merged.score(pieces)
    if arguments.precision == "native":
        precision = "float32"
        trained_scores = unrounded.score(pieces)
    else:
        precision = measured_precision(arguments.precision)
        trained = TransformersModel(
            arguments.checkpoint,
            window=facts.sliding_window,
            rope=facts.rope_parameters,
            precision=precision,
            adapter=arguments.adapter,
        )
        trained_scores = score_documents(trained, pieces)
    difference, error = paired_difference(merged_scores, trained_scores)
    summary = summarize(merged_scores)
    return MergedCheck(
        n_conversations=n_conversations,
        merge_base=exact.merge_base,
        n_tensors=exact.n_tensors,
        n_adapted_tensors=exact.n_adapted_tensors,
        rounding=exact.rounding,
        n_divergence_tokens=len(measured.merged),
        kl_divergence_from_rounded_nats=float(measured.from_rounded.mean()),
        kl_divergence_nats=float(measured.merged.mean()),
        max_kl_divergence_nats=float(measured.merged.max()),
        rounding_kl_divergence_nats=tuple(float(kl.mean()) for kl in measured.rounded_at_random),
        top1_agreement_fraction=float(measured.agreements.double().mean()),
        n_scored_tokens=summary.n_scored_tokens,
        merged_perplexity=summary.perplexity,
        adapter_precision=precision,
        adapter_perplexity=summarize(trained_scores).perplexity,
        perplexity_increase_fraction=math.expm1(difference),
        loss_difference_nats_per_token=difference,
        loss_difference_standard_error_nats_per_token=error,
    )


class Divergences(NamedTuple):
    """KL divergences of each token, nats."""

    merged: torch.Tensor
    """From the float32 sum to the merged model."""
    from_rounded: torch.Tensor
    """From the rounded sum to the merged model."""
    rounded_at_random: Sequence[torch.Tensor]
    """From the float32 sum to the sum rounded at random, seed by seed."""
    agreements: torch.Tensor
    """Whether float32 sum and merged model have the same likeliest next token."""


def divergences(
    arguments: argparse.Namespace,
    facts: ModelShape,
    live: LiveAdapter,
    exact: StreamedModel,
    merged: StreamedModel,
    pieces: Sequence[cutting.Piece],
    roundings: Mapping[str, str],
) -> Divergences:
    """KL divergence of the merged model from the rounded sum, and from the float32 sum next to what
    rounding at random gives."""
    import torch

    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.model_weights import NearestWeights, RoundedWeights
    from workflow_scripts.scoring.likelihood import divergence
    from workflow_scripts.scoring.streamed_model import batches

    dtypes = stored_dtypes(arguments.merged)
    dtype = dtypes["model.embed_tokens.weight"]
    base_name = merge_base.chosen(arguments.merge_base)
    nf4_dtype = merge_base.nf4_dtype(base_name, arguments.adapter, arguments.checkpoint)
    nearest = NearestWeights(BaseWeights(arguments.checkpoint, nf4_dtype), live, dtypes, roundings)
    expected = summed(arguments, facts, live, lambda _: nearest)
    rounded = [
        summed(arguments, facts, live, partial(RoundedWeights, dtype=dtype, seed=seed))
        for seed in range(N_ROUNDINGS)
    ]
    found: list[list[torch.Tensor]] = [[] for _ in range(1 + N_ROUNDINGS)]
    from_rounded, agreements = [], []
    for batch in batches(pieces):
        reference, of_merged = torch.cat(exact.logits(batch)), torch.cat(merged.logits(batch))
        from_rounded.append(divergence(torch.cat(expected.logits(batch)), of_merged)[0])
        kl, agrees = divergence(reference, of_merged)
        agreements.append(agrees)
        found[0].append(kl)
        for model, kls in zip(rounded, found[1:], strict=True):
            kls.append(divergence(reference, torch.cat(model.logits(batch)))[0])
    of_merged_sum, *of_roundings = (torch.cat(kls) for kls in found)
    return Divergences(of_merged_sum, torch.cat(from_rounded), of_roundings, torch.cat(agreements))


def few(pieces: Sequence[cutting.Piece]) -> list[cutting.Piece]:
    """The first pieces, up to `DIVERGENCE_TOKENS`; one at least."""
    totals = itertools.accumulate(len(piece.input_ids) for piece in pieces)
    n_pieces = sum(total <= DIVERGENCE_TOKENS for total in totals)
    return list(pieces[: max(1, n_pieces)])


def summed(
    arguments: argparse.Namespace,
    facts: ModelShape,
    live: LiveAdapter,
    changed: Callable[[LiveWeights], Mapping[str, torch.Tensor]] | None = None,
) -> StreamedModel:
    """base + adapter in float32, never rounded.

    Args:
        changed: what else is done to its weights, a function of them.
    """
    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.model_weights import LiveWeights
    from workflow_scripts.scoring.streamed_model import StreamedModel

    base_name = merge_base.chosen(arguments.merge_base)
    nf4_dtype = merge_base.nf4_dtype(base_name, arguments.adapter, arguments.checkpoint)
    weights = LiveWeights(BaseWeights(arguments.checkpoint, nf4_dtype), live)
    embeddings = live.whole.get("model.embed_tokens.weight")
    return StreamedModel(
        arguments.checkpoint,
        weights if changed is None else changed(weights),
        window=facts.sliding_window,
        rope=facts.rope_parameters,
        vocabulary_size=None if embeddings is None else len(embeddings),
    )


def as_users_get_it(merged: Path, facts: ModelShape) -> StreamedModel:
    """In float32, by its own config.json but for the window: the positions there are what its users
    get."""
    from workflow_scripts.merge.base_weights import BaseWeights
    from workflow_scripts.merge.model_weights import Weights
    from workflow_scripts.scoring.streamed_model import StreamedModel

    return StreamedModel(merged, Weights(BaseWeights(merged)), window=facts.sliding_window)


def stored_dtypes(merged: Path) -> dict[str, torch.dtype]:
    """Type of each parameter in the merged folder's files."""
    from workflow_scripts.merge import exact_merge, safetensors_stream
    from workflow_scripts.merge.tensor_names import part

    entries = exact_merge.Files(merged).entries
    return {
        part(name).parameter: safetensors_stream.DTYPES[entry["dtype"]]
        for name, entry in entries.items()
    }


def scored_alone(
    merged: Path, facts: ModelShape, pieces: Sequence[cutting.Piece], *, n_conversations: int
) -> GivenMergedCheck:
    """A model that was merged elsewhere: there is no adapter to compare it with."""
    from workflow_scripts.scoring.likelihood import summarize

    scores: dict[int, np.ndarray] = as_users_get_it(merged, facts).score(pieces)
    summary = summarize(scores)
    return GivenMergedCheck(
        n_conversations=n_conversations,
        n_scored_tokens=summary.n_scored_tokens,
        merged_perplexity=summary.perplexity,
    )


def judge(
    report: GivenMergedCheck | MergedCheck,
    settings: MergeGateSettings,
    arguments: argparse.Namespace,
) -> None:
    """
    Raises:
        StageError: a figure is beyond its gate; so is NaN, which compares as false.
    """
    if not math.isfinite(report.merged_perplexity):
        raise log.StageError(
            "the merged model computes no numbers",
            where=arguments.merged,
            found=f"perplexity {report.merged_perplexity}",
            expected="a finite one",
        )
    if isinstance(report, GivenMergedCheck):
        return
    limit = max(ROUNDED_SHARE * min(report.rounding_kl_divergence_nats), ARITHMETIC_NATS)
    if not report.kl_divergence_from_rounded_nats <= limit:
        raise log.StageError(
            "the merged model computes something else than base + adapter",
            where=f"{arguments.merged}, mean over {report.n_divergence_tokens} tokens",
            found=f"KL divergence {report.kl_divergence_from_rounded_nats:.3g} nats a token from"
            " the rounded sum, though each weight is right",
            expected=f"at most {limit:.3g}",
            to_fix="compare the folder's config.json with the base's; if they agree, please"
            " report it",
        )
    error = report.loss_difference_standard_error_nats_per_token or 0.0
    limit = math.log1p(settings.perplexity_increase_fraction)
    if not report.loss_difference_nats_per_token - STANDARD_ERRORS * error <= limit:
        raise log.StageError(
            "the merged model is worse than the adapter it was made of",
            where=f"{arguments.merged}, {report.n_conversations} validation conversations",
            found=f"perplexity {report.merged_perplexity:.4f} against"
            f" {report.adapter_perplexity:.4f} of {TRAINED_AS[arguments.precision]}:"
            f" {report.perplexity_increase_fraction:.2%} more, with a standard error of"
            f" {error:.2%}",
            expected=f"at most {settings.perplexity_increase_fraction:.1%} more"
            " (evaluation.gates.merge.perplexity_increase_fraction), two standard errors aside",
            to_fix="set runs.<name>.merge_base: auto (a run trained in 4 bits), train longer, or"
            " raise the gate if you accept the loss",
        )


def check_config(merged: Path, checkpoint: Path, facts: ModelShape) -> None:
    """The merged model's config.json says what the base's says, and the positions of the facts.

    Raises:
        StageError: a key that changes what the model computes has another value.
    """
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(merged).to_dict()
    expected = AutoConfig.from_pretrained(checkpoint).to_dict()
    unjudged = set(UNJUDGED_KEYS)
    if facts.rope_scaling:
        expected["rope_parameters"] = facts.rope_parameters
        unjudged |= {"max_position_embeddings", "head_dim"}
    for key in sorted(expected.keys() - unjudged):
        if found.get(key) != expected[key]:
            raise log.StageError(
                "the merged model's config differs from its base's",
                where=f"{merged / 'config.json'}, {key}",
                found=found.get(key),
                expected=expected[key],
                to_fix="merge again",
            )


def check_folder(merged: Path, tokenizer: Path, facts: ModelShape) -> None:
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
    if window != facts.sliding_window:
        raise log.StageError(
            "the merged folder loads with another sliding window",
            where=f"{merged / 'config.json'}, sliding_window",
            found=window,
            expected=facts.sliding_window,
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


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
