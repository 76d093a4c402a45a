"""Pushing to a Hub on this machine, over HTTP, with huggingface_hub itself.

Uploads use LFS here; uploads by Xet to the real Hub are up to the library.
"""

from __future__ import annotations

import json
import shutil

import pytest

from tests import hub_server, hub_uploads
from workflow_scripts import files

TOKEN = "hf_secretOfTheTest"
STAGE = "workflow_scripts.release.push_release"


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "run-Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 4096)
    (folder / "Modelfile").write_text("FROM ./run-Q4_K_M.gguf\n")
    (folder / "README.md").write_text("---\nbase_model: owner/name\n---\n# run\n")
    files.write_json(folder / "provenance.json", {"run": "run"})
    write_sums(folder)
    (folder / ".snakemake_timestamp").touch()  # as in every folder that a rule made
    return folder


def released(folder):
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def write_sums(folder):
    paths = [path for path in released(folder) if path.name != "SHA256SUMS"]
    lines = [f"{files.sha256(path)}  {path.name}\n" for path in paths]
    (folder / "SHA256SUMS").write_text("".join(lines))


@pytest.fixture
def hub():
    with hub_uploads.serving(TOKEN, "me") as hub:
        yield hub


@pytest.fixture
def push(run_stage, hub):
    def run(release, token=TOKEN, **settings):
        environment = hub_server.environment(hub.address) | {"HF_TOKEN": token}
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1"}
        text = json.dumps({"owner": "me", "dry_run": False, **settings})
        return run_stage(STAGE, "--releases", release, "--settings", text, **environment)

    return run


def test_a_push_leaves_every_file_on_the_hub_as_it_is_here(push, hub, release):
    done = push(release)
    assert done.returncode == 0, done.stderr
    (name,) = hub.repositories
    assert name == "me/run-GGUF"
    uploaded = hub.repositories[name]
    assert uploaded.is_private
    assert uploaded.files == {path.name: path.read_bytes() for path in released(release)}
    assert uploaded.lfs_paths == {"run-Q4_K_M.gguf"}
    assert uploaded.commits == ["Release of run"]
    assert f"{hub.address}/me/run-GGUF/commit/" in done.stderr


def test_the_token_is_written_nowhere(push, hub, release):
    """Not even if the library logs its requests, or the Hub refuses them."""
    for done in (push(release), push(release, owner="another")):
        assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN in request for request in hub.requests)
    for path in release.iterdir():
        assert TOKEN.encode() not in path.read_bytes()


def test_a_dry_run_lists_the_uploads_and_contacts_nobody(push, hub, release):
    done = push(release, token="", dry_run=True)
    assert done.returncode == 0, done.stderr
    assert not hub.requests
    for path in released(release):
        assert f"{path.stat().st_size:,}  me/run-GGUF/{path.name}" in done.stdout
    assert "nothing was uploaded" in done.stdout


def test_a_dry_run_is_the_default(run_stage, hub, release):
    environment = hub_server.environment(hub.address) | {"HF_TOKEN": TOKEN}
    done = run_stage(STAGE, "--releases", release, "--settings", '{"owner": "me"}', **environment)
    assert done.returncode == 0
    assert not hub.requests


def test_a_second_push_sends_only_changed_files(push, hub, release):
    push(release)
    assert hub.requests.count("PUT object") == 1
    again = push(release)
    # Nothing to commit: the library then requests the last commit.
    assert hub.requests.count("PUT object") == 1
    assert len(hub.repositories["me/run-GGUF"].commits) == 1, again.stderr
    (release / "README.md").write_text("---\nbase_model: owner/name\n---\n# better\n")
    write_sums(release)
    done = push(release)
    assert done.returncode == 0, done.stderr
    assert hub.requests.count("PUT object") == 1
    assert hub.repositories["me/run-GGUF"].files["README.md"].endswith(b"# better\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "hf_wrong"}, "the Hub refuses the upload"),
        ({"owner": "another"}, "the Hub refuses the upload"),
        ({"token": ""}, "there is no token to upload with"),
        ({"owner": None}, "push.owner"),
    ],
)
def test_a_push_that_is_not_allowed_ends_with_a_message(push, hub, release, options, message):
    done = push(release, **options)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not hub.repositories


def test_a_login_on_the_machine_is_not_used(push, hub, release, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token" in push(release, token="").stderr
    assert not hub.requests


def test_a_damaged_release_is_not_pushed(push, hub, release, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(release, damaged)
    with (damaged / "run-Q4_K_M.gguf").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\xff")
    done = push(damaged)
    assert done.returncode == 1
    assert "was changed" in done.stderr and "run-Q4_K_M.gguf" in done.stderr
    (release / "notes.txt").write_text("mine")
    done = push(release)
    assert done.returncode == 1 and "notes.txt" in done.stderr
    assert not hub.requests


def test_a_card_that_the_hub_refuses_is_reported_before_any_upload(push, hub, release):
    (release / "README.md").write_text("---\nbase_model: {a: 1}\n---\n# run\n")
    write_sums(release)
    done = push(release)
    assert done.returncode == 1
    assert "Invalid metadata" in done.stderr and "Traceback" not in done.stderr
    assert not hub.objects


def test_an_upload_that_breaks_off_makes_no_commit(push, hub, release):
    hub.fails_after = 0
    done = push(release)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert hub.repositories["me/run-GGUF"].commits == []
    hub.fails_after = None
    assert push(release).returncode == 0
    assert len(hub.repositories["me/run-GGUF"].files) == 5


def test_no_connection_ends_with_a_message(run_stage, release):
    environment = hub_server.environment(hub_server.NOBODY_LISTENS) | {"HF_TOKEN": TOKEN}
    settings = '{"owner": "me", "dry_run": false}'
    done = run_stage(STAGE, "--releases", release, "--settings", settings, **environment)
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr and TOKEN not in done.stderr


def test_help_starts_without_the_library(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert not imported & {"huggingface_hub", "torch", "transformers"}
