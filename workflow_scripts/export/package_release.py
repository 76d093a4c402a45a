"""Package a run for people: GGUFs, Ollama Modelfile, model card, checksums, provenance.

python -m workflow_scripts.export.package_release --name mistral --settings '{…}' --ggufs *.gguf
    --facts facts.json --tokenizer tokenizer/ --checkpoint checkpoint/ --beginning
    training_manifest.json --checks merged_check.json gguf_check.json --scores base.json …
    --dataset clean/*.parquet --config '{…}' --published '{…}' --release release/
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow_scripts import files, log
from workflow_scripts.durations import durations
from workflow_scripts.export import model_card, modelfile, provenance, tensor_types
from workflow_scripts.models.checkpoint import served_context
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.settings import GgufSettings, RunSettings, settings_from_json

OUTPUT_VERSION = 5
logger = log.stage_logger("package_release")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--name", required=True, help="name of the run")
    parser.add_argument("--settings", required=True, help="JSON of `runs.<name>`")
    parser.add_argument("--ggufs", type=Path, nargs="+", required=True, help="the last is served")
    parser.add_argument("--facts", type=Path, required=True, help="facts of the base model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of export_tokenizer")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the base model")
    parser.add_argument(
        "--beginning",
        type=Path,
        required=True,
        help="training manifest, source.json of an adapter, or the folder of a model, as given",
    )
    parser.add_argument("--checks", type=Path, nargs="+", required=True, help="the gates' JSON")
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="of every link")
    parser.add_argument("--dataset", type=Path, nargs="+", required=True, help="cleaned splits")
    parser.add_argument("--config", required=True, help="JSON: the entries that the run combines")
    parser.add_argument("--benchmarks", type=Path, help="folder of Snakemake's benchmarks")
    parser.add_argument("--published", default="{}", help="JSON of `origin.published`")
    parser.add_argument("--release", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
    config = json.loads(arguments.config)
    gguf_settings = settings_from_json(GgufSettings, json.dumps(config["gguf"]))
    facts = files.read_json(arguments.facts)
    scores = {path.stem: files.read_json(path) for path in arguments.scores}
    source_file = arguments.checkpoint / "source.json"
    source = files.read_json(source_file) if source_file.is_file() else {"source": run.model}

    with files.atomic_folder(arguments.release) as folder:
        for gguf in arguments.ggufs:
            files.copy_or_link(gguf, folder / gguf.name)
        default = arguments.ggufs[-1].name
        files.write_text(
            folder / "Modelfile",
            modelfile.modelfile(
                default,
                tokenizer_version=facts["tokenizer_version"],
                context_tokens=served_context(facts),
            ),
        )
        # Mistral's own tokenizer file: what the release is served with, and can be checked by.
        shipped = ("chat_template.jinja", "tokenizer_config.json")
        shipped += (find_tokenizer(arguments.tokenizer, facts["tokenizer_version"]).name,)
        for name in shipped:
            files.copy_or_link(arguments.tokenizer / name, folder / name)
        given, manifest = read_beginning(run, arguments.beginning)
        contents = {
            path.name: tensor_types.written(
                path, facts, gguf_settings, model_card.quantization(path, arguments.name)
            )
            for path in arguments.ggufs
        }
        card = model_card.model_card(
            arguments.name,
            run,
            model_card.front_matter(json.loads(arguments.published)),
            source=provenance.without_folders(source),
            facts=facts,
            manifest=manifest,
            scores=scores,
            ggufs=arguments.ggufs,
            contents=contents,
            gguf_settings=gguf_settings,
        )
        files.write_text(folder / "README.md", card)
        origin = {
            "run": arguments.name,
            **provenance.without_folders(run.model_dump()),
            "context_tokens": served_context(facts),
            "config": provenance.without_folders(config),
            "base": provenance.without_folders(source),
            "base_files": facts["files"],
            "dataset_files": provenance.hashes(arguments.dataset),
            **({"given": provenance.without_folders(given)} if given else {}),
            "training": manifest,
            "gguf_contents": contents,
            "gates": {path.stem: files.read_json(path) for path in arguments.checks},
            "scores": scores,
            "packages": provenance.versions(),
            "python": platform.python_version(),
            "git_revision": provenance.git_revision(),
            "hardware": provenance.hardware(),
            "duration_seconds": (durations(arguments.benchmarks) if arguments.benchmarks else {}),
        }
        files.write_json(folder / "provenance.json", origin)
        released = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
        sums = [f"{files.sha256(path)}  {path.name}" for path in released]
        files.write_text(folder / "SHA256SUMS", "\n".join(sums) + "\n")
    logger.info("packaged n_files=%d path=%s", len(sums) + 1, arguments.release)


def read_beginning(
    run: RunSettings, path: Path
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """What a run began with, where it was given; and how it was trained, as far as that is known.

    Args:
        path: of `--beginning`.
    """
    content = files.read_json(path / "source.json" if run.merged else path)
    if run.is_trained:
        return None, content
    return content, content.pop("training", None)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
