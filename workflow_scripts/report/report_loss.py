"""Loss curves of training: every step of every run, and the validation loss beside them.

python -m workflow_scripts.report.report_loss --histories results/runs/*/adapter/history.json
    --figure loss.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from workflow_scripts import files, log

OUTPUT_VERSION = 1
logger = log.stage_logger("report_loss")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument(
        "--histories", type=Path, nargs="+", required=True, help="history.json of each run"
    )
    parser.add_argument("--figure", type=Path, required=True, help="to write: SVG")
    arguments = parser.parse_args(argv)

    histories = {path.parts[-3]: files.read_json(path) for path in arguments.histories}
    draw(histories, arguments.figure)
    logger.info("wrote n_runs=%d path=%s", len(histories), arguments.figure)


def draw(histories: Mapping[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    """Three panels: loss, gradient norm, learning rate, by optimizer step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "tramontane"
    panels = {
        "loss_nats_per_token": "loss, nats a token",
        "gradient_norm": "gradient norm",
        "learning_rate": "learning rate",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for number, (run, history) in enumerate(histories.items()):
        color = f"C{number}"
        steps = [entry["step"] for entry in history["train"]]
        for panel, key in zip(axes, panels, strict=True):
            values = [entry[key] for entry in history["train"]]
            panel.plot(steps, values, color=color, alpha=0.8, linewidth=1.2, label=run)
        if history["validation"]:
            axes[0].plot(
                [entry["step"] for entry in history["validation"]],
                [entry["loss_nats_per_token"] for entry in history["validation"]],
                color=color,
                marker="o",
                linestyle="--",
                linewidth=1,
                label=f"{run}, validation",
            )
    for panel, title in zip(axes, panels.values(), strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    with files.atomic_file(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
