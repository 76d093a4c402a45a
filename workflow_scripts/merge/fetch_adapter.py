"""Bring in an adapter that was trained elsewhere: a local folder, or a repository of the Hub.

The adapter is small, so it is copied: a later change of the folder does not change what is merged.
`source.json` next to the copy records its origin. Set HF_TOKEN for a gated repository.

python -m workflow_scripts.merge.fetch_adapter --settings '{"adapter": "./my-adapter", …}'
    --checkpoint checkpoint/ --adapter results/runs/my-run/adapter
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.provenance import GivenOrigin
from workflow_scripts.log import StageError
from workflow_scripts.merge import user_models
from workflow_scripts.models import tensors
from workflow_scripts.settings import RunSettings, settings_from_json

OUTPUT_VERSION = 1
# An adapter that Tramontane trained has one. Among other things it says in which dtype the base was
# quantized.
MANIFEST = "training_manifest.json"
logger = log.stage_logger("fetch_adapter")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `runs.<name>`")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--adapter", type=Path, required=True, help="folder to write into")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
    if run.adapter is None:
        raise StageError("no adapter to fetch", where="--settings, adapter", found=run.adapter)

    from workflow_scripts.merge import merged_weights
    from workflow_scripts.merge.adapter import Adapter
    from workflow_scripts.merge.base_weights import BaseWeights

    with tempfile.TemporaryDirectory() as name:
        source, commit = user_models.fetched(
            run.adapter,
            run.revision,
            Path(name),
            kind="adapter",
            key="runs.<name>.adapter",
            wanted=[*user_models.ADAPTER_FILES, MANIFEST],
        )
        needed = user_models.adapter_files(source)
        # Checked here, before everything that comes between this stage and the merge.
        base = BaseWeights(arguments.checkpoint)
        merged_weights.check_fit(arguments.checkpoint, base, Adapter(source))
        tensors.check_all_values([source / "adapter_model.safetensors"])
        path = source / MANIFEST
        manifest = files.read_json(path) if path.is_file() else {}
        arguments.adapter.mkdir(parents=True, exist_ok=True)
        for path in needed:
            with files.atomic_file(arguments.adapter / path.name) as temporary:
                shutil.copyfile(path, temporary)
    origin = GivenOrigin(
        source=run.adapter,
        commit=commit,
        compute_dtype=manifest.get("compute_dtype"),
        training=manifest or None,
    )
    origin.write(arguments.adapter / "source.json")
    logger.info("wrote source=%s path=%s", run.adapter, arguments.adapter)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
