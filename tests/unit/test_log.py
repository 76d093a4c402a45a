from __future__ import annotations

import argparse
import logging

import pytest
from hypothesis import given, strategies as st

from workflow_scripts import log

RUN = """
import sys
from workflow_scripts import log
logger = log.stage_logger("speak")
def main():
    {body}
raise SystemExit(log.run_stage(main))
"""


def test_a_stage_error_reads_what_where_found_expected_to_fix():
    error = log.StageError(
        "a row is too long", where="row 3", found=12, expected="at most 8", to_fix="cut it"
    )
    assert str(error).splitlines() == [
        "a row is too long",
        "  where:    row 3",
        "  found:    12",
        "  expected: at most 8",
        "  to fix:   cut it",
    ]


def test_a_stage_error_omits_missing_parts():
    assert str(log.StageError("a file is missing")) == "a file is missing"
    # 0 and False are values, not missing ones.
    assert str(log.StageError("no rows", found=0)) == "no rows\n  found:    0"


def test_a_stage_that_ends_well_exits_0(run_python):
    done = run_python(RUN.format(body='logger.info("wrote %s", log.fields({"n_rows": 3}))'))
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.strip().endswith(" INFO speak: wrote n_rows=3")


def test_a_stage_error_is_exit_1_and_a_message_without_traceback(run_python):
    done = run_python(RUN.format(body='raise log.StageError("no rows", where="plan.parquet")'))
    assert done.returncode == 1
    assert done.stderr == "-c: no rows\n  where:    plan.parquet\n"
    assert done.stdout == ""


def test_our_own_bug_keeps_its_traceback(run_python):
    done = run_python(RUN.format(body="{}['rows']"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("KeyError: 'rows'")


def test_wrong_usage_is_exit_2(run_stage):
    done = run_stage("workflow_scripts.packing.pack_sequences", "--nonsense")
    assert done.returncode == 2
    assert "usage: pack_sequences.py" in done.stderr
    assert "Traceback" not in done.stderr


def test_fields_prints_numbers_short_and_leaves_tables_out():
    values = {"n_rows": 3, "fill_fraction": 0.123456789, "window": None, "table": {}, "list": []}
    assert log.fields(values) == "n_rows=3 fill_fraction=0.123457 window=None"


@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), st.integers()))
def test_fields_keeps_every_plain_value(values):
    pairs = [pair.split("=") for pair in log.fields(values).split()]
    assert {key: int(value) for key, value in pairs} == values


def test_versions_are_those_that_are_installed():
    import hypothesis

    assert log.versions("hypothesis") == f"hypothesis={hypothesis.__version__}"


@given(items=st.lists(st.integers()))
def test_progress_passes_every_item_on_in_order(items):
    logger = logging.getLogger("test_progress")
    passed = list(log.progress(iter(items), logger, total=len(items), unit="items"))
    assert passed == items


def test_a_short_loop_logs_no_progress(caplog):
    with caplog.at_level(logging.INFO):
        list(log.progress(range(100), logging.getLogger("quick"), total=100, unit="items"))
    assert caplog.records == []


def test_a_long_loop_logs_rate_and_time_left(caplog, monkeypatch):
    clock = iter(range(0, 10_000, 20))  # each reading of the clock is 20 s later
    monkeypatch.setattr(log.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO):
        batches = log.progress(
            [[0] * 50] * 4, logging.getLogger("long"), total=200, unit="rows", size=len
        )
        assert sum(map(len, batches)) == 200
    assert [record.getMessage() for record in caplog.records] == [
        "passed n=100 of=200 rows per_second=2.5 elapsed_seconds=40 left_seconds=40",
        "passed n=200 of=200 rows per_second=2.5 elapsed_seconds=80 left_seconds=0",
    ]


def test_a_loop_of_unknown_length_logs_no_time_left():
    line = log.progress_line(100, None, "rows", 40.0)
    assert line == "n=100 rows per_second=2.5 elapsed_seconds=40"


def test_help_keeps_the_usage_example_as_written():
    description = "Pack.\n\npython -m pack --tokens train.arrow\n    --plan plan.parquet\n"
    parser = argparse.ArgumentParser(description=description, formatter_class=log.HelpFormatter)
    assert description in parser.format_help()


@pytest.mark.parametrize("library", ["httpx", "huggingface_hub", "mistral_common"])
def test_chatty_libraries_only_warn(library):
    log.stage_logger("quiet")
    assert not logging.getLogger(library).isEnabledFor(logging.INFO)
