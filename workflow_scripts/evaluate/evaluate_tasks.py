"""Score one link of the chain on published tasks, with lm-evaluation-harness.

Base and merged model answer through the harness's own transformers model, a GGUF through llama.cpp
in this process. All read the same token ids, cut to the context that a GGUF of the model serves
(the sliding window, if there is one). Documents whose prompt loses its beginning are counted.

The data of the tasks comes from the Hub, by `fetch_tasks`, or from a cache filled earlier.

python -m workflow_scripts.evaluate.evaluate_tasks --gguf run-Q4_K_M.gguf --facts facts.json
    --tokenizer tokenizer/ --settings '{"names": ["hellaswag"]}' --threads 8
    --scores Q4_K_M.tasks.json --samples Q4_K_M.tasks.parquet
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.evaluate import harness_package, link_arguments
from workflow_scripts.handover.tasks import TaskScores
from workflow_scripts.settings import TaskSettings

OUTPUT_VERSION = 2
# No published prompt is longer, and a llama.cpp cache of 128k tokens would fill a GPU.
LONGEST_TOKENS = 32_768
logger = log.stage_logger("evaluate_tasks")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--scores", type=Path, required=True, help="to write: JSON")
    parser.add_argument("--samples", type=Path, required=True, help="to write: every document")
    arguments, settings, link = link_arguments.parse(parser, argv, TaskSettings, "evaluation.tasks")
    max_length = min(link.facts.served_context_tokens, LONGEST_TOKENS)
    harness_package.check_installed()

    from workflow_scripts.evaluate import greedy, harness, harness_models, links
    from workflow_scripts.evaluate.task_scores import write_samples
    from workflow_scripts.scoring.llama_cpp_model import LlamaCppModel

    manager = harness.manager_of(settings)
    logger.info("started %s settings=%s", log.versions("lm-eval"), arguments.settings)
    tokenizer = harness_models.load_tokenizer(arguments.tokenizer)
    started = time.perf_counter()
    with links.loaded(link, max_length) as model:
        lm = (
            harness_models.LogitLM(
                model.resumed_logit_blocks,
                greedy.by_llama_cpp(model, tokenizer.eos_token_id),
                tokenizer,
                max_length=max_length,
            )
            if isinstance(model, LlamaCppModel)
            else harness_models.TransformersLM(model.model, tokenizer, max_length=max_length)
        )
        scores, rows = [], []
        for name in settings.names:
            of_task, of_documents = harness.evaluate(lm, name, settings, manager)
            scores += of_task
            rows += of_documents
            for score in of_task:
                logger.info("scored %s", log.fields(score.content()))
    report = TaskScores(
        scores=tuple(scores),
        are_chats=settings.chat_template,
        context_tokens=max_length,
        duration_seconds=time.perf_counter() - started,
    )
    write_samples(arguments.samples, rows)
    report.write(arguments.scores)
    logger.info("wrote path=%s %s", arguments.scores, log.fields(report.content()))


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
