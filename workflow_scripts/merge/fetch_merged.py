"""Bring in a model that was fine-tuned and merged elsewhere: a local folder by links, or from the
Hugging Face Hub.

Tokenizer and chat template are those of its base, as of every merged model here: what a run renders
its chats with. Where it came from stands in its folder as `source.json`.

python -m workflow_scripts.merge.fetch_merged --settings '{"merged": "./my-model", …}'
    --facts facts.json --tokenizer tokenizer/ --merged results/runs/my-run/merged
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, hub, log
from workflow_scripts.handover.facts import Facts, ModelShape, RopeParameters
from workflow_scripts.handover.provenance import GivenOrigin
from workflow_scripts.log import StageError
from workflow_scripts.merge import user_models
from workflow_scripts.models import checkpoint_files, tensors
from workflow_scripts.settings import RunSettings, is_local, settings_from_json

OUTPUT_VERSION = 1
# What decides how a model computes, beside its weights.
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

    commit = None
    with files.atomic_folder(arguments.merged) as folder:
        judged = folder
        if is_local(run.merged):
            # Messages then name the user's files, not links that go with this folder.
            judged = Path(run.merged).expanduser().resolve()
            link(judged, folder)
        else:
            commit = hub.download(
                run.merged,
                run.revision,
                folder,
                kind="merged model",
                key="runs.<name>.merged",
                wanted=list(user_models.MODEL_FILES),
            )
        facts = Facts.read(arguments.facts)
        check_shape(judged, facts)
        checkpoint_files.check_whole(judged, checkpoint_files.read_shape(judged))
        tensors.check_all_values(checkpoint_files.weight_files(judged))
        complete(folder, arguments.tokenizer, facts)
        GivenOrigin(source=run.merged, commit=commit).write(folder / "source.json")
    logger.info("wrote source=%s path=%s", run.merged, arguments.merged)


def link(source: Path, folder: Path) -> None:
    """Symbolic links to the weights; the small files are copied, as some are completed here."""
    for path in user_models.model_files(source):
        if path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, folder / path.name)


def check_shape(folder: Path, facts: ModelShape) -> None:
    """
    Raises:
        StageError: the model is no fine-tune of the base.
    """
    found, wanted = (
        one.model_dump(include=set(SHAPE)) | {"rope_scaling": stretched(one)}
        for one in (checkpoint_files.read_shape(folder), facts)
    )
    differing = [key for key in (*SHAPE, "rope_scaling") if found[key] != wanted[key]]
    if differing:
        raise StageError(
            "the merged model is not of the shape of its base",
            where=f"config.json: {', '.join(differing)}",
            found=log.fields({key: found[key] for key in differing}),
            expected=log.fields({key: wanted[key] for key in differing}),
            to_fix="set runs.<name>.model to the base that it was made of; where there is none"
            " (tokens added), name the model's own folder under `models` too",
        )


def stretched(facts: ModelShape) -> RopeParameters:
    """How positions are stretched, in the form of `rope_parameters`; not at all is {}."""
    rope = {key: value for key, value in facts.rope_parameters.items() if key != "rope_theta"}
    return {} if rope.get("rope_type", "default") == "default" else rope


def complete(folder: Path, tokenizer: Path, facts: ModelShape) -> None:
    """What plain `from_pretrained` wants beside the weights."""
    config = files.read_json(folder / "config.json")
    # Without the key MistralConfig would fill in a window of 4096.
    files.write_json(folder / "config.json", config | {"sliding_window": facts.sliding_window})
    if not (folder / "generation_config.json").is_file():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        files.write_json(folder / "generation_config.json", tokens)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
