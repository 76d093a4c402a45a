from __future__ import annotations

import json
import shutil

import pytest

from tests import hub_server
from tests.hub_server import NOBODY_LISTENS, Repository
from workflow_scripts import files
from workflow_scripts.export import merge_base
from workflow_scripts.export.given import ADAPTER_FILES

STAGE = "workflow_scripts.export.fetch_adapter"
COMMIT, LATER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def fetch(run_stage, checkpoint, tmp_path):
    def run(endpoint=NOBODY_LISTENS, **settings):
        environment = hub_server.environment(endpoint)
        environment["HF_HUB_CACHE"] = str(tmp_path / "cache")
        text = json.dumps({"model": "m", "dataset": "d", **settings})
        arguments = ["--settings", text, "--checkpoint", checkpoint]
        return run_stage(STAGE, *arguments, "--adapter", tmp_path / "adapter", **environment)

    return run


@pytest.fixture
def given(uniform_adapter, tmp_path):
    """A copy of an adapter, to be damaged."""
    return shutil.copytree(uniform_adapter, tmp_path / "given")


def test_a_local_adapter_is_copied_with_a_note_of_where_it_was(fetch, given, tmp_path):
    done = fetch(adapter=str(given))
    assert done.returncode == 0, done.stderr
    fetched = tmp_path / "adapter"
    assert {path.name for path in fetched.iterdir()} == {*ADAPTER_FILES, "source.json"}
    for name in ADAPTER_FILES:
        assert not (fetched / name).is_symlink()
        assert (fetched / name).read_bytes() == (given / name).read_bytes()
    assert files.read_json(fetched / "source.json") == {"source": str(given)}


def test_the_dtype_that_training_noted_reaches_the_merge(fetch, given, checkpoint, tmp_path):
    files.write_json(given / "training_manifest.json", {"compute_dtype": "float16", "n_steps": 5})
    assert fetch(adapter=str(given)).returncode == 0
    origin = files.read_json(tmp_path / "adapter" / "source.json")
    assert origin["training"]["n_steps"] == 5
    dtype = merge_base.nf4_dtype("dequantized", tmp_path / "adapter", checkpoint)
    assert str(dtype) == "torch.float16"


def test_a_folder_below_home_is_found(fetch, given, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = fetch(adapter="~/given")
    assert done.returncode == 0, done.stderr
    assert files.read_json(tmp_path / "adapter" / "source.json") == {"source": "~/given"}


@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_what_is_missing_is_named_and_nothing_written(fetch, given, tmp_path, name):
    (given / name).unlink()
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    for part in ("the adapter is not there, or not whole", f"no {name}", "PEFT's save_pretrained"):
        assert part in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_a_pickle_is_refused_with_the_way_out(fetch, given):
    (given / "adapter_model.safetensors").rename(given / "adapter_model.bin")
    done = fetch(adapter=str(given))
    assert done.returncode == 1
    assert "save it again: adapter_model.bin is a pickle" in done.stderr


def test_an_adapter_of_another_base_is_refused_before_anything_is_made(
    fetch, make_checkpoint, make_adapter, tmp_path
):
    other = make_checkpoint(tmp_path / "other", hidden_size=128)
    make_adapter(other, tmp_path / "wide")
    done = fetch(adapter=str(tmp_path / "wide"))
    assert done.returncode == 1
    assert "the adapter does not fit the base model" in done.stderr
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_comes_from_the_hub_at_a_commit(fetch, uniform_adapter, tmp_path):
    content = {path.name: path.read_bytes() for path in uniform_adapter.iterdir()}
    content["training_manifest.json"] = b'{"compute_dtype": "float16"}'
    # What `main` has by now is another adapter.
    commits = {LATER: dict.fromkeys(content, b"later")}
    commits[COMMIT] = {**content, "README.md": b"a card", "adapter_model.bin": b"again"}
    repositories = {
        "models/owner/adapter": Repository(commits, names={"v0": COMMIT}),
        "models/owner/gated": Repository(commits, is_gated=True),
    }
    with hub_server.serving(repositories) as hub:
        done = fetch(adapter="owner/adapter", revision="v0", endpoint=hub.address)
        refused = fetch(adapter="owner/gated", endpoint=hub.address)
    assert done.returncode == 0, done.stderr
    noted = files.read_json(tmp_path / "adapter" / "source.json")
    assert (noted["source"], noted["commit"]) == ("owner/adapter", COMMIT)
    assert noted["compute_dtype"] == noted["training"]["compute_dtype"] == "float16"
    for name in ADAPTER_FILES:
        assert (tmp_path / "adapter" / name).read_bytes() == content[name]
    # Neither the pickle nor anything else of the repository is brought here.
    asked = {path.rpartition("/")[2] for path in hub.requests if "/resolve/" in path}
    assert asked == {*ADAPTER_FILES, "training_manifest.json"}
    assert refused.returncode == 1
    for part in ("the adapter is gated", "runs.<name>.adapter", "HF_TOKEN"):
        assert part in refused.stderr


def test_help_starts_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert imported.isdisjoint({"torch", "transformers", "peft"})
