"""Convert the merged model, or a base, to an F16 GGUF with llama.cpp's own converter.

If the model has a sliding window, the file advertises no more context than the window: llama.cpp
ignores a Mistral's window, and beyond it computes another model than the trained one. Stretched
positions (linear, YaRN) go into the metadata, which has no key for dynamic NTK.

python -m workflow_scripts.quantize.convert_gguf --merged merged/ --facts facts.json --name my-run
    --gguf my-run-F16.gguf
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from workflow_scripts import files, log
from workflow_scripts.handover.facts import Facts, ModelShape
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint_files import ConfigJson
from workflow_scripts.models.positions import stretched_config
from workflow_scripts.quantize import attribution, llama_cpp_source

OUTPUT_VERSION = 2
logger = log.stage_logger("convert_gguf")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--merged", type=Path, required=True, help="folder of merge_adapter")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of export_tokenizer, for a base model"
    )
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--name", required=True, help="the model's name in the file's metadata")
    parser.add_argument("--published", default="{}", help="JSON of `attribution.published`")
    parser.add_argument("--gguf", type=Path, required=True, help="to write: F16 GGUF")
    arguments = parser.parse_args(argv)

    from transformers import AutoTokenizer

    facts = Facts.read(arguments.facts)
    config = files.read_json(arguments.merged / "config.json")
    if arguments.tokenizer:  # the config of a merged model is stretched already
        config = stretched_config(config, facts)
    tokenizer = arguments.tokenizer or arguments.merged
    n_tokens = len(AutoTokenizer.from_pretrained(tokenizer))
    # The converter would accept another number, and loading would fail.
    if n_tokens != facts.vocabulary_size:
        raise StageError(
            "the tokenizer does not fit the model",
            where=tokenizer,
            found=f"{n_tokens} tokens",
            expected=f"{facts.vocabulary_size} rows of embeddings",
        )
    check_positions(arguments.merged, config, facts)

    with tempfile.TemporaryDirectory() as name, files.atomic_file(arguments.gguf) as gguf:
        staged = Path(name)
        config = config | {"max_position_embeddings": facts.served_context_tokens}
        folders = [folder for folder in (arguments.merged, arguments.tokenizer) if folder]
        stage_model(folders, staged, config=config)
        published: attribution.Published = json.loads(arguments.published)
        metadata = staged / "metadata.json"
        files.write_json(metadata, attribution.gguf_metadata(published))
        if "license" in published:  # the converter reads it only from a model card
            files.write_text(staged / "README.md", f"---\nlicense: {published['license']}\n---\n")
        options = ["--outtype", "f16", "--model-name", arguments.name, "--metadata", str(metadata)]
        llama_cpp_source.convert(
            "convert_hf_to_gguf.py", arguments.merged, gguf, *options, str(staged)
        )
    logger.info(
        "converted size_bytes=%d context_tokens=%d path=%s",
        arguments.gguf.stat().st_size,
        facts.served_context_tokens,
        arguments.gguf,
    )


def stage_model(folders: Sequence[Path], staged: Path, *, config: ConfigJson) -> None:
    """Link the files of all folders into one, and write the config to convert with.

    If two folders have a file of the same name, the last folder's is linked. tekken.json is left
    out: with it transformers loads a tokenizer that llama.cpp's converter does not know, and
    tokenizer.json holds the same.
    """
    paths = {path.name: path for folder in folders for path in folder.iterdir()}
    for name, path in paths.items():
        if name not in ("config.json", "tekken.json"):
            (staged / name).symlink_to(path.resolve())
    files.write_json(staged / "config.json", config)


def check_positions(merged: Path, config: ConfigJson, facts: ModelShape) -> None:
    """Check that llama.cpp will compute the positions of training: the converter would drop dynamic
    NTK and exit with 0."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) == "dynamic":
        raise StageError(
            "GGUF has no form of dynamic NTK",
            where=f"{merged / 'config.json'}, rope_parameters",
            found="dynamic",
            expected="linear, yarn or none (models.<name>.rope_scaling.type)",
            to_fix="train with yarn, or stop at the target `train`",
        )
    # A model that was merged before the config set the scaling would be converted without it.
    if facts.rope_scaling and rope != facts.rope_parameters:
        raise StageError(
            "the merged model's positions are not those it was trained with",
            where=f"{merged / 'config.json'}, rope_parameters",
            found=rope,
            expected=facts.rope_parameters,
            to_fix="merge again, with --facts",
        )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
