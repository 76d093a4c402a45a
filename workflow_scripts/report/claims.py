"""Figures that others publish for tuned Mistrals, each beside what was measured, or computed, here.

None of them is ours. The first four are what the seeds of this project claimed for a tuned recipe;
the others are common lore of Mistral 7B and the figures of its paper (arXiv:2310.06825, table 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.tasks import TaskScore
from workflow_scripts.release.plan_disk import BITS_PER_WEIGHT
from workflow_scripts.report.context_table import effective
from workflow_scripts.report.results import RunResults, Tasks
from workflow_scripts.report.tables import with_error
from workflow_scripts.report.task_table import shown
from workflow_scripts.report.verdicts import STANDARD_ERRORS, paired

MEASURED, COMPUTED, NOT_MEASURED = "measured", "computed from shapes", "not measured here"
# Mistral 7B v0.3, of its config.json: what read_model_facts would say.
MISTRAL_7B = ModelShape(
    architecture="MistralForCausalLM",
    model_type="mistral",
    n_layers=32,
    hidden_size=4096,
    intermediate_size=14_336,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    vocabulary_size=32_768,
    context_tokens=32_768,
    sliding_window=None,
    layer_windows=(None,) * 32,
    rope_theta=1e6,
    rope_parameters={},
    n_experts=None,
    n_experts_per_token=None,
    ties_embeddings=False,
    dtype="bfloat16",
)
N_WEIGHTS_7B = 7_248_023_552
ROW_TOKENS = 2_048


class PublishedTask(NamedTuple):
    """A score of the base model in the paper, and how it was taken there."""

    title: str
    task: str
    """Of lm-evaluation-harness, as is `metric`."""
    metric: str
    percent: float
    n_examples: int
    n_documents: int
    """Of the split that the harness asks: all of them."""


PUBLISHED_TASKS = (
    PublishedTask("MMLU", "mmlu", "acc", 60.1, 5, 14_042),
    PublishedTask("HellaSwag", "hellaswag", "acc_norm", 81.3, 0, 10_042),
    PublishedTask("ARC-Challenge", "arc_challenge", "acc_norm", 55.5, 0, 1_172),
)
# The paper's, and all that are called so; instruct models have other scores.
PUBLISHED_BASE, BASES_7B = "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0."


@dataclass(frozen=True)
class Claim:
    """A published figure, and what there is to say of it here."""

    what: str
    published: str
    here: str
    kind: str
    """`MEASURED`, `COMPUTED` or `NOT_MEASURED`."""
    verdict: str


def claims(runs: Sequence[RunResults]) -> list[Claim]:
    """All of them; those on a tuned recipe compare the last run with the first."""
    return [
        *tuned(runs),
        usable_context(runs[-1]),
        *computed(),
        Claim("7B, training on 5k–50k examples", "1–3 h", "–", NOT_MEASURED, "wants a GPU"),
        *(published_task(task, runs) for task in PUBLISHED_TASKS),
    ]


def tuned(runs: Sequence[RunResults]) -> list[Claim]:
    """The tuned recipe against the generic one."""
    first, last = runs[0], runs[-1]
    is_pair = first is not last and all(
        getattr(first.settings, key) == getattr(last.settings, key) for key in ("model", "dataset")
    )
    wanted: list[tuple[str, str, Callable[[], tuple[str, str]]]] = [
        ("perplexity", "12 % lower", lambda: _perplexity(first, last)),
        ("latency of a token", "22 % lower", lambda: _latency(first, last)),
        ("memory of training", "23 % less", lambda: _memory(first, last)),
    ]
    found = []
    for what, published, measure in wanted:
        if not is_pair or (what == "memory of training" and not (first.manifest and last.manifest)):
            said, kind, verdict = "–", NOT_MEASURED, "needs two trained runs of one model and data"
        else:
            said, verdict = measure()
            kind = MEASURED
            said = f"{said}, {last.name} against {first.name} on {last.settings.model}"
        found.append(Claim(f"Tuned recipe: {what}", published, said, kind, verdict))
    return found


def _perplexity(first: RunResults, last: RunResults) -> tuple[str, str]:
    difference = paired(last.link("merged"), first.link("merged"))
    ratio = math.exp(difference.mean)
    error = difference.standard_error
    shown = with_error(100 * (ratio - 1), error and 100 * ratio * error, digits=1)
    shown = shown if ratio < 1 else f"+{shown}"
    if error is None or abs(difference.mean) <= STANDARD_ERRORS * error:
        return f"{shown} %", "no significant difference"
    low, high = (100 * (1 - math.exp(difference.mean + sign * STANDARD_ERRORS * error))
                 for sign in (1, -1))  # fmt: skip
    if low <= 12 <= high:
        return f"{shown} %", "agrees within its error"
    return f"{shown} %", "differs by more than its error"


def _latency(first: RunResults, last: RunResults) -> tuple[str, str]:
    name = last.smallest.name
    speeds = [run.link(name).speed for run in (first, last)]
    assert speeds[0] and speeds[1]
    one, other = (speed.decode_milliseconds_per_token for speed in speeds if speed)
    shown = f"{100 * (other / one - 1):+.1f} % decoding {name}"
    return shown, "not due to the recipe: both files have the same shape"


def _memory(first: RunResults, last: RunResults) -> tuple[str, str]:
    assert first.manifest and last.manifest
    one, other = (run.peak_memory_bytes for run in (first.manifest, last.manifest))
    change = 100 * (other / one - 1)
    verdict = "less, but not as much" if -23 < change < -1 else "no such saving"
    return f"{change:+.1f} %", "as much or more" if change <= -23 else verdict


def usable_context(run: RunResults) -> Claim:
    """Of the smallest file of a run whose usable context was measured."""
    what, published = "Tuned recipe: usable context", "30k of 32k tokens"
    link = next((link for link in reversed(run.links) if link.context is not None), None)
    if link is None:
        why = "evaluation.context.use measures it; it wants a 7B on a GPU"
        return Claim(what, published, "–", NOT_MEASURED, why)
    report = link.context
    assert report is not None
    said = f"{effective(report, 'ruler')}, {run.name}’s {link.name} on {run.settings.model}"
    if not report.is_measurable:
        verdict = "this model answers nothing even in the shortest prompts"
    else:
        share = (report.effective_tokens_ruler or 0) / report.context_tokens
        verdict = f"{share:.0%} of what is advertised, where {30 / 32:.0%} was published"
    return Claim(what, published, said, MEASURED, verdict)


def computed() -> list[Claim]:
    """Of a 7B, from its shape alone."""
    found = []
    methods: tuple[tuple[Literal["qlora", "lora"], str, int, int], ...] = (
        ("qlora", "8–10 GB", 8, 10),
        ("lora", "16–18 GB", 16, 18),
    )
    for method, published, low, high in methods:
        gigabytes = smallest_training_bytes(method) / 1e9
        fits = low <= round(gigabytes) <= high
        found.append(
            Claim(
                f"7B, {'QLoRA' if method == 'qlora' else 'LoRA in 16 bits'}: memory of training",
                published,
                f"{gigabytes:.1f} GB: rank 16, rows of {ROW_TOKENS:,} tokens, all layers"
                " recomputed",
                COMPUTED,
                "agrees" if fits else "differs: it depends on rank, rows and recomputation",
            )
        )
    for name, size in (("Q4_K_M", 4.4), ("Q8_0", 7.7)):
        gigabytes = BITS_PER_WEIGHT[name] * N_WEIGHTS_7B / 8 / 1e9
        verdict = "agrees" if abs(gigabytes / size - 1) < 0.03 else "differs"
        found.append(
            Claim(f"7B, {name}: size", f"{size} GB", f"{gigabytes:.1f} GB", COMPUTED, verdict)
        )
    return found


def smallest_training_bytes(method: Literal["qlora", "lora"]) -> int:
    """Peak memory of training a 7B on a GPU with the layout that takes least, by plan_memory."""
    from workflow_scripts.settings import RecipeSettings, TrainingSettings
    from workflow_scripts.train.memory.layouts import candidates
    from workflow_scripts.train.memory.shape import PlannedRun

    recipe = RecipeSettings(method=method, rank=16, alpha=32, rows_per_step=1)
    training = TrainingSettings(rows_per_micro_batch=1, offload_activations=False)
    run = PlannedRun(
        MISTRAL_7B, recipe, training, row_tokens=ROW_TOKENS, device_type="cuda", n_gpus=1
    )
    return min(candidate.peak for candidate in candidates(run))


def published_task(published: PublishedTask, runs: Sequence[RunResults]) -> Claim:
    """A score of the paper beside the base's, where a Mistral 7B was asked the same task."""
    what = f"7B base, {published.title} ({published.n_examples}-shot)"
    figure = f"{published.percent:.1f}"
    found = next(_scores_of_7b(published, runs), None)
    if found is None:
        why = "evaluation.tasks.use measures it, of a base Mistral 7B; it wants a GPU"
        return Claim(what, figure, "–", NOT_MEASURED, why)
    run, of_kind, score = found
    said = (
        f"{shown(score)}, {score.n_examples}-shot, {score.n_documents:,} documents,"
        f" base of {run.name} ({run.chain.hub_id})"
    )
    return Claim(what, figure, said, MEASURED, _verdict(published, run, of_kind, score))


def _scores_of_7b(
    published: PublishedTask, runs: Sequence[RunResults]
) -> Iterator[tuple[RunResults, Tasks, TaskScore]]:
    """Those of the paper's own version first."""
    of_7b = [run for run in runs if (run.chain.hub_id or "").startswith(BASES_7B)]
    for run in sorted(of_7b, key=lambda run: run.chain.hub_id != PUBLISHED_BASE):
        for of_kind in run.link("base").tasks.values():
            for score in of_kind.scores:
                if (score.task, score.metric) == (published.task, published.metric):
                    yield run, of_kind, score


def _verdict(published: PublishedTask, run: RunResults, of_kind: Tasks, score: TaskScore) -> str:
    """Whether it is the published figure; what was asked in another way is not held against it."""
    others = []
    if run.chain.hub_id != PUBLISHED_BASE:
        others.append(f"published of {PUBLISHED_BASE.partition('/')[2]}")
    if score.n_examples != published.n_examples:
        others.append(
            f"{published.n_examples} examples there: names: [{published.task}@"
            f"{published.n_examples}]"
        )
    if score.n_documents != published.n_documents:
        others.append(f"{published.n_documents:,} documents there")
    if of_kind.are_chats:
        others.append("as chats here")
    if score.n_truncated:
        others.append(f"{score.n_truncated:,} prompts were cut here")
    if others:
        return f"not the same test: {'; '.join(others)}"
    difference = 100 * score.score - published.percent
    error = score.standard_error
    if error is not None and abs(difference) <= STANDARD_ERRORS * 100 * error:
        return "agrees within its error"
    return f"{abs(difference):.1f} points {'lower' if difference < 0 else 'higher'}"
