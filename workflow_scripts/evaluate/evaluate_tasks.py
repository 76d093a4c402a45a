"""Published tasks by one link of the chain, through lm-evaluation-harness.

Base and merged model answer through its own transformers model, a GGUF through llama.cpp in this
process. All read the same token ids, cut to what a GGUF of the model serves (its window, where it
has one); documents that lose the beginning of their prompt by that are counted.

The data of the tasks comes from the Hub, by `fetch_tasks` or from a cache filled before.

python -m workflow_scripts.evaluate.evaluate_tasks --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --settings '{"names": ["hellaswag"]}' --threads 8
    --scores Q4_K_M.tasks.json --samples Q4_K_M.tasks.parquet
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workflow_scripts import log
from workflow_scripts.evaluate import harness, link_arguments
from workflow_scripts.evaluate.task_scores import Sample, write_samples
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.tasks import TaskScore, TaskScores
from workflow_scripts.settings import TaskSettings, settings_from_json

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

OUTPUT_VERSION = 2
# No published prompt is longer, and llama.cpp's cache of 128k tokens would fill a GPU.
LONGEST_TOKENS = 32_768
logger = log.stage_logger("evaluate_tasks")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    link_arguments.add_arguments(parser)
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.tasks`")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument("--samples", type=Path, required=True, help="to write: every document")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(TaskSettings, arguments.settings)
    facts = Facts.read(arguments.facts)
    max_length = min(facts.served_context_tokens, LONGEST_TOKENS)
    harness.check_installed()
    manager = harness.manager_of(settings)

    from workflow_scripts.evaluate.harness_models import LogitLM, TransformersLM, load_tokenizer

    logger.info("started %s settings=%s", log.versions("lm-eval"), arguments.settings)
    tokenizer = load_tokenizer(arguments.tokenizer)
    started = time.perf_counter()
    if arguments.gguf:
        from workflow_scripts.evaluate.greedy import by_llama_cpp
        from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

        with LlamaCppModel(
            arguments.gguf, context_tokens=max_length, n_threads=arguments.threads
        ) as model:
            lm: TemplateLM = LogitLM(
                model.resumed_logit_blocks,
                by_llama_cpp(model, tokenizer.eos_token_id),
                tokenizer,
                max_length=max_length,
            )
            scores, rows = evaluate(lm, settings, manager)
    else:
        loaded = link_arguments.load_transformers(arguments, facts)
        lm = TransformersLM(loaded.model, tokenizer, max_length=max_length)
        scores, rows = evaluate(lm, settings, manager)
    report = TaskScores(
        scores=tuple(scores),
        are_chats=settings.chat_template,
        context_tokens=max_length,
        duration_seconds=time.perf_counter() - started,
    )
    write_samples(arguments.samples, rows)
    report.write(arguments.scores)
    logger.info("wrote path=%s %s", arguments.scores, log.fields(report.content()))


def evaluate(
    lm: TemplateLM, settings: TaskSettings, manager: Any
) -> tuple[list[TaskScore], list[Sample]]:
    """The scores, and what every document scored, task by task."""
    scores: list[TaskScore] = []
    rows: list[Sample] = []
    for name in settings.names:
        of_task, of_documents = harness.evaluate(lm, name, settings, manager)
        scores += of_task
        rows += of_documents
        for score in of_task:
            logger.info("scored %s", log.fields(score.content()))
    return scores, rows


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
