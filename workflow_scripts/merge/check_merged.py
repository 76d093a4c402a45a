"""Gate: the merged model is base + adapter, it is no worse than the adapter, and its folder is
complete.

Exact half: every stored number is the rounded sum of base and adapter, computed in float64 from
PEFT's reading of the adapter (`exact_merge`); the config is the base's. Statistical half: the
folder, as its users load it, computes what that rounded sum computes, and its loss on validation
text is no worse than that of the model as it was trained, on its base in the precision of training.
The cost of rounding is measured and reported: KL divergence from the float32 sum, next to that of
stochastic rounding. The gate needs no more memory than training did, and never changes the files it
judges. A model that was merged elsewhere has no adapter: its folder is checked and its perplexity
is measured.

python -m workflow_scripts.merge.check_merged --checkpoint checkpoint/ --facts facts.json
    --adapter adapter/ --precision nf4 --merge-base original --tokenizer tokenizer/
    --merged merged/ --tokens tokens/validation.arrow --settings '{}' --check merged_check.json
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GivenMergedCheck, MergedCheck
from workflow_scripts.merge import merge_base, merge_gate
from workflow_scripts.scoring import pieces as cutting
from workflow_scripts.settings import MergeGateSettings, settings_from_json
from workflow_scripts.tokens.documents import Documents

OUTPUT_VERSION = 3
logger = log.stage_logger("check_merged")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--facts", type=Path, required=True, help="model facts")
    parser.add_argument(
        "--adapter", type=Path, help="adapter that was merged; not given for a model as given"
    )
    parser.add_argument(
        "--precision",
        choices=merge_gate.TRAINED_AS,
        default="native",
        help="precision of the base in training",
    )
    parser.add_argument("--merge-base", default="original", help=merge_base.HELP)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument(
        "--tokens", type=Path, required=True, help="documents of the validation split"
    )
    parser.add_argument("--settings", required=True, help="JSON of `evaluation.gates.merge`")
    parser.add_argument("--check", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)
    settings = settings_from_json(MergeGateSettings, arguments.settings)

    from workflow_scripts.merge import exact_merge, merge_scores, merged_folder

    merged, checkpoint, adapter = arguments.merged, arguments.checkpoint, arguments.adapter
    facts = Facts.read(arguments.facts)
    documents = list(itertools.islice(Documents(arguments.tokens), settings.n_conversations))
    pieces = list(cutting.cut(documents, piece_tokens=cutting.comparable_tokens(facts, None)))
    merged_folder.check(merged, arguments.tokenizer, facts)
    report: GivenMergedCheck | MergedCheck
    if adapter is None:
        report = merge_scores.check_given(merged, facts, pieces, n_conversations=len(documents))
    else:
        merged_folder.check_config(merged, checkpoint, facts)
        exact = exact_merge.check(
            merged,
            checkpoint,
            adapter,
            merge_base.chosen(arguments.merge_base),
            has_two_bases=arguments.precision == "nf4",
        )
        report = merge_scores.check(
            merged,
            checkpoint,
            adapter,
            facts,
            pieces,
            precision=arguments.precision,
            exact=exact,
            n_conversations=len(documents),
        )
    logger.info("measured %s", log.fields(report.model_dump(mode="json")))
    merge_gate.judge(report, settings, merged, arguments.precision)
    report.write(arguments.check)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
