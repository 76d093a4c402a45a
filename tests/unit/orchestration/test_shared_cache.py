from __future__ import annotations

import pytest

from workflow_scripts.log import StageError
from workflow_scripts.orchestration import shared_cache
from workflow_scripts.settings import load_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(model: dict, dataset: dict):
    return load_config(
        {
            "models": {"base": model},
            "datasets": {"mine": dataset},
            "packings": {"rows": {}},
            "recipes": {"lora": {}},
            "runs": {"run": dict(model="base", dataset="mine", packing="rows", recipe="lora")},
            "build": ["run"],
        }
    )


@pytest.fixture(autouse=True)
def location(monkeypatch, tmp_path):
    monkeypatch.setenv(shared_cache.LOCATION, str(tmp_path))


PINNED = {"source": "owner/base", "revision": COMMIT}
FILES = {"files": ["chats.jsonl"]}


@pytest.mark.parametrize("model", [PINNED, {"source": "./folder"}])
@pytest.mark.parametrize("dataset", [FILES, {"hub": "owner/chats", "revision": COMMIT}])
def test_inputs_that_the_config_fixes_are_shared(model, dataset):
    shared_cache.check(config(model, dataset), ["run"], [])


@pytest.mark.parametrize(
    ("model", "dataset", "named"),
    [
        ({"generate": {}}, FILES, "models.base.generate"),
        ({"transplant": {}}, FILES, "models.base.transplant"),
        ({"source": "owner/base"}, FILES, "models.base.revision: None"),
        ({"source": "owner/base", "revision": "main"}, FILES, "models.base.revision: main"),
        (PINNED, {"generate": {}}, "datasets.mine.generate"),
        (PINNED, {"hub": "owner/chats", "revision": "main"}, "owner/chats, revision: main"),
        (PINNED, {"files": ["s3://bucket/chats.jsonl"]}, "s3://bucket/chats.jsonl"),
    ],
)
def test_inputs_that_can_change_are_refused(model, dataset, named):
    with pytest.raises(StageError, match="inputs that cannot change") as error:
        shared_cache.check(config(model, dataset), ["run"], [])
    assert named in str(error.value)


def test_a_named_rule_is_refused():
    with pytest.raises(StageError, match="must not name rules") as error:
        shared_cache.check(config(PINNED, FILES), ["run"], ["convert_gguf"])
    assert "convert_gguf" in str(error.value)


@pytest.mark.parametrize("place", [None, "/nowhere"])
def test_a_missing_folder_is_refused_before_any_job(monkeypatch, place):
    if place:
        monkeypatch.setenv(shared_cache.LOCATION, place)
    else:
        monkeypatch.delenv(shared_cache.LOCATION)
    with pytest.raises(StageError, match=shared_cache.LOCATION):
        shared_cache.check(config(PINNED, FILES), ["run"], [])


def test_the_content_of_a_folder_is_the_bytes_of_its_files(tmp_path):
    for name, byte in (("one", b"a"), ("same", b"a"), ("other", b"b")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(byte * 1000)
    one, same, other = (
        shared_cache.content_of(tmp_path / name) for name in ("one", "same", "other")
    )
    assert one == same != other
