"""Every figure that was measured of a run, with its unit, its error, and the place it stands in.

A metric is read, never computed: `file` and `key` lead to the number itself, and a test follows
each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from workflow_scripts import files


@dataclass(frozen=True)
class Metric:
    """One number."""

    run: str
    link: str
    """State of the chain it is of; empty: of the run as a whole."""
    name: str
    value: float
    unit: str
    error: float | None
    error_is: str | None
    """`standard error` or `standard deviation`."""
    n: int | None
    """What it is a mean of, where that is one."""
    file: str
    """Below the folder of results."""
    key: str
    """In the file's JSON; dots go into objects."""


class Source(NamedTuple):
    """Where a metric stands in a file."""

    name: str
    key: str
    unit: str
    error_key: str | None = None
    error_is: str | None = None
    n_key: str | None = None


STANDARD_ERROR, STANDARD_DEVIATION = "standard error", "standard deviation"
N_TOKENS = "n_scored_tokens"
SCORES = (
    Source("loss", "loss_nats_per_token", "nats/token", "loss_standard_error_nats_per_token",
           STANDARD_ERROR, N_TOKENS),
    Source("perplexity", "perplexity", "", n_key=N_TOKENS),
    Source("full-length loss", "full_length_loss_nats_per_token", "nats/token",
           "full_length_loss_standard_error_nats_per_token", STANDARD_ERROR, N_TOKENS),
    Source("full-length perplexity", "full_length_perplexity", "", n_key=N_TOKENS),
)  # fmt: skip
SPEED = (
    Source("prompt time", "prompt_milliseconds_per_token", "ms/token",
           "prompt_standard_deviation_milliseconds_per_token", STANDARD_DEVIATION, "n_repetitions"),
    Source("decode time", "decode_milliseconds_per_token", "ms/token",
           "decode_standard_deviation_milliseconds_per_token", STANDARD_DEVIATION, "n_repetitions"),
    Source("time to first token", "first_token_milliseconds", "ms",
           "first_token_standard_deviation_milliseconds", STANDARD_DEVIATION, "n_repetitions"),
    Source("peak memory", "peak_memory_bytes", "bytes"),
    Source("size", "size_bytes", "bytes"),
)  # fmt: skip
DIVERGENCE = (
    Source("KL divergence to F16", "kl_divergence_nats", "nats/token",
           "kl_divergence_standard_error_nats", STANDARD_ERROR, N_TOKENS),
    Source("top-1 agreement with F16", "top1_agreement_fraction", "",
           "top1_agreement_standard_error_fraction", STANDARD_ERROR, N_TOKENS),
)  # fmt: skip
TRAINING = (
    Source("steps of training", "n_steps", ""),
    Source("trainable parameters", "n_trainable_parameters", ""),
    Source("training speed", "tokens_per_second", "tokens/s"),
    Source("duration of training", "duration_seconds", "s"),
    Source("memory of training, measured", "peak_memory_bytes", "bytes"),
    Source("memory of training, predicted", "predicted_peak_memory_bytes", "bytes"),
    Source("final training loss", "final_loss_nats_per_token", "nats/token"),
)
MERGED_GATE = (
    Source("merged gate: KL divergence", "kl_divergence_nats", "nats/token", n_key=N_TOKENS),
    Source("merged gate: perplexity increase", "perplexity_increase_fraction", ""),
)
GGUF_GATE = (
    Source("GGUF gate: KL divergence", "kl_divergence_nats", "nats/token", n_key=N_TOKENS),
    Source("GGUF gate: top-1 agreement", "top1_agreement_fraction", ""),
)
PACKING = (
    Source("fill of the rows", "fill_fraction", ""),
    Source("rows", "n_rows", ""),
    Source("training documents", "n_documents", ""),
)
SHAPE = (
    Source("context", "context_tokens", "tokens"),
    Source("sliding window", "sliding_window", "tokens"),
)


def metrics_of(
    run: str,
    settings: dict[str, Any],
    gguf_types: Sequence[str],
    results: Path,
    *,
    has_awq: bool = False,
) -> list[Metric]:
    """Of one run, from the base's scores to the last file's.

    Args:
        settings: of `runs.<name>`.
        results: the folder `results/`.
        has_awq: the merged model was quantized to AWQ too.
    Raises:
        StageError: a file that the run must have is missing.
    """
    return [
        metric
        for link, file, sources in _places(run, settings, gguf_types)
        for metric in _read(run, link, file, sources, results)
    ] + (
        list(_read(run, "AWQ", f"runs/{run}/evaluation/awq.json", SCORES, results))
        if has_awq
        else []
    )


def _places(
    run: str, settings: dict[str, Any], gguf_types: Sequence[str]
) -> Iterator[tuple[str, str, Sequence[Source]]]:
    """Link, file and what stands in it."""
    model, dataset = settings["model"], settings["dataset"]
    folder = f"runs/{run}"
    yield "", f"models/{model}/facts.json", SHAPE
    if settings["packing"]:
        yield "", f"data/{dataset}/{model}/{settings['packing']}/packing_report.json", PACKING
    if settings["recipe"]:
        yield "", f"{folder}/adapter/training_manifest.json", TRAINING
    yield "", f"{folder}/merged_check.json", MERGED_GATE
    yield "", f"{folder}/gguf_check.json", GGUF_GATE
    yield "base", f"evaluation/{model}/{dataset}/base.json", SCORES
    yield "base NF4", f"evaluation/{model}/{dataset}/base-nf4.json", SCORES
    adapter = () if settings["merged"] else ("adapter",)
    for link in (*adapter, "merged", *gguf_types):
        yield link, f"{folder}/evaluation/{link}.json", SCORES
        yield link, f"{folder}/evaluation/{link}.inference.json", SPEED
        if link in gguf_types and link != "F16":
            yield link, f"{folder}/evaluation/{link}.divergence.json", DIVERGENCE


def _read(
    run: str, link: str, file: str, sources: Sequence[Source], results: Path
) -> Iterator[Metric]:
    """The metrics of a file; what it has not, or has as null, was not measured."""
    content = files.read_json(results / file)
    for source in sources:
        value = content.get(source.key)
        if value is None:
            continue
        error = content.get(source.error_key) if source.error_key else None
        n = content.get(source.n_key) if source.n_key else None
        kind = source.error_is if error is not None else None
        yield Metric(run, link, source.name, value, source.unit, error, kind, n, file, source.key)
