"""Against what Snakemake itself writes: a small workflow is run for real."""

from __future__ import annotations

import graphlib
import re
import subprocess
import sys

import pytest

from workflow_scripts.durations import durations
from workflow_scripts.report import stages
from workflow_scripts.report.stages import Stage, Stages, stages_of

LONG = "long_" + "x" * 200
# The commands look like stages': a program of ours is named in them.
SNAKEFILE = f"""
rule make:
    output: "results/{{name}}.txt"
    log: "logs/{{name}}.log"
    benchmark: "benchmarks/make/{{name}}.tsv"
    shell: "sleep 0.5; : python -m workflow_scripts.chats.make; touch {{output}}"

rule fold:
    input: "results/a.txt"
    output: directory("results/folder"), "results/{LONG}.txt"
    log: "logs/fold.log"
    benchmark: "benchmarks/fold.tsv"
    shell: ": python -m workflow_scripts.take_gpus 1 python -m workflow_scripts.train.fold --x;"
           " sleep 0.7; mkdir {{output[0]}}; touch {{output[0]}}/inner.json {{output[1]}}"

rule gather:
    input: "results/folder", "results/b.txt", "given.txt"
    output: "results/gathered.txt"
    log: "logs/gather.log"
    benchmark: "benchmarks/gather.tsv"
    shell: "cat {{input[1]}} > {{output}}"

rule unasked:
    input: "results/gathered.txt"
    output: "results/unasked.txt"
    log: "logs/unasked.log"
    shell: "touch {{output}}"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    (folder / "Snakefile").write_text(SNAKEFILE)
    (folder / "given.txt").write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "results/unasked.txt"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def stages_behind(built, *files):
    return stages_of(files, built / ".snakemake" / "metadata")


def test_the_stages_behind_a_file_are_those_that_snakemake_ran_for_it(built):
    found = stages_behind(built, "results/gathered.txt")
    names = [(stage.room, stage.name, stage.n_jobs) for stage in found.stages]
    # A program by its room, a command of no program of ours by its rule; `unasked` comes later.
    assert names == [("", "gather", 1), ("chats", "make", 2), ("train", "fold", 1)]
    assert found.follows == {(1, 2), (1, 0), (2, 0)}
    assert found.n_unrecorded == 0
    assert stages_behind(built, "results/b.txt").follows == frozenset()


def test_a_file_in_a_folder_that_was_made_and_one_of_a_long_name_are_found(built):
    for file in ("results/folder/inner.json", f"results/{LONG}.txt"):
        found = stages_behind(built, file)
        assert [(stage.name, stage.n_jobs) for stage in found.stages] == [("make", 1), ("fold", 1)]
        assert found.n_unrecorded == 0


def test_times_are_those_of_snakemake_s_benchmarks(built):
    seconds = durations(built / "benchmarks")
    of_stage = {
        stage.name: stage.seconds for stage in stages_behind(built, "results/gathered.txt").stages
    }
    # A benchmark also counts what a shell takes to start and end: 0.03 s when this was written.
    assert of_stage["make"] == pytest.approx(seconds["make/a"] + seconds["make/b"], abs=0.4)
    assert of_stage["fold"] == pytest.approx(seconds["fold"], abs=0.2)
    assert of_stage["make"] > 1 and 0.7 < of_stage["fold"] < 1


def test_what_nobody_recorded_is_counted_and_half_a_record_is_none(built, tmp_path):
    found = stages_behind(built, "results/b.txt", "results/elsewhere.json")
    assert [stage.name for stage in found.stages] == ["make"] and found.n_unrecorded == 1
    assert stages_of(["results/b.txt"], tmp_path / "none") == Stages([], frozenset(), 1)
    [path] = [
        path for path in (built / ".snakemake" / "metadata").iterdir()
        if stages.recorded(path.parent).get("results/b.txt") == path
    ]  # fmt: skip
    kept = path.read_text()
    path.write_text(kept[:40])
    try:
        assert stages_behind(built, "results/b.txt").n_unrecorded == 1
    finally:
        path.write_text(kept)


def test_the_figure_has_a_box_a_stage_and_a_line_where_no_other_says_it(built):
    found = stages_behind(built, "results/gathered.txt")
    drawn = stages.figure(found, "How <it> came about")
    assert drawn.count("<rect") == 3
    # make → gather is said by make → fold → gather.
    assert len(re.findall(r'<path d="M[^"]*C', drawn)) == 2
    for text in (">fold<", ">train · 1 job · 1 s<", ">chats · 2 jobs · 1 s<", "How &lt;it&gt;"):
        assert text in drawn
    circle = Stages([Stage("a", "b", 1, 1.0)] * 2, frozenset({(0, 1), (1, 0)}), 0)
    with pytest.raises(graphlib.CycleError):
        stages.figure(circle, "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99.4, "99 s"), (100, "2 min"), (5_990, "100 min"), (9_000, "2.5 h")],
)
def test_times_are_said_in_the_unit_that_fits(seconds, text):
    assert stages.took(seconds) == text
