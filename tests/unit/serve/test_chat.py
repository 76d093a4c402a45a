from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.unit.serve.conftest import LEN

ANSWER = "It counts the items of a container."


def talk(released, text, *arguments):
    command = [sys.executable, "-m", "workflow_scripts.serve.chat", str(released)]
    return subprocess.run(
        [*command, "--temperature", "0", "--threads", "1", *arguments],
        cwd=REPOSITORY,
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_through_a_pipe_only_answers_go_to_stdout_and_the_history_is_kept(released):
    done = talk(released, f"{LEN}\nAnd of «str»?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{ANSWER}\nGröße.\n"
    assert "Traceback" not in done.stderr
    speeds = [line for line in done.stderr.splitlines() if line.count("tokens/s") == 2]
    assert len(speeds) == 2


def test_a_flag_or_command_sets_the_system_prompt_and_new_starts_a_chat(released):
    done = talk(released, "Size of int?\n", "--system", "Answer in one word.")
    assert done.stdout == "28 – mostly.\n"
    commands = f"{LEN}\n/new\n/system Answer in one word.\nSize of int?\n/quit\n{LEN}\n"
    assert talk(released, commands).stdout == f"{ANSWER}\n28 – mostly.\n"


def test_a_backslash_continues_the_message_in_the_next_line(released):
    from workflow_scripts.serve.chat import messages_of

    class Lines(list):
        def isatty(self):
            return False

    lines = Lines(["One\\\n", "two\n", "\n", "three\n", "four\\\n"])
    assert list(messages_of(lines)) == ["One\ntwo", "three", "four\n"]


def test_old_turns_are_forgotten_and_a_message_that_never_fits_is_reported(released):
    lines = [*[LEN] * 5, LEN * 60, LEN]
    done = talk(released, "\n".join(lines), "--n-ctx", "64")
    assert done.returncode == 0, done.stderr
    assert "does not fit into the context" in done.stderr
    assert "forgot the oldest turns" in done.stderr
    assert done.stdout.splitlines()[-1] == ANSWER  # the message that did not fit left no trace


def test_in_a_terminal_it_prompts_and_streams(released):
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "workflow_scripts.serve.chat", str(released)]
    process = subprocess.Popen(
        [*command, "--temperature", "0", "--threads", "1"],
        cwd=REPOSITORY,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    seen = b""

    def wait_for(text):
        nonlocal seen
        ends = time.monotonic() + 60
        while text not in seen and time.monotonic() < ends:
            seen += os.read(master, 4096)
        assert text in seen, seen.decode()

    wait_for(b"> ")
    os.write(master, f"{LEN}\n".encode())
    wait_for(ANSWER.encode())
    wait_for(b"tokens/s")
    os.write(master, b"/quit\n")
    assert process.wait(timeout=30) == 0
    os.close(master)


@pytest.mark.parametrize("missing", ["nothing", "a folder"])
def test_no_release_ends_with_a_message(run_stage, tmp_path, missing):
    path = tmp_path / "none" if missing == "nothing" else tmp_path
    done = run_stage("workflow_scripts.serve.chat", path)
    assert done.returncode == 1
    assert str(path) in done.stderr and "Traceback" not in done.stderr


def test_help_starts_without_llama_cpp(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.serve.chat")
    assert done.returncode == 0
    assert not imported & {"llama_cpp", "mistral_common", "torch"}
