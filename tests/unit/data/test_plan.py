from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workflow_scripts import files
from workflow_scripts.data.packing import Piece, best_fit
from workflow_scripts.data.plan import Plan, read_plan, write_plan

pieces = st.builds(Piece, st.integers(0, 2**40), st.integers(0, 2**31 - 1), st.integers(1, 131_072))
plans = st.builds(
    Plan,
    rows=st.lists(st.lists(pieces, min_size=1, max_size=4), max_size=5),
    row_tokens=st.integers(16, 131_072),
    crosses_documents=st.booleans(),
)


@given(plan=plans, window=st.none() | st.integers(1, 4096))
def test_a_plan_reads_back_as_written(plan, window, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plan.parquet"
    write_plan(path, plan, window=window, n_supervised=[0] * len(plan.rows))
    assert read_plan(path) == plan


def visible_pairs(length, window):
    return sum(min(position, window or position) for position in range(1, length + 1))


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=30),
    crosses_documents=st.booleans(),
    window=st.none() | st.integers(1, 80),
)
def test_columns_say_what_each_row_costs(lengths, crosses_documents, window, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "plan.parquet"
    rows = best_fit(lengths, row_tokens=64, seed=0)
    n_supervised = list(range(len(rows)))
    write_plan(path, Plan(rows, 64, crosses_documents), window=window, n_supervised=n_supervised)
    table = files.read_parquet(path)
    assert table["n_tokens"].to_pylist() == [sum(piece.length for piece in row) for row in rows]
    assert table["n_supervised_tokens"].to_pylist() == n_supervised
    segments = [
        [sum(piece.length for piece in row)]
        if crosses_documents
        else [piece.length for piece in row]
        for row in rows
    ]
    assert table["attention_pairs"].to_pylist() == [
        sum(visible_pairs(length, window) for length in row) for row in segments
    ]


def test_the_cost_of_the_longest_row_is_not_cut_off(tmp_path):
    plan = Plan([[Piece(0, 0, 131_072)]], 131_072, False)
    write_plan(tmp_path / "plan.parquet", plan, window=None, n_supervised=[1])
    table = files.read_parquet(tmp_path / "plan.parquet")
    assert table["attention_pairs"].to_pylist() == [131_072 * 131_073 // 2]  # beyond 32 bits
