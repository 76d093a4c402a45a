"""Figures of the report's measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from workflow_scripts.handover.context import Cell, ContextScores
from workflow_scripts.handover.speed import Phase
from workflow_scripts.handover.training import History, MemoryPlan, TrainingManifest
from workflow_scripts.report.figures import COLORS, QUIET, log_ticks, panels, styles
from workflow_scripts.report.results import Link, RunResults

# Parts of the memory plan, in drawing order. `program` is what a process uses before any weight.
MEMORY_PARTS = {
    "program": "program and libraries",
    "base_weights": "base weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "communication": "communication",
    "activations": "activations",
    "workspace": "workspace",
    "evaluation": "evaluation",
}


def training_curves(histories: Mapping[str, History]) -> Figure:
    """Loss, gradient norm and learning rate by optimizer step.

    Args:
        histories: history.json of train_adapter, by run.
    """
    wanted = {
        "loss_nats_per_token": "loss, nats per token",
        "gradient_norm": "gradient norm",
        "learning_rate": "learning rate",
    }
    figure, axes = panels(len(wanted), width=12, height=3.6)
    for (run, history), style in zip(histories.items(), styles(), strict=False):
        color = style["color"]
        steps = [one.step for one in history.train]
        for axis, key in zip(axes, wanted, strict=True):
            values = [getattr(one, key) for one in history.train]
            axis.plot(steps, values, color=color, linewidth=1.2, label=run)
        if history.validation:
            axes[0].plot(
                [one.step for one in history.validation],
                [one.loss_nats_per_token for one in history.validation],
                **style,
                linestyle="--",
                linewidth=1,
                label=f"{run}, validation",
            )
    for axis, title in zip(axes, wanted.values(), strict=True):
        axis.set(title=title, xlabel="optimizer step")
    axes[0].legend()
    return figure


def chain(runs: Sequence[RunResults]) -> Figure:
    """Perplexity by link, one line per run. Bars are one standard error.

    Links from which no other link is made are drawn as separate points.
    """
    every = [link for run in runs for link in run.links]
    names = list(dict.fromkeys(link.name for link in sorted(every, key=lambda one: one.is_aside)))
    figure, (axis,) = panels(width=8, height=4.2)
    for number, (run, style) in enumerate(zip(runs, styles(), strict=False)):
        ways: tuple[tuple[bool, dict[str, Any]], ...] = (
            (False, {"label": run.name}),
            (True, {"linestyle": ""}),
        )
        for is_aside, how in ways:
            links = [link for link in run.links if link.is_aside is is_aside]
            points = [_perplexity(link) for link in links]
            # Side by side, so that no bar hides another.
            places = [names.index(link.name) + 0.08 * number for link in links]
            if points:
                values, errors = zip(*points, strict=True)
                axis.errorbar(places, values, yerr=errors, **style, **how)
    axis.set_xticks(range(len(names)), names, rotation=20)
    axis.set_yscale("log")
    log_ticks(axis.yaxis)
    axis.set_ylabel("perplexity, supervised test tokens (log scale)")
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def _perplexity(link: Link) -> tuple[float, float]:
    """Perplexity with its standard error, or 0 if that is unknown."""
    value = link.scores.perplexity
    return value, (link.scores.loss_standard_error_nats_per_token or 0) * value


def trade_off(run: RunResults) -> Figure:
    """Loss of the run's files by size and by speed."""
    links = [link for link in run.links if link.is_product]
    measures: tuple[tuple[str, Phase | None], ...] = (
        ("size of the file, GB", None),
        ("decoding, ms per token", "decode"),
        ("reading the prompt, ms per token", "prompt"),
    )
    figure, axes = panels(len(measures), width=12, height=3.6)
    for axis, (label, phase) in zip(axes, measures, strict=True):
        for link, style in zip(links, styles(), strict=False):
            loss = link.scores.loss_nats_per_token
            if phase is None:
                value, error = (link.scores.size_bytes or 0) / 1e9, None
            elif link.speed is None:
                continue
            else:
                value, error = link.speed.of_token(phase)
            axis.errorbar([value], [loss], xerr=[error or 0], linestyle="", **style)
            axis.annotate(link.name, (value, loss), textcoords="offset points", xytext=(6, 5))
        axis.set_xlabel(f"{label} (lower is better)")
        axis.margins(0.25)
        axis.locator_params(nbins=5)
    axes[0].set_ylabel("loss, nats per token (lower is better)")
    return figure


def by_position(run: RunResults, names: Sequence[str]) -> Figure:
    """Loss by position in the conversation, one line per link. Bars are one standard error.

    Args:
        names: names of the links.
    """
    figure, (axis,) = panels(width=8, height=3.8)
    for number, (name, style) in enumerate(zip(names, styles(), strict=False)):
        buckets = run.link(name).scores.by_position
        middles = [(one.first_position + one.last_position + 1) / 2 for one in buckets]
        axis.errorbar(
            [middle * 1.03**number for middle in middles],
            [one.loss_nats_per_token for one in buckets],
            yerr=[one.loss_standard_error_nats_per_token or 0 for one in buckets],
            **style,
            label=name,
        )
    window = run.facts.sliding_window
    if window:
        axis.axvline(window, color=QUIET, linestyle=":", linewidth=1, label="window")
    axis.set_xscale("log", base=2)
    log_ticks(axis.xaxis)
    axis.set(xlabel="position in the conversation, tokens", ylabel="loss, nats per token")
    axis.legend()
    return figure


def memory(manifest: TrainingManifest, plan: MemoryPlan) -> Figure:
    """Memory of training: by part as planned, and the measured peak."""
    figure, (axis,) = panels(width=8, height=2.4)
    left = 0.0
    sizes = plan.predicted_bytes.by_name()
    planned = {part: sizes[part] / 1e9 for part in MEMORY_PARTS if sizes[part]}
    for part, style in zip(planned, styles(), strict=False):
        axis.barh(
            ["planned"],
            [planned[part]],
            left=left,
            color=style["color"],
            edgecolor="white",
            label=MEMORY_PARTS[part],
        )
        left += planned[part]
    axis.barh(["measured"], [manifest.peak_memory_bytes / 1e9], color=QUIET)
    axis.axvline(plan.usable_bytes / 1e9, color="0.2", linestyle=":", label="usable")
    # The usable memory may be far more than what is used.
    widest = max(left, manifest.peak_memory_bytes / 1e9)
    axis.set(xlim=(0, 1.15 * widest), xlabel="peak memory, GB")
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def durations(seconds: Mapping[str, float]) -> Figure:
    """Duration of the longest steps of a run, the longest on top.

    Args:
        seconds: duration by step.
    """
    steps = sorted(seconds, key=seconds.__getitem__)[-25:]
    figure, (axis,) = panels(width=8, height=0.6 + 0.24 * len(steps))
    axis.barh(steps, [seconds[step] for step in steps], color=COLORS[0])
    for place, step in enumerate(steps):
        axis.annotate(f" {seconds[step]:,.0f} s", (seconds[step], place), va="center", fontsize=8)
    axis.margins(x=0.12)
    axis.set_xlabel("seconds")
    axis.grid(axis="y", visible=False)
    return figure


def heat_maps(links: Mapping[str, ContextScores]) -> Figure:
    """Right answers by length and depth, for the tasks that have a depth. One panel per link.

    Args:
        links: scores by link.
    """
    figure, axes = panels(len(links), width=max(5.0, 4.0 * len(links)), height=3.8)
    for axis, (name, report) in zip(axes, links.items(), strict=True):
        cells = [cell for cell in report.cells if cell.depth_fraction is not None]
        lengths = sorted({cell.length_tokens for cell in cells})
        depths = sorted({cell.depth_fraction or 0.0 for cell in cells})
        shares = [[100 * _share(cells, length, depth) for length in lengths] for depth in depths]
        # Cividis reads the same with every color vision. It is a mesh: pages show no images.
        axis.pcolormesh(shares, vmin=0, vmax=100, cmap="cividis", edgecolor="white", linewidth=1)
        for row, line in enumerate(shares):
            for column, share in enumerate(line):
                color = "black" if share > 55 else "white"
                text = f"{share:.0f}"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color)
        names = [f"{length:,}" for length in lengths]
        axis.set_xticks(np.arange(len(lengths)) + 0.5, names, rotation=45)
        axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * depth:.0f} %" for depth in depths])
        axis.invert_yaxis()
        axis.set(title=f"{name}, right answers in %", xlabel="length of the prompt, tokens")
        axis.grid(visible=False)
    axes[0].set_ylabel("depth of the fact")
    return figure


def _share(cells: Sequence[Cell], length: int, depth: float) -> float:
    """Fraction of right answers over all tasks."""
    found = [cell for cell in cells if (cell.length_tokens, cell.depth_fraction) == (length, depth)]
    return sum(cell.n_exact for cell in found) / sum(cell.n_prompts for cell in found)
