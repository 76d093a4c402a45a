"""Answers of every link to the same prompts, side by side, for people to read.

python -m workflow_scripts.report.report_samples --runs '{"runs": …, "gguf_types": …}'
    --results results --page results/report/samples.html
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log, pages

OUTPUT_VERSION = 1
logger = log.stage_logger("report_samples")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--runs", required=True, help="JSON of the runs and GGUF types")
    parser.add_argument("--results", type=Path, required=True, help="folder of all results")
    parser.add_argument("--page", type=Path, required=True, help="to write: HTML")
    arguments = parser.parse_args(argv)

    wanted = json.loads(arguments.runs)
    body = "".join(
        f"<h2>{pages.visible(run)}</h2>"
        + run_html(read(run, settings, wanted["gguf_types"], arguments.results))
        for run, settings in wanted["runs"].items()
    )
    intro = (
        '<p class="quiet">Greedy answers to the first prompts of the test split. They are few, and'
        " say how a link sounds; how good it is, the chain says.</p>"
    )
    files.write_text(arguments.page, pages.page("Answers", intro + body))
    logger.info("wrote n_runs=%d path=%s", len(wanted["runs"]), arguments.page)


def read(
    run: str, settings: Mapping[str, Any], gguf_types: Sequence[str], results: Path
) -> dict[str, list[dict[str, Any]]]:
    """Answers by link, the base's first.

    Raises:
        StageError: two links answered different prompts.
    """
    base = results / "evaluation" / settings["model"] / settings["dataset"]
    folder = results / "runs" / run / "evaluation"
    paths = {"base": base / "base.answers.json"}
    paths |= {link: folder / f"{link}.answers.json" for link in ("merged", *gguf_types)}
    answers = {link: files.read_json(path)["answers"] for link, path in paths.items()}
    asked = [one["conversation"] for one in answers["base"]]
    for link, given in answers.items():
        found = [one["conversation"] for one in given]
        if found != asked:
            raise log.StageError(
                "two links answered different prompts",
                where=paths[link],
                found=found,
                expected=f"{asked} ({paths['base']})",
                to_fix="snakemake samples --forcerun answer_prompts answer_prompts_merged"
                " answer_prompts_base",
            )
    return answers


def run_html(answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A table a prompt."""
    parts = []
    for number, first in enumerate(answers["base"]):
        rows = [["reference", first["reference"]]]
        rows += [[link, shown(given[number])] for link, given in answers.items()]
        parts.append(
            f"<details open><summary>{pages.visible(first['conversation'])}</summary>"
            f"<pre>{pages.visible(first['prompt'])}</pre>"
            + pages.table(["", "answer"], rows, is_of_words=True)
            + "</details>"
        )
    return "".join(parts)


def shown(answer: Mapping[str, Any]) -> str:
    """The answer; one that was cut off says so."""
    return answer["answer"] if answer["is_ended"] else f"{answer['answer']} … (not ended)"


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
