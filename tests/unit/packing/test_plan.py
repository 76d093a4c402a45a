from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, strategies as st

from workflow_scripts import files
from workflow_scripts.packing.packing import Piece, Rows
from workflow_scripts.packing.plan import Plan, read_plan, write_plan

pieces = st.builds(
    Piece,
    st.integers(0, 2**40),
    st.integers(0, 2**31 - 1),
    st.integers(1, 131_072),
    st.integers(0, 65_536),
)


@st.composite
def plans(draw):
    listed = draw(st.lists(st.lists(pieces, min_size=1, max_size=4), max_size=5))

    def column(values, dtype):
        return np.array([draw(values) for _ in listed], dtype=dtype)

    return Plan(
        rows=Rows.of(listed),
        row_tokens=draw(st.integers(16, 131_072)),
        strategy=draw(st.sampled_from(["best_fit", "concatenate", "none"])),
        n_supervised=column(st.integers(0, 2**31 - 1), np.int32),
        attention_pairs=column(st.integers(0, 2**62), np.int64),
        training_flops=column(st.floats(0, 1e300), np.float64),
    )


@given(plan=plans())
def test_a_plan_reads_back_as_written(plan, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plan.parquet"
    write_plan(path, plan)
    found = read_plan(path)
    for field in dataclasses.fields(Plan):
        one, other = getattr(found, field.name), getattr(plan, field.name)
        assert np.array_equal(one, other) if isinstance(other, np.ndarray) else one == other, field


def test_a_parquet_row_is_a_row_of_training(tmp_path):
    rows = [[Piece(4, 0, 9), Piece(2, 16, 7, 3)], [Piece(0, 0, 5)]]
    numbers = np.array([1, 2])
    write_plan(
        tmp_path / "plan.parquet", Plan(Rows.of(rows), 16, "best_fit", numbers, numbers, numbers)
    )
    table = files.read_parquet(tmp_path / "plan.parquet")
    assert table["pieces"].to_pylist() == [[piece._asdict() for piece in row] for row in rows]
    assert table["n_tokens"].to_pylist() == [16, 5]


def test_the_strategy_decides_attention_and_padding():
    nothing = np.zeros(0)
    strategies = ("best_fit", "concatenate", "none")
    plans = [Plan(Rows.of([]), 16, name, nothing, nothing, nothing) for name in strategies]
    assert [plan.crosses_documents for plan in plans] == [False, True, False]
    assert [plan.pads_rows for plan in plans] == [False, False, True]
