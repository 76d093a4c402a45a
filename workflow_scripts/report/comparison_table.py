"""Table of the runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from workflow_scripts.handover.gates import MergeBase
from workflow_scripts.handover.speed import Phase, Speed
from workflow_scripts.report.context_table import effective
from workflow_scripts.report.results import RunResults
from workflow_scripts.report.tables import Table, mebibytes, perplexity, signed, with_error
from workflow_scripts.report.task_table import NONE_ASKED, is_share, name_of, shown


def comparison(runs: Sequence[RunResults]) -> Table:
    """One row per figure, one column per run."""
    smallest = runs[0].smallest.name
    figures: dict[str, Callable[[RunResults], str]] = {
        "Perplexity, base": lambda run: perplexity(run.link("base").scores),
        "Perplexity, merged": lambda run: perplexity(run.link("merged").scores),
        f"Perplexity, {smallest}": lambda run: perplexity(run.link(smallest).scores),
        **texts(runs, smallest),
        "Change from the base": lambda run: change(run, "merged"),
        f"Prompt, {smallest}, ms/token": lambda run: per_token(run, smallest, "prompt"),
        f"Decode, {smallest}, ms/token": lambda run: per_token(run, smallest, "decode"),
        f"File, {smallest}": lambda run: mebibytes(run.link(smallest).scores.size_bytes),
        f"Memory of inference, {smallest}": lambda run: mebibytes(
            speed_of(run, smallest).peak_memory_bytes
        ),
        "Memory of training, predicted": lambda run: mebibytes(
            trained(run, "predicted_peak_memory_bytes")
        ),
        "Memory of training, measured": lambda run: mebibytes(trained(run, "peak_memory_bytes")),
        "Training, tokens/s": lambda run: count(trained(run, "tokens_per_second")),
        "Training, steps": lambda run: count(trained(run, "n_steps")),
        "Trainable parameters": lambda run: count(trained(run, "n_trainable_parameters")),
        "Context, transformers": lambda run: f"{run.facts.context_tokens:,}",
        "Context, GGUF": lambda run: f"{run.facts.served_context_tokens:,}",
        **usable(runs[0]),
        **tasks(runs),
    }
    if any(run.merge_base for run in runs):
        figures |= {
            "Merged into": merged_into,
            "Validation, live adapter: perplexity": lambda run: (
                f"{run.merge_base.adapter_perplexity:.4f}" if run.merge_base else ""
            ),
            "Validation, merged into the original: perplexity, KL": lambda run: candidate(
                run, "original"
            ),
            "Validation, merged into the dequantized: perplexity, KL": lambda run: candidate(
                run, "dequantized"
            ),
        }
    scores = runs[0].link("merged").scores
    return Table(
        title="Runs compared",
        note=(
            "Lower perplexity is better. It is measured on the test split:"
            f" {scores.n_conversations} conversation{'s' * (scores.n_conversations != 1)} with"
            f" {scores.n_scored_tokens:,} supervised"
            f" tokens, in pieces of at most {scores.piece_tokens} tokens. ± is a standard error;"
            " for speeds, a standard deviation over repetitions. The context of a GGUF ends at the"
            " sliding window, because llama.cpp does not apply it."
            f"{note_on_context(runs)}{note_on_tasks(runs)}"
        ),
        header=["", *(run.name for run in runs)],
        rows=[[name, *(figure(run) for run in runs)] for name, figure in figures.items()],
    )


def texts(runs: Sequence[RunResults], smallest: str) -> dict[str, Callable[[RunResults], str]]:
    """Rows of the texts that were scored, by name."""
    return {
        f"Perplexity on {text}, {link}": partial(perplexity_on, text=text, link=link)
        for text in dict.fromkeys(text for run in runs for text in run.link("merged").texts)
        for link in ("base", "merged", smallest)
    }


def perplexity_on(run: RunResults, *, text: str, link: str) -> str:
    scores = run.link(link).texts.get(text)
    return perplexity(scores) if scores else ""


def usable(run: RunResults) -> dict[str, Callable[[RunResults], str]]:
    """Rows of the links whose usable context was measured, by name."""
    return {
        f"Usable context, {link.name}": partial(usable_context, link=link.name)
        for link in run.links
        if link.context is not None
    }


def usable_context(run: RunResults, *, link: str) -> str:
    """Usable context of a link for which it was measured."""
    context = run.link(link).context
    assert context is not None, link
    return effective(context, "ruler")


def note_on_context(runs: Sequence[RunResults]) -> str:
    measured = [link.context for run in runs for link in run.links if link.context is not None]
    if not measured:
        return " `snakemake context` measures the usable context."
    n_prompts = sorted({report.n_prompts for report in measured})
    return (
        " Usable context is the longest length up to which at least 85.6 % of the questions about a"
        " text are answered correctly (RULER), out of the advertised length, with its 95 % interval"
        f" for {' or '.join(f'{n:,}' for n in n_prompts)} prompts per link."
    )


def tasks(runs: Sequence[RunResults]) -> dict[str, Callable[[RunResults], str]]:
    """Rows of the tasks of any run, by name. Runs may differ, as may their datasets' references."""
    found: dict[str, dict[str, dict[str, str]]] = {}  # task → link → run
    for run in runs:
        for link in run.links:
            for kind, of_kind in link.tasks.items():
                for score in of_kind.scores:
                    name = name_of(score, kind) + (", %" if is_share(score) else "")
                    of_link = found.setdefault(name, {}).setdefault(link.name, {})
                    of_link[run.name] = shown(score)

    return {
        f"{name}, {link}": partial(task_score, by_run)
        for name, by_link in found.items()
        for link, by_run in by_link.items()
    }


def task_score(by_run: Mapping[str, str], run: RunResults) -> str:
    return by_run.get(run.name, "")


def note_on_tasks(runs: Sequence[RunResults]) -> str:
    measured = [of_kind for run in runs for link in run.links for of_kind in link.tasks.values()]
    if not measured:
        return " `snakemake tasks` measures tasks with a right answer."
    if not any(of_kind.scores for of_kind in measured):
        return f" {NONE_ASKED}"
    return (
        " The ± of a task is a standard error over documents; reference answers have a 95 % Wilson"
        " interval. results/report/tasks.md has the paired change of each link."
    )


def merged_into(run: RunResults) -> str:
    """The base of the merge, and whether a measurement chose it.

    It is empty for a model that was merged elsewhere.
    """
    if run.settings.merged:
        return ""
    if run.merge_base is None:
        return run.settings.merge_base
    return f"{run.merge_base.merge_base} (measured)"


def candidate(run: RunResults, base: MergeBase) -> str:
    """Scores of a merge on validation text; empty where nothing was measured."""
    if run.merge_base is None:
        return ""
    measured = run.merge_base.candidate(base)
    return f"{measured.perplexity:.4f}, {measured.kl_divergence_nats:.2g} nats"


def trained(run: RunResults, key: str) -> float | None:
    """A figure of training; None if the run was not trained here or the figure was not measured.

    A run that resumed at its last step has no timings.
    """
    return getattr(run.manifest, key) if run.manifest else None


def count(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}"


def change(run: RunResults, link: str) -> str:
    base = run.link("base").scores.perplexity
    return f"{signed(100 * (run.link(link).scores.perplexity / base - 1), digits=1)}%"


def speed_of(run: RunResults, link: str) -> Speed:
    """The speed of a link that was timed, as every GGUF is."""
    speed = run.link(link).speed
    assert speed is not None, link
    return speed


def per_token(run: RunResults, link: str, phase: Phase) -> str:
    return with_error(*speed_of(run, link).of_token(phase), digits=3)
