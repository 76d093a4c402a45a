from __future__ import annotations

import json

STAGE = "workflow_scripts.demo.build_demo_dataset"


def test_help_explains_without_torch(ask_for_help):
    done, imported = ask_for_help(STAGE)
    assert done.returncode == 0
    assert "--conversations" in done.stdout
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "transformers"})


def test_the_same_settings_give_the_same_bytes_in_any_environment(run_stage, tmp_path):
    surroundings = [
        {"PYTHONHASHSEED": "1"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C", "COLUMNS": "40", "HOME": str(tmp_path)},
    ]
    written = []
    for number, environment in enumerate(surroundings):
        path = tmp_path / f"{number}.jsonl"
        settings = '{"n_conversations": 250, "seed": 3}'
        done = run_stage(STAGE, "--settings", settings, "--conversations", path, **environment)
        assert done.returncode == 0, done.stderr
        assert "wrote n_conversations=250" in done.stderr
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert len(written[0].splitlines()) == 250
    fields = {frozenset(json.loads(line)) for line in written[0].splitlines()}
    chat = {"messages", "group"}
    assert fields == {frozenset(chat), frozenset(chat | {"reference"})}


def test_the_length_chooses_the_chats_and_mixed_is_the_default(run_stage, tmp_path):
    written = {}
    for length in (None, "mixed", "long"):
        settings = {"n_conversations": 50, "seed": 1} | ({"length": length} if length else {})
        path = tmp_path / "chats.jsonl"
        done = run_stage(STAGE, "--settings", json.dumps(settings), "--conversations", path)
        assert done.returncode == 0, done.stderr
        written[length] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert written["mixed"] == written[None]
    n_characters = {
        length: sorted(sum(len(one["content"]) for one in chat["messages"]) for chat in chats)
        for length, chats in written.items()
    }
    # Four in five chats are short.
    assert n_characters["mixed"][35] < 0.5 * n_characters["mixed"][45]
    assert "The code of " in json.dumps(written["long"])
    assert "The code of " not in json.dumps(written["mixed"])


def test_zero_conversations_are_refused(run_stage, tmp_path):
    path = tmp_path / "chats.jsonl"
    done = run_stage(STAGE, "--settings", '{"n_conversations": 0}', "--conversations", path)
    assert done.returncode == 1
    for part in ("build_demo_dataset: --settings cannot be used", "n_conversations: found 0"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.exists()
