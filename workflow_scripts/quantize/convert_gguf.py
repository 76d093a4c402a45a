"""Convert the merged model, or a base, to an F16 GGUF with llama.cpp's own converter.

The context that the file advertises is capped at the sliding window where the model has one:
llama.cpp ignores a Mistral's window, and beyond it computes another model than was trained.
Stretched positions (linear, YaRN) go into the metadata; dynamic NTK has no key there.

python -m workflow_scripts.quantize.convert_gguf --merged merged/ --facts facts.json --name my-run
    --gguf my-run-F16.gguf
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
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
        "--tokenizer", type=Path, help="folder of export_tokenizer, where the model is a base"
    )
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base: its window")
    parser.add_argument("--name", required=True, help="the model's name in the file's metadata")
    parser.add_argument("--published", default="{}", help="JSON of `attribution.published`")
    parser.add_argument("--gguf", type=Path, required=True, help="to write: F16 GGUF")
    arguments = parser.parse_args(argv)
    facts = Facts.read(arguments.facts)
    config = files.read_json(arguments.merged / "config.json")
    if arguments.tokenizer:  # a merged model's positions are stretched already
        config = stretched_config(config, facts)
    check_vocabulary(arguments.tokenizer or arguments.merged, facts)
    check_positions(arguments.merged, config, facts)

    with tempfile.TemporaryDirectory() as name, files.atomic_file(arguments.gguf) as gguf:
        staged = Path(name)
        config = config | {"max_position_embeddings": facts.served_context_tokens}
        folders = [folder for folder in (arguments.merged, arguments.tokenizer) if folder]
        stage_model(folders, staged, config=config)
        command = [sys.executable, str(llama_cpp_source.converter()), str(staged)]
        published: attribution.Published = json.loads(arguments.published)
        metadata = staged / "metadata.json"
        files.write_json(metadata, attribution.gguf_metadata(published))
        if "license" in published:  # which the converter reads from a model card alone
            files.write_text(staged / "README.md", f"---\nlicense: {published['license']}\n---\n")
        command += ["--outfile", str(gguf), "--outtype", "f16", "--model-name", arguments.name]
        command += ["--metadata", str(metadata)]
        # The converter says why it fails on stderr, which is this stage's log.
        if subprocess.run(command, check=False).returncode or not gguf.is_file():
            # Of a full disk it says no more than how much it could not write.
            n_bytes = sum(path.stat().st_size for path in arguments.merged.glob("*.safetensors"))
            free = shutil.disk_usage(arguments.gguf.parent).free
            raise StageError(
                "llama.cpp's converter failed",
                where=arguments.merged,
                found=" ".join(command),
                to_fix=f"see its message above; the file takes {n_bytes / 1e9:.1f} GB, and"
                f" {free / 1e9:.1f} GB are free",
            )
    logger.info(
        "converted size_bytes=%d context_tokens=%d path=%s",
        arguments.gguf.stat().st_size,
        facts.served_context_tokens,
        arguments.gguf,
    )


def stage_model(folders: Sequence[Path], staged: Path, *, config: ConfigJson) -> None:
    """Links to the files of all folders, the last one's first, and the config to convert with.

    But for tekken.json: beside it, transformers loads a tokenizer that llama.cpp's converter does
    not know, and tokenizer.json holds the same.
    """
    paths = {path.name: path for folder in folders for path in folder.iterdir()}
    for name, path in paths.items():
        if name not in ("config.json", "tekken.json"):
            (staged / name).symlink_to(path.resolve())
    files.write_json(staged / "config.json", config)


def check_vocabulary(merged: Path, facts: ModelShape) -> None:
    """Embedding rows and tokens must agree: the converter would not mind, and loading would
    fail."""
    from transformers import AutoTokenizer

    n_tokens = len(AutoTokenizer.from_pretrained(merged))
    if n_tokens != facts.vocabulary_size:
        raise StageError(
            "the tokenizer does not fit the model",
            where=merged,
            found=f"{n_tokens} tokens",
            expected=f"{facts.vocabulary_size} rows of embeddings",
        )


def check_positions(merged: Path, config: ConfigJson, facts: ModelShape) -> None:
    """llama.cpp must compute the positions the model was trained with: of dynamic NTK the converter
    would write nothing, and exit with 0."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (rope.get("rope_type") or rope.get("type")) == "dynamic":
        raise StageError(
            "GGUF has no form of dynamic NTK",
            where=f"{merged / 'config.json'}, rope_parameters",
            found="dynamic",
            expected="linear, yarn or none (models.<name>.rope_scaling.type)",
            to_fix="train with yarn, or stop at the target `train`",
        )
    # A merge made before the config asked for the scaling would be converted without it.
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
