"""Package a run for people: GGUFs, Ollama Modelfile, model card, checksums, provenance.

python -m workflow_scripts.release.package_release --name mistral --settings '{…}' --ggufs *.gguf
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

from workflow_scripts import files, log
from workflow_scripts.durations import durations
from workflow_scripts.handover.facts import Facts
from workflow_scripts.handover.gates import GgufCheck, GivenMergedCheck, MergedCheck
from workflow_scripts.handover.origin import Origin
from workflow_scripts.handover.provenance import AnyManifest, Gates, GivenOrigin, Provenance
from workflow_scripts.handover.scores import Scores
from workflow_scripts.models.tokenizer_files import find_tokenizer
from workflow_scripts.quantize import tensor_types
from workflow_scripts.release import model_card, modelfile, provenance
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
        help="training manifest; or source.json of a given adapter, or folder of a given model",
    )
    parser.add_argument(
        "--checks", type=Path, nargs=2, required=True, help="merged_check.json and gguf_check.json"
    )
    parser.add_argument(
        "--scores", type=Path, nargs="+", required=True, help="scores of every link"
    )
    parser.add_argument("--dataset", type=Path, nargs="+", required=True, help="cleaned splits")
    parser.add_argument("--config", required=True, help="JSON: the tables that the run combines")
    parser.add_argument("--benchmarks", type=Path, help="folder of Snakemake's benchmarks")
    parser.add_argument("--published", default="{}", help="JSON of `origin.published`")
    parser.add_argument("--release", type=Path, required=True, help="to write: folder")
    arguments = parser.parse_args(argv)
    run = settings_from_json(RunSettings, arguments.settings)
    config = json.loads(arguments.config)
    gguf_settings = settings_from_json(GgufSettings, json.dumps(config["gguf"]))
    facts = Facts.read(arguments.facts)
    scores = {path.stem: Scores.read(path) for path in arguments.scores}
    source = read_base(arguments.checkpoint, run)
    given, manifest = read_beginning(run, arguments.beginning)
    contents = {
        path.name: tensor_types.written(
            path, facts, gguf_settings, model_card.quantization(path, arguments.name)
        )
        for path in arguments.ggufs
    }

    with files.atomic_folder(arguments.release) as folder:
        # Mistral's own tokenizer file: serving uses it, and the release can be checked with it.
        own = find_tokenizer(arguments.tokenizer, facts.tokenizer_version).name
        of_tokenizer = ("chat_template.jinja", "tokenizer_config.json", own)
        for path in [*arguments.ggufs, *(arguments.tokenizer / name for name in of_tokenizer)]:
            files.copy_or_link(path, folder / path.name)
        recipe = modelfile.modelfile(
            arguments.ggufs[-1].name,
            tokenizer_version=facts.tokenizer_version,
            context_tokens=facts.served_context_tokens,
        )
        files.write_text(folder / "Modelfile", recipe)
        card = model_card.model_card(
            arguments.name,
            run,
            model_card.front_matter(json.loads(arguments.published)),
            source=source,
            facts=facts,
            manifest=manifest,
            scores=scores,
            ggufs=arguments.ggufs,
            contents=contents,
            gguf_settings=gguf_settings,
        )
        files.write_text(folder / "README.md", card)
        made_of = Provenance(
            run=arguments.name,
            **provenance.without_folders(run.model_dump()),
            context_tokens=facts.served_context_tokens,
            config=provenance.without_folders(config),
            base=source,
            base_files=facts.files,
            dataset_files=provenance.hashes(arguments.dataset),
            given=given,
            training=manifest,
            gguf_contents=contents,
            gates=read_gates(run, *arguments.checks),
            scores=scores,
            packages=provenance.versions(),
            python=platform.python_version(),
            git_revision=provenance.git_revision(),
            hardware=provenance.hardware(),
            duration_seconds=durations(arguments.benchmarks) if arguments.benchmarks else {},
        )
        made_of.write(folder / "provenance.json")
        n_files = write_checksums(folder)
    logger.info("packaged n_files=%d path=%s", n_files, arguments.release)


def read_base(checkpoint: Path, run: RunSettings) -> Origin:
    """The origin of the base model, without folders of this machine."""
    path = checkpoint / "source.json"
    source = Origin.read(path) if path.is_file() else Origin(source=run.model)
    return source.changed(**provenance.without_folders(source.model_dump()))


def write_checksums(folder: Path) -> int:
    """Write SHA256SUMS of a folder's files; returns the number of files with it."""
    paths = sorted(folder.iterdir())
    sums = "".join(f"{files.sha256(path)}  {path.name}\n" for path in paths)
    files.write_text(folder / "SHA256SUMS", sums)
    return len(paths) + 1


def read_beginning(run: RunSettings, path: Path) -> tuple[GivenOrigin | None, AnyManifest | None]:
    """The adapter or model that a run was given, and the manifest of its training, if known.

    Args:
        path: value of `--beginning`.
    """
    if run.is_trained:
        return None, files.read_json(path)
    origin = GivenOrigin.read(path / "source.json" if run.merged else path)
    shown = provenance.without_folders(origin.model_dump(exclude={"training"}))
    return GivenOrigin.model_validate(shown), origin.training


def read_gates(run: RunSettings, merged_check: Path, gguf_check: Path) -> Gates:
    """The figures of the gates."""
    return Gates(
        merged_check=(GivenMergedCheck if run.merged else MergedCheck).read(merged_check),
        gguf_check=GgufCheck.read(gguf_check),
    )


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
