"""Write the paths of a run's measurements, for the programs that report them.

python -m workflow_scripts.report.write_chain --run mistral --settings '{"run": …, …}'
    --chain results/runs/mistral/chain.json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import log
from workflow_scripts.handover.chain import ChainSettings, chain_of
from workflow_scripts.settings import settings_from_json

OUTPUT_VERSION = 1
logger = log.stage_logger("write_chain")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--run", required=True, help="name of the run")
    parser.add_argument("--settings", required=True, help="JSON of the chain's settings")
    parser.add_argument("--chain", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    chain = chain_of(arguments.run, settings_from_json(ChainSettings, arguments.settings))
    chain.write(arguments.chain)
    logger.info("wrote n_links=%d path=%s", len(chain.links), arguments.chain)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
