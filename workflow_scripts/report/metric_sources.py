"""Every measured figure of a run, with its unit, its error and its place in a file.

A metric is read, never computed: `file` and `key` lead to the number itself, and a test follows
each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from workflow_scripts import files
from workflow_scripts.handover.chain import Chain
from workflow_scripts.handover.metrics import Metric
from workflow_scripts.report.results import NOTHING_ASKED, Asked, tasks
from workflow_scripts.report.task_table import name_of


class Found(NamedTuple):
    """A metric with its name."""

    link: str
    """Link that was measured; `run` for the run as a whole."""
    name: str
    metric: Metric


class Source(NamedTuple):
    """Place of a metric in a file."""

    name: str
    key: str
    unit: str
    error_key: str | None = None
    error_is: ErrorKind | None = None
    n_key: str | None = None


ErrorKind = Literal["standard error", "standard deviation"]
STANDARD_ERROR: ErrorKind = "standard error"
STANDARD_DEVIATION: ErrorKind = "standard deviation"
N_TOKENS = "n_scored_tokens"
SCORES = (
    Source("loss", "loss_nats_per_token", "nats/token", "loss_standard_error_nats_per_token",
           STANDARD_ERROR, N_TOKENS),
    Source("perplexity", "perplexity", "", n_key=N_TOKENS),
    Source("full-length loss", "full_length_loss_nats_per_token", "nats/token",
           "full_length_loss_standard_error_nats_per_token", STANDARD_ERROR, N_TOKENS),
    Source("full-length perplexity", "full_length_perplexity", "", n_key=N_TOKENS),
)  # fmt: skip
TEXT = SCORES[:2]
SIZE = Source("size", "size_bytes", "bytes")
SPEED = (
    Source("prompt time", "prompt_milliseconds_per_token", "ms/token",
           "prompt_standard_deviation_milliseconds_per_token", STANDARD_DEVIATION, "n_repetitions"),
    Source("decode time", "decode_milliseconds_per_token", "ms/token",
           "decode_standard_deviation_milliseconds_per_token", STANDARD_DEVIATION, "n_repetitions"),
    Source("time to first token", "first_token_milliseconds", "ms",
           "first_token_standard_deviation_milliseconds", STANDARD_DEVIATION, "n_repetitions"),
    Source("peak memory", "peak_memory_bytes", "bytes"),
    SIZE,
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
N_PROMPTS = "n_prompts"
CONTEXT = (
    Source("effective context, RULER", "effective_tokens_ruler", "tokens", n_key=N_PROMPTS),
    Source("effective context, RULER, 2.5 %", "effective_tokens_ruler_low", "tokens"),
    Source("effective context, RULER, 97.5 %", "effective_tokens_ruler_high", "tokens"),
    Source("effective context, NoLiMa", "effective_tokens_nolima", "tokens", n_key=N_PROMPTS),
    Source("effective context, NoLiMa, 2.5 %", "effective_tokens_nolima_low", "tokens"),
    Source("effective context, NoLiMa, 97.5 %", "effective_tokens_nolima_high", "tokens"),
    Source("gain of long context", "long_gain_nats_per_token", "nats/token",
           "long_gain_standard_error_nats_per_token", STANDARD_ERROR, "n_long_tokens"),
)  # fmt: skip
SHAPE = (
    Source("context", "context_tokens", "tokens"),
    Source("sliding window", "sliding_window", "tokens"),
)


def metrics_of(chain: Chain, asked: Asked = NOTHING_ASKED) -> dict[str, dict[str, Metric]]:
    """Metrics of a run by link and name, from the base to the last file.

    Metrics of the run as a whole are under `run`.

    Args:
        chain: the paths of the run's files.
    Raises:
        StageError: a file that the run must have is missing.
    """
    found = [one for place in _places(chain, asked) for one in _read(place)]
    by_link: dict[str, dict[str, Metric]] = {}
    for link, name, metric in [*found, *_read_tasks(chain, asked)]:
        by_link.setdefault(link, {})[name] = metric
    return by_link


def measured_files(chain: Chain, asked: Asked = NOTHING_ASKED) -> list[str]:
    """The files that `metrics_of` reads."""
    of_tasks = [file for link in chain.links for file in asked.tasks_of(link).values()]
    return [*(place.file for place in _places(chain, asked)), *of_tasks]


class Place(NamedTuple):
    """A file of a link, with the metrics that it contains."""

    link: str
    """Link that was measured; `run` for the run as a whole."""
    file: str
    sources: Sequence[Source]
    prefix: str = ""
    """Beginning of the metrics' names: the name of the text."""


def _places(chain: Chain, asked: Asked) -> Iterator[Place]:
    of_run: tuple[tuple[str | None, Sequence[Source]], ...] = (
        (chain.facts, SHAPE),
        (chain.packing_report, PACKING),
        (chain.training_manifest, TRAINING),
        (chain.merged_check, MERGED_GATE),
        (chain.gguf_check, GGUF_GATE),
    )
    yield from (Place("run", file, sources) for file, sources in of_run if file)
    for link in chain.links:
        # Without a speed, the size is read from the scores.
        scores = SCORES if link.speed else (*SCORES, SIZE)
        yield Place(link.title, link.scores, scores)
        if link.speed:
            yield Place(link.title, link.speed, SPEED)
        if link.divergence:
            yield Place(link.title, link.divergence, DIVERGENCE)
        for text, file in link.texts.items():
            yield Place(link.title, file, TEXT, f"{text}: ")
        if context := asked.context_of(link):
            yield Place(link.title, context, CONTEXT)


def _read(place: Place) -> Iterator[Found]:
    """The metrics of a file. A key that is missing or null was not measured."""
    content = files.read_json(Path(place.file))
    for source in place.sources:
        value = content.get(source.key)
        if value is None:
            continue
        error = content.get(source.error_key) if source.error_key else None
        metric = Metric(
            value=value,
            unit=source.unit,
            error=error,
            error_is=source.error_is if error is not None else None,
            n=content.get(source.n_key) if source.n_key else None,
            file=place.file,
            key=source.key,
        )
        yield Found(place.link, place.prefix + source.name, metric)


def _read_tasks(chain: Chain, asked: Asked) -> Iterator[Found]:
    """Scores of every task and metric, with the ends of their intervals if known."""
    for link in chain.links:
        for kind, file in asked.tasks_of(link).items():
            for number, score in enumerate(tasks(Path(file), kind).scores):
                for end, key, value, error in (
                    ("", "score", score.score, score.standard_error),
                    (", 2.5 %", "low", score.low, None),
                    (", 97.5 %", "high", score.high, None),
                ):
                    if value is None:
                        continue
                    metric = Metric(
                        value=value,
                        unit="",
                        error=error,
                        error_is=STANDARD_ERROR if error is not None else None,
                        n=score.n_documents,
                        file=file,
                        key=f"scores.{number}.{key}",
                    )
                    yield Found(link.title, name_of(score, kind) + end, metric)
