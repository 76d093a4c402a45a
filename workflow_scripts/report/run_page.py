"""The page of a run, as HTML: what it is, what was measured, how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from workflow_scripts import pages
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.handover.scores import Loss
from workflow_scripts.handover.training import History, MemoryPlan, TrainingManifest
from workflow_scripts.models.kv_cache import kv_cache_bytes
from workflow_scripts.report import (
    chain_table,
    cleaning_page,
    context_table,
    figures,
    packing_page,
    plots,
    results,
    task_table,
    verdicts,
)
from workflow_scripts.report.results import Gates, RunResults
from workflow_scripts.report.tables import Plot, Table, mebibytes, signed, with_error

MOST_PARTS = 20
"""Rows of the tables by turn and by source."""


def page(run: RunResults, seconds: Mapping[str, float]) -> str:
    """The whole page.

    Args:
        seconds: duration of each step of the run.
    """
    cleaning = CleaningReport.read(Path(run.chain.cleaning_report))
    packing = run.chain.packing_report and PackingReport.read(Path(run.chain.packing_report))
    reports = {link.name: link.context for link in run.links if link.context is not None}
    shown = dict.fromkeys(("base", "merged", run.smallest.name))
    return pages.render(
        "run.html.j2",
        name=run.name,
        about=about(run),
        verdicts=verdicts.of_run(run),
        chain=without_run(chain_table.chain([run]), run),
        chain_plot=figures.inline(plots.chain([run])),
        gates=gate_rows(results.read_gates(run.chain)),
        trade_off=figures.inline(plots.trade_off(run)),
        tests=speed_rows(run),
        first_token=first_token_table(run),
        caches=cache_rows(run),
        by_position=figures.inline(plots.by_position(run, list(shown))),
        parts=parts(run),
        context=without_run(context_table.context({run.name: reports}), run) if reports else None,
        heat_maps=figures.inline(plots.heat_maps(reports)) if reports else None,
        heat_map_caption=context_table.HEAT_MAP_CAPTION,
        tasks=tasks(run),
        cleaning=cleaning,
        funnel=cleaning_page.funnel(cleaning),
        placed=packing and packing_page.placed(packing),
        too_long=packing and packing_page.too_long(packing),
        trained=run.manifest and trained(run.manifest),
        training_plots=training_plots(run),
        durations=figures.inline(plots.durations(seconds)) if seconds else None,
        total_minutes=f"{sum(seconds.values()) / 60:,.1f}",
    )


def about(run: RunResults) -> dict[str, str]:
    """The settings that the run combines."""
    window = run.facts.sliding_window
    combined = {
        key.replace("_", " "): str(value)
        for key, value in run.settings
        if value and key not in ("revision", "precision")
    }
    return combined | {
        "context": f"{run.facts.context_tokens:,} tokens",
        "sliding window": f"{window:,} tokens" if window else "none",
    }


def without_run(table: Table, run: RunResults) -> Table:
    """A table of one run, whose rows need not name the run."""
    rows = [[name.removeprefix(f"{run.name}: "), *cells] for name, *cells in table.rows]
    return Table(table.title, table.note, table.header, rows)


def gate_rows(gates: Gates) -> list[list[str]]:
    """Measurements of the gates, one row per hand-over."""
    rows = [["merged → F16 GGUF", f"{gates.gguf.kl_divergence_nats:.2g} nats KL"]]
    if gates.merged:
        change = signed(100 * gates.merged.perplexity_increase_fraction)
        rows = [
            ["base + adapter → merged", f"{gates.merged.kl_divergence_nats:.2g} nats KL"],
            ["trained model → merged", f"{change}% perplexity on validation text"],
            *rows,
        ]
    return rows


def speed_rows(run: RunResults) -> list[list[str]]:
    """Speed of every link in the tests of llama-bench."""
    return [
        [
            link.name,
            test.test,
            with_error(test.tokens_per_second, test.standard_deviation_tokens_per_second, digits=1),
        ]
        for link in run.links
        if link.speed is not None
        for test in link.speed.tests
    ]


def first_token_table(run: RunResults) -> Table:
    """Time to the first token of every link."""
    timed = [(link.name, link.speed) for link in run.links if link.speed is not None]
    rows = [
        [
            name,
            with_error(
                speed.first_token_milliseconds,
                speed.first_token_standard_deviation_milliseconds,
                digits=1,
            ),
        ]
        for name, speed in timed
    ]
    header = ["link", f"time to first token, prompt of {timed[0][1].prompt_tokens:,}, ms"]
    return Table("Time to the first token", "", header, rows)


def cache_rows(run: RunResults) -> list[list[str]]:
    """Memory of the key-value cache by context, with all tokens and with those of the window."""
    context = run.facts.context_tokens
    return [
        [
            f"{length:,}",
            *(mebibytes(kv_cache_bytes(run.facts, length, rolls=rolls)) for rolls in (False, True)),
        ]
        for length in (context >> halvings for halvings in range(4, -1, -1))
    ]


def parts(run: RunResults) -> dict[str, list[list[str]]]:
    """Tokens and perplexity of the merged model by turn and by source."""
    scores = run.link("merged").scores
    by_part: dict[str, list[tuple[str, Loss]]] = {
        "turn": [(str(one.turn), one) for one in scores.by_turn],
        "source": [(one.source or "–", one) for one in scores.by_source],
    }
    return {
        part: [
            [name, f"{loss.n_scored_tokens:,}", f"{loss.perplexity:.2f}"]
            for name, loss in losses[:MOST_PARTS]
        ]
        for part, losses in by_part.items()
    }


def tasks(run: RunResults) -> Table | None:
    """Scores of every link and their changes, where tasks were evaluated."""
    links = task_table.asked_links(run)
    if not links:
        return None
    table = task_table.tasks({run.name: links})
    rows = [[name.replace(f": {run.name}: ", ", "), *cells] for name, *cells in table.rows]
    return Table(table.title, table.note, ["Task and link", *table.header[1:]], rows)


def training_plots(run: RunResults) -> list[Plot]:
    """Curves, and memory as planned and as measured, unless the run was not trained here."""
    if run.manifest is None or run.chain.history is None or run.chain.memory_plan is None:
        return []
    history = History.read(Path(run.chain.history))
    plan = MemoryPlan.read(Path(run.chain.memory_plan))
    return [
        Plot(
            "Curves",
            figures.inline(plots.training_curves({run.name: history})),
            "Loss, gradient norm and learning rate by optimizer step.",
        ),
        Plot(
            "Memory",
            figures.inline(plots.memory(run.manifest, plan)),
            "Peak memory of training: by part as plan_memory predicted it, and as measured. On a"
            " CPU, the measurement is of the whole process.",
        ),
    ]


def trained(manifest: TrainingManifest) -> dict[str, str]:
    speed = manifest.tokens_per_second
    return {
        "steps": f"{manifest.n_steps:,}",
        "trainable parameters": f"{manifest.n_trainable_parameters:,}",
        "tokens per second": "–" if speed is None else f"{speed:,.0f}",
        "device": manifest.device,
    }
