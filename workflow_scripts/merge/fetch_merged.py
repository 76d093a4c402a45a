"""Bring in a model that was fine-tuned and merged elsewhere: from a local folder, by links, or from
the Hugging Face Hub.

Like every merged model it gets the tokenizer and chat template of its base, with which the run
renders its chats. `source.json` in its folder records its origin.

python -m workflow_scripts.merge.fetch_merged --settings '{"merged": "./my-model", …}'
    --facts facts.json --tokenizer tokenizer/ --merged results/runs/my-run/merged
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, ModelShape, RopeParameters
from workflow_scripts.handover.provenance import GivenOrigin
from workflow_scripts.log import StageError
from workflow_scripts.merge import user_models
from workflow_scripts.models import checkpoint_files, tensors
from workflow_scripts.settings import RunSettings, settings_from_json

OUTPUT_VERSION = 1
# Besides the weights, these facts decide what a model computes.
SHAPE = (
    "model_type", "n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads",
    "head_dim", "vocabulary_size", "sliding_window", "layer_windows", "rope_theta", "n_experts",
    "n_experts_per_token",
)  # fmt: skip
logger = log.stage_logger("fetch_merged")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of `runs.<name>`")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--merged", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
    if run.merged is None:
        raise StageError("no model to fetch", where="--settings, merged", found=run.merged)

    from workflow_scripts.merge import merged_folder

    with files.atomic_folder(arguments.merged) as folder:
        # A local model is checked where it is: messages then name the user's files, not links that
        # disappear with this folder.
        source, commit = user_models.fetched(
            run.merged,
            run.revision,
            folder,
            kind="merged model",
            key="runs.<name>.merged",
            wanted=list(user_models.MODEL_FILES),
        )
        if source != folder:
            link(source.resolve(), folder)
        facts = Facts.read(arguments.facts)
        check_shape(source, facts)
        checkpoint_files.check_whole(source, checkpoint_files.read_shape(source))
        tensors.check_all_values(checkpoint_files.weight_files(source))
        set_window(folder / "config.json", facts)
        merged_folder.complete(folder, arguments.tokenizer)
        GivenOrigin(source=run.merged, commit=commit).write(folder / "source.json")
    logger.info("wrote source=%s path=%s", run.merged, arguments.merged)


def link(source: Path, folder: Path) -> None:
    """Link to the weights, and copy the small files, some of which are completed here."""
    for path in user_models.model_files(source):
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)


def check_shape(folder: Path, facts: ModelShape) -> None:
    """
    Raises:
        StageError: the model is not a fine-tune of the base.
    """
    found, wanted = (
        one.model_dump(include=set(SHAPE)) | {"rope_scaling": stretched(one)}
        for one in (checkpoint_files.read_shape(folder), facts)
    )
    differing = [key for key in (*SHAPE, "rope_scaling") if found[key] != wanted[key]]
    if differing:
        raise StageError(
            "the merged model does not have the shape of its base",
            where=f"config.json: {', '.join(differing)}",
            found=log.fields({key: found[key] for key in differing}),
            expected=log.fields({key: wanted[key] for key in differing}),
            to_fix="set runs.<name>.model to the base that was fine-tuned; if there is none with"
            " this shape (tokens were added), name the model's own folder under `models` too",
        )


def stretched(facts: ModelShape) -> RopeParameters:
    """RoPE scaling in the form of `rope_parameters`; {} without one."""
    rope = {key: value for key, value in facts.rope_parameters.items() if key != "rope_theta"}
    return {} if rope.get("rope_type", "default") == "default" else rope


def set_window(path: Path, facts: ModelShape) -> None:
    """Write the sliding window into config.json: without the key, MistralConfig assumes 4096.

    Args:
        path: of the config.json.
    """
    config = files.read_json(path)
    files.write_json(path, config | {"sliding_window": facts.sliding_window})


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
