from __future__ import annotations

import json

import pytest

from tests import hub_server
from tests.unit.doctor.conftest import model_overlay

COMMIT = "a" * 40
# Mistral 7B's shape; the weights are a few bytes.
CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_hidden_layers": 32,
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "torch_dtype": "bfloat16",
}  # fmt: skip
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": bytes(7000),
    "consolidated.safetensors": bytes(9000),
    "consolidated.safetensors.index.json": bytes(900),
}
ASK = """
import dataclasses, json, sys
from pathlib import Path
from workflow_scripts.doctor import hub_access
from workflow_scripts.doctor.requirements import Wanted, read_config
from workflow_scripts.settings import config_files
wanted = Wanted(read_config([config_files.DEMO, Path({overlay!r})]), Path({results!r}))
found = [dataclasses.asdict(one) for one in hub_access.findings(wanted)]
shapes = {{name: shape.model_dump() for name, shape in wanted.shapes.items()}}
print(json.dumps([found, wanted.download_bytes, shapes]))
"""


@pytest.fixture
def ask_hub(run_python, tmp_path):
    """The Hub's findings for an overlay, in a process that can reach no other Hub."""

    def ask(endpoint, overlay, *, is_offline=False, cache=tmp_path / "cache"):
        path = tmp_path / "overlay.yaml"
        path.write_text(json.dumps(overlay))
        code = ASK.format(
            overlay=str(path),
            results=str(tmp_path / "results"),
        )
        environment = hub_server.environment(endpoint, offline=is_offline)
        done = run_python(code, **environment, HF_HOME=str(cache))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def test_a_model_that_may_be_read_reports_its_size_and_shape(ask_hub):
    repository = hub_server.Repository({COMMIT: FILES})
    with hub_server.serving({"models/owner/model": repository}) as hub:
        found, sizes, shapes = ask_hub(hub.address, model_overlay("owner/model"))
    assert [one["status"] for one in found] == ["ok"]
    # Only what fetch_base_model takes: the weights are not counted twice.
    assert sizes == {"m": 7000 + len(FILES["config.json"])}
    assert shapes["m"]["n_kv_heads"] == 8 and shapes["m"]["sliding_window"] is None
    assert not any("model.safetensors" in path for path in hub.requests)


def test_a_gated_model_names_the_page_where_its_licence_is_accepted(ask_hub):
    repository = hub_server.Repository({COMMIT: FILES}, is_gated=True)
    with hub_server.serving({"models/owner/model": repository}) as hub:
        ((found,), _, _) = ask_hub(hub.address, model_overlay("owner/model"))
    assert found["status"] == "missing" and "gated" in found["found"]
    assert "https://huggingface.co/owner/model" in found["found"]
    assert "accept the licence" in found["to_fix"] and "HF_TOKEN" in found["to_fix"]
    assert "doctor" not in found["to_fix"]


CHATS = {
    "datasets": {"chats": {"hub": "owner/chats", "revision": COMMIT}},
    "runs": {"mistral": {"dataset": "chats"}},
    "build": ["mistral"],
}


def test_a_gated_dataset_is_noticed_although_anyone_may_read_about_it(ask_hub):
    repository = hub_server.Repository({COMMIT: {"a.jsonl": b"{}"}}, is_gated=True)
    with hub_server.serving({"datasets/owner/chats": repository}) as hub:
        ((found,), _, _) = ask_hub(hub.address, CHATS)
    assert found["status"] == "missing" and "datasets.chats.hub" in found["found"]
    assert "accept the licence" in found["to_fix"]


def test_a_repository_or_revision_that_does_not_exist_is_named(ask_hub):
    repository = hub_server.Repository({COMMIT: FILES})
    with hub_server.serving({"models/owner/model": repository}) as hub:
        ((no_model,), _, _) = ask_hub(hub.address, model_overlay("owner/modle"))
        overlay = model_overlay("owner/model", revision="b" * 40)
        ((no_revision,), _, _) = ask_hub(hub.address, overlay)
    assert no_model["status"] == no_revision["status"] == "missing"
    assert "not on the Hub" in no_model["found"]
    assert "no such revision" in no_revision["found"]


def test_without_a_connection_only_the_first_repository_is_asked(ask_hub):
    overlay = model_overlay("owner/model")
    overlay["models"]["n"] = {"source": "owner/other"}
    overlay["runs"]["s"] = {**overlay["runs"]["r"], "model": "n"}
    overlay["build"] = ["r", "s"]
    found, _, _ = ask_hub(hub_server.NOBODY_LISTENS, overlay)
    assert [one["status"] for one in found] == ["missing", "missing"]
    assert "cannot be reached" in found[0]["found"] and found[1]["found"] == "1 more not asked"


def test_offline_mode_names_what_to_fetch_elsewhere(ask_hub):
    ((found,), _, _) = ask_hub(
        hub_server.NOBODY_LISTENS, model_overlay("owner/model"), is_offline=True
    )
    assert found["status"] == "missing"
    assert "HF_HUB_OFFLINE" in found["found"] and "owner/model" in found["found"]
    assert "source: ./folder" in found["to_fix"]


def test_in_offline_mode_a_dataset_may_be_in_the_cache(ask_hub):
    ((found,), _, _) = ask_hub(hub_server.NOBODY_LISTENS, CHATS, is_offline=True)
    assert found["status"] == "warning" and "owner/chats, unless the cache" in found["found"]


def test_a_cache_that_cannot_be_written_is_missing(ask_hub, tmp_path):
    (tmp_path / "file").write_text("no folder")
    ((found,), _, _) = ask_hub(
        hub_server.NOBODY_LISTENS, model_overlay("owner/model"), cache=tmp_path / "file" / "cache"
    )
    assert found["name"] == "Hub's cache"
    assert found["status"] == "missing" and "HF_HOME" in found["to_fix"]


def test_a_fetched_model_is_not_requested_again(ask_hub, tmp_path):
    (tmp_path / "results" / "models" / "m" / "checkpoint").mkdir(parents=True)
    ((found,), _, _) = ask_hub(hub_server.NOBODY_LISTENS, model_overlay("owner/model"))
    assert found["status"] == "ok" and "not asked" in found["found"]
