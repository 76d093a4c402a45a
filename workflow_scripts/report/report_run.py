"""The page of a run: what it is, what every step of it measured, what it took.

python -m workflow_scripts.report.report_run --chains results/runs/mistral/chain.json
    --benchmarks benchmarks/runs/mistral --page results/runs/mistral/report.html
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import files, log, pages
from workflow_scripts.durations import durations
from workflow_scripts.handover.chain import Chain
from workflow_scripts.handover.cleaning import CleaningReport
from workflow_scripts.handover.packing import PackingReport
from workflow_scripts.handover.scores import Loss
from workflow_scripts.handover.training import History, MemoryPlan, TrainingManifest
from workflow_scripts.models.kv_cache import kv_cache_bytes
from workflow_scripts.report import (
    chain_table,
    figures,
    plots,
    results,
    task_table,
    verdicts,
)
from workflow_scripts.report.cleaning_page import funnel_html
from workflow_scripts.report.context_table import context
from workflow_scripts.report.packing_page import rows_html
from workflow_scripts.report.results import Gates, RunResults
from workflow_scripts.report.tables import mebibytes, with_error

OUTPUT_VERSION = 5
logger = log.stage_logger("report_run")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--benchmarks", type=Path, required=True, help="of the run's steps")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    (run,) = results.read_results(arguments.chains, results.Asked.of(arguments))
    sections = {
        "What came out": outcome_html(run),
        "The chain": chain_html(run),
        "Hand-overs": gates_html(results.read_gates(run.chain)),
        "Quality, size and speed": trade_off_html(run),
        "Speed, and memory of the context": speed_html(run),
        "Where it is good, and where not": parts_html(run),
        "Usable context": context_html(run),
        "Tasks": tasks_html(run),
        "Data": data_html(run.chain),
        "Training": training_html(run),
        "Time": time_html(durations(arguments.benchmarks)),
    }
    body = "\n".join(
        f"<h2>{title}</h2>\n{section}" for title, section in sections.items() if section
    )
    files.write_text(arguments.page, pages.page(f"Run {run.name}", about_html(run) + body))
    logger.info("wrote path=%s", arguments.page)


def about_html(run: RunResults) -> str:
    """What was combined."""
    window = run.facts.sliding_window
    combined = {
        key: str(value)
        for key, value in run.settings
        if value and key not in ("revision", "precision")
    }
    return pages.facts(
        combined
        | {
            "context": f"{run.facts.context_tokens:,} tokens",
            "sliding window": f"{window:,} tokens" if window else "none",
        }
    )


def outcome_html(run: RunResults) -> str:
    return "".join(map(pages.paragraph, verdicts.of_run(run)))


def chain_html(run: RunResults) -> str:
    table = chain_table.chain([run])
    drawing = figures.inline(
        plots.chain([run]),
        "Perplexity of every link; bars are one standard error of the link alone",
    )
    rows = [[name.removeprefix(f"{run.name}: "), *cells] for name, *cells in table.rows]
    return drawing + pages.table(table.header, rows) + pages.remark(table.note)


def gates_html(gates: Gates) -> str:
    """What the gates measured."""
    rows = []
    if gates.merged:
        rows += [
            ["base + adapter → merged", f"{gates.merged.kl_divergence_nats:.2g} nats KL"],
            [
                "trained → merged",
                f"{gates.merged.perplexity_increase_fraction:+.2%} perplexity on validation text",
            ],
        ]
    rows.append(["merged → F16 GGUF", f"{gates.gguf.kl_divergence_nats:.2g} nats KL"])
    return pages.table(["hand-over", "measured"], rows)


def trade_off_html(run: RunResults) -> str:
    return figures.inline(
        plots.trade_off(run),
        "Every file by its loss on the test conversations; what is further down and further left is"
        " better. Bars are one standard deviation over repetitions",
    )


def speed_html(run: RunResults) -> str:
    """Tests in llama-bench's terms, and the key-value cache by context."""
    rows = [
        [
            link.name,
            test.test,
            with_error(test.tokens_per_second, test.standard_deviation_tokens_per_second, digits=1),
        ]
        for link in run.links
        if link.speed is not None
        for test in link.speed.tests
    ]
    first = [
        [
            link.name,
            with_error(
                link.speed.first_token_milliseconds,
                link.speed.first_token_standard_deviation_milliseconds,
                digits=1,
            ),
        ]
        for link in run.links
        if link.speed is not None
    ]
    context = run.facts.context_tokens
    lengths = [context >> halvings for halvings in range(4, -1, -1)]
    caches = [
        [
            f"{length:,}",
            *(mebibytes(kv_cache_bytes(run.facts, length, rolls=rolls)) for rolls in (False, True)),
        ]
        for length in lengths
    ]
    speed = next(link.speed for link in run.links if link.speed is not None)
    return (
        pages.table(["link", "test", "tokens a second"], rows)
        + pages.table(["link", f"first token after {speed.prompt_tokens:,}, ms"], first)
        + pages.table(["context, tokens", "key-value cache", "with a rolling window"], caches)
        + pages.remark(
            "pp reads a prompt, tg writes token by token, d is the context before; ± is a standard"
            " deviation over repetitions. The cache is computed from the model's shape, 16 bits a"
            " value, one sequence."
        )
    )


def parts_html(run: RunResults) -> str:
    """Loss by position, turn and source."""
    names = [name for name in ("base", "merged", run.smallest.name) if name]
    drawing = figures.inline(
        plots.by_position(run, list(dict.fromkeys(names))),
        "Loss by position of the token in its conversation; bars are one standard error",
    )
    scores = run.link("merged").scores
    parts: dict[str, list[tuple[str, Loss]]] = {
        "turn": [(str(one.turn), one) for one in scores.by_turn],
        "source": [(one.source or "–", one) for one in scores.by_source],
    }
    tables = "".join(
        pages.table(
            [part, "tokens", "perplexity, merged"],
            [
                [name, f"{loss.n_scored_tokens:,}", f"{loss.perplexity:.2f}"]
                for name, loss in losses[:20]
            ],
        )
        for part, losses in parts.items()
    )
    return drawing + tables


def context_html(run: RunResults) -> str:
    """Where it was measured: effective lengths, and right answers by length and depth."""
    reports = {link.name: link.context for link in run.links if link.context is not None}
    if not reports:
        return ""
    table = context({run.name: reports})
    rows = [[name.removeprefix(f"{run.name}: "), *cells] for name, *cells in table.rows]
    drawing = figures.inline(
        plots.heat_maps(reports),
        "Right answers by length of the prompt and depth of the fact, of the tasks that have a"
        " depth",
    )
    return drawing + pages.table(table.header, rows) + pages.remark(table.note)


def tasks_html(run: RunResults) -> str:
    """Where they were asked: scores of every link, and what it changes."""
    links = task_table.asked_links(run)
    if not links:
        return ""
    table = task_table.tasks({run.name: links})
    if not table.rows:
        return pages.remark(table.note)
    rows = [[name.replace(f": {run.name}: ", ", "), *cells] for name, *cells in table.rows]
    return pages.table(["Task and link", *table.header[1:]], rows) + pages.remark(table.note)


def data_html(chain: Chain) -> str:
    """What became of the conversations, and of the rows they were packed into."""
    cleaned = funnel_html(CleaningReport.read(Path(chain.cleaning_report)))
    if chain.packing_report is None:
        return cleaned
    return cleaned + rows_html(PackingReport.read(Path(chain.packing_report)))


def training_html(run: RunResults) -> str:
    """Curves, and memory as planned and as measured; empty for a run that was not trained here."""
    if run.manifest is None or run.chain.history is None or run.chain.memory_plan is None:
        return ""
    history = History.read(Path(run.chain.history))
    curves = figures.inline(
        plots.training_curves({run.name: history}), "Loss, gradient norm and learning rate"
    )
    plan = MemoryPlan.read(Path(run.chain.memory_plan))
    memory = figures.inline(
        plots.memory(run.manifest, plan),
        "Peak memory of training by part as plan_memory predicted it, and as measured (on a CPU:"
        " of the whole process)",
    )
    return pages.facts(trained(run.manifest)) + curves + memory


def trained(manifest: TrainingManifest) -> dict[str, str]:
    speed = manifest.tokens_per_second
    return {
        "steps": f"{manifest.n_steps:,}",
        "trainable parameters": f"{manifest.n_trainable_parameters:,}",
        "tokens a second": "–" if speed is None else f"{speed:,.0f}",
        "device": manifest.device,
    }


def time_html(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    return figures.inline(
        plots.durations(seconds),
        f"Wall time of every step, as Snakemake took it: {sum(seconds.values()) / 60:,.1f} minutes"
        " in all, steps side by side counted each",
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
