"""`--cache`: two working copies of the workflow share a base model, tokens and the base's GGUF."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import hub_server
from tests.workflow.conftest import (
    DEMO,
    REPOSITORY,
    Snakemake,
    copy_workflow,
    jobs_of,
    snakemake_in,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"
SHARED = re.compile(r"Output file (\S+) will be (obtained from|written to) global")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, with random weights."""
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    settings = {"n_layers": 1, "intermediate_size": 256}
    command = [sys.executable, "-m", "workflow_scripts.demo.build_random_model", "--settings"]
    command += [json.dumps(settings), "--checkpoint", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@dataclass
class Site:
    """A Hub, a folder for what is shared, and working copies."""

    hub: hub_server.Hub
    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def copy(self, name: str) -> Snakemake:
        working = self.folder / name
        if not working.exists():
            working.mkdir()
            copy_workflow(working)
        environment = hub_server.environment(self.hub.address)
        environment |= {"HF_HOME": str(working / "hub"), "SNAKEMAKE_OUTPUT_CACHE": str(self.cache)}
        return snakemake_in(working, **environment)


@pytest.fixture(scope="module")
def site(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    content = {path.name: path.read_bytes() for path in base.iterdir()}
    content.pop("source.json", None)
    changed = content | {"README.md": b"another commit"}
    folder = tmp_path_factory.mktemp("site")
    (folder / "cache").mkdir()
    repository = hub_server.Repository({COMMIT: content, OTHER: changed})
    with hub_server.serving({"models/owner/base": repository}) as hub:
        yield Site(hub, folder)


def arguments(
    folder: Path, dataset: str = "mine", source: str = "owner/base", **changes: object
) -> tuple[object, ...]:
    """Tokens of the sample chats, and of a base on the Hub its GGUF."""
    is_local = source.startswith(".")
    cleaning = {"validation_fraction": 0.3, "test_fraction": 0.3, "max_rejected_fraction": 1}
    content = {
        "models": {"base": {"source": source, **({} if is_local else {"revision": COMMIT})}},
        "datasets": {
            dataset: {
                "files": ["data/sample-chats.jsonl"],
                "cleaning": cleaning,
                "rendering": {"max_rejected_fraction": 1},
            }
        },
        "runs": {
            "mine": {
                "model": "base",
                "dataset": dataset,
                "packing": "standard-demo",
                "recipe": "generic-lora-demo",
            }
        },
        "build": ["mine"],
    }
    for path, value in changes.items():
        *keys, last = path.split("__")
        entry = content
        for key in keys:
            entry = entry[key]
        entry[last] = value
    config = folder / "mine.yaml"
    config.write_text(yaml.safe_dump(content))
    files = (f"results/data/{dataset}/base/tokens/train.arrow",)
    return (
        *files,
        *(() if is_local else (GGUF,)),
        "--cores",
        2,
        "--cache",
        "--configfile",
        DEMO,
        config,
    )


GGUF = "results/models/base/gguf/base-F16.gguf"


@pytest.fixture(scope="module")
def first(site: Site) -> Path:
    """The working copy that made them."""
    folder = site.folder / "first"
    result = site.copy("first")(*arguments(site.folder))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    return folder


def test_a_second_working_copy_makes_none_of_them(site: Site, first: Path) -> None:
    n_asked = len(site.hub.requests)
    assert n_asked
    second = site.folder / "second"
    # Its dataset has another name: that is in no file.
    command = arguments(site.folder, dataset="chats")
    result = site.copy("second")(*command)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    assert len(site.hub.requests) == n_asked
    # Of what was not run the log is there, empty.
    logs = (second / "logs").rglob("*.log")
    ran = {path.stem for path in logs if path.stat().st_size}
    assert ran == {"clean_dataset", "read_model_facts", "export_tokenizer"}
    tokens = Path("results", "data", "chats", "base", "tokens")
    shared = [Path(GGUF), *(tokens / f"{split}.arrow" for split in ("train", "test"))]
    shared += [path.relative_to(second) for path in (second / CHECKPOINT).glob("*.safetensors")]
    assert len(shared) == 4
    for path in shared:
        assert (second / path).is_symlink()
        assert (second / path).resolve().is_relative_to(site.cache)
    mine = (first / "results" / "data" / "mine" / "base" / "tokens" / "train.arrow").resolve()
    assert (second / tokens / "train.arrow").resolve() == mine
    assert jobs_of(site.copy("second")("-n", *command)) == {}


CHECKPOINT = Path("results", "models", "base", "checkpoint")


def fate(site: Site, name: str, *command: object) -> dict[str, str]:
    """Rule's output → whether a dry run would take it from the cache."""
    result = site.copy(name)("-n", *command)
    assert result.returncode == 0, result.stdout[-4000:]
    return {Path(path).name: how.split()[0] for path, how in SHARED.findall(result.stdout)}


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"datasets__mine__rendering__supervise": "last_turn"}, {"train.arrow"}),
        (
            {"models__base__revision": OTHER},
            {"checkpoint", "train.arrow", "base-F16.gguf"},
        ),
    ],
)
def test_what_a_changed_setting_changes_is_made(
    site: Site, first: Path, changes: dict, made: set[str]
) -> None:
    fates = fate(site, "third", *arguments(site.folder, **changes))
    assert fates.keys() == {"checkpoint", "train.arrow", "base-F16.gguf"}
    assert {name for name, how in fates.items() if how == "written"} == made


def test_a_model_in_a_folder_is_told_by_its_content(site: Site, base: Path) -> None:
    local = {"source": "./model"}
    for name in ("near", "far"):
        site.copy(name)
        shutil.copytree(base, site.folder / name / "model")
    result = site.copy("near")(*arguments(site.folder, **local))
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
    linked = site.folder / "near" / CHECKPOINT / "config.json"
    assert linked.resolve() == site.folder / "near" / "model" / "config.json"
    assert not linked.stat().st_mode & 0o002  # the user's own file, not writable by all
    obtained = {"train.arrow": "obtained"}
    assert fate(site, "far", *arguments(site.folder, **local)) == obtained
    weights = next((site.folder / "far" / "model").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    written = dict.fromkeys(obtained, "written")
    assert fate(site, "far", *arguments(site.folder, **local)) == written
