"""Figures that others publish for tuned Mistrals, each beside what was measured, or computed, here.

None of them is ours. The first four are what the seeds of this project claimed for a tuned recipe;
the others are common lore of Mistral 7B and the figures of its paper (arXiv:2310.06825, table 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from workflow_scripts.export.plan_disk import BITS_PER_WEIGHT
from workflow_scripts.report.report_context import effective
from workflow_scripts.report.results import RunResults
from workflow_scripts.report.tables import with_error
from workflow_scripts.report.verdicts import STANDARD_ERRORS, paired

MEASURED, COMPUTED, NOT_MEASURED = "measured", "computed from shapes", "not measured here"
# Mistral 7B v0.3, of its config.json: what read_model_facts would say.
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral", "n_layers": 32, "hidden_size": 4096, "intermediate_size": 14_336,
    "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "vocabulary_size": 32_768,
    "context_tokens": 32_768, "sliding_window": None, "layer_windows": [None] * 32,
    "rope_theta": 1e6, "rope_parameters": {}, "n_experts": None, "n_experts_per_token": None,
    "ties_embeddings": False, "dtype": "bfloat16", "tokenizer_version": "v3",
}  # fmt: skip
N_WEIGHTS_7B = 7_248_023_552
ROW_TOKENS = 2_048


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
    return [*tuned(runs), usable_context(runs[-1]), *computed(), *unmeasured()]


def tuned(runs: Sequence[RunResults]) -> list[Claim]:
    """The tuned recipe against the generic one."""
    first, last = runs[0], runs[-1]
    is_pair = first is not last and all(
        first.settings[key] == last.settings[key] for key in ("model", "dataset")
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
            said = f"{said}, {last.name} against {first.name} on {last.settings['model']}"
        found.append(Claim(f"Tuned recipe: {what}", published, said, kind, verdict))
    return found


def _perplexity(first: RunResults, last: RunResults) -> tuple[str, str]:
    difference = paired(last.link("merged"), first.link("merged"))
    ratio = math.exp(difference.mean)
    error = difference.standard_error
    shown = with_error(100 * (ratio - 1), error and 100 * ratio * error, digits=1)
    if error is None or abs(difference.mean) <= STANDARD_ERRORS * error:
        return f"{shown} %", "no difference is shown"
    low, high = (100 * (1 - math.exp(difference.mean + sign * STANDARD_ERRORS * error))
                 for sign in (1, -1))  # fmt: skip
    if low <= 12 <= high:
        return f"{shown} %", "agrees within its error"
    return f"{shown} %", "differs by more than its error"


def _latency(first: RunResults, last: RunResults) -> tuple[str, str]:
    name = last.links[-1].name
    speeds = [run.link(name).speed for run in (first, last)]
    assert speeds[0] and speeds[1]
    one, other = (speed["decode_milliseconds_per_token"] for speed in speeds)
    errors = [speed["decode_standard_deviation_milliseconds_per_token"] for speed in speeds]
    shown = f"{100 * (other / one - 1):+.1f} % decoding {name}"
    if None in errors:
        return shown, "with one repetition no error is known"
    error = math.hypot(errors[0], errors[1])
    if abs(other - one) <= STANDARD_ERRORS * error:
        return shown, "no difference is shown: both files have the same shape"
    return shown, "a difference beyond that of repetitions; both files have the same shape"


def _memory(first: RunResults, last: RunResults) -> tuple[str, str]:
    assert first.manifest and last.manifest
    one, other = (run.manifest["peak_memory_bytes"] for run in (first, last))
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
    said = f"{effective(report, 'ruler')}, {run.name}’s {link.name} on {run.settings['model']}"
    if not report["is_measurable"]:
        verdict = "this model answers nothing even in the shortest prompts"
    else:
        share = report["effective_tokens_ruler"] / report["advertised_tokens"]
        verdict = f"{share:.0%} of what is advertised, where {30 / 32:.0%} was published"
    return Claim(what, published, said, MEASURED, verdict)


def computed() -> list[Claim]:
    """Of a 7B, from its shape alone."""
    found = []
    for method, published, low, high in (("qlora", "8–10 GB", 8, 10), ("lora", "16–18 GB", 16, 18)):
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
    for name, published in (("Q4_K_M", 4.4), ("Q8_0", 7.7)):
        gigabytes = BITS_PER_WEIGHT[name] * N_WEIGHTS_7B / 8 / 1e9
        verdict = "agrees" if abs(gigabytes / published - 1) < 0.03 else "differs"
        found.append(
            Claim(f"7B, {name}: size", f"{published} GB", f"{gigabytes:.1f} GB", COMPUTED, verdict)
        )
    return found


def smallest_training_bytes(method: str) -> int:
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


def unmeasured() -> list[Claim]:
    """What wants a GPU, or a benchmark that is not run here."""
    return [
        Claim(what, published, "–", NOT_MEASURED, why)
        for what, published, why in (
            ("7B, training on 5k–50k examples", "1–3 h", "wants a GPU"),
            ("7B base, MMLU (5-shot)", "60.1", "wants lm-evaluation-harness and a GPU"),
            ("7B base, HellaSwag", "81.3", "wants lm-evaluation-harness and a GPU"),
            ("7B base, ARC-Challenge", "55.5", "wants lm-evaluation-harness and a GPU"),
        )
    ]
