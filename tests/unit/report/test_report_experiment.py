from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import pytest

from tests.context import cell_of
from tests.scores import loss_of
from workflow_scripts import files
from workflow_scripts.handover.context import RecallScores
from workflow_scripts.handover.scores import LossAtPositions, PositionScores
from workflow_scripts.report import report_experiment

# Perplexities by strategy and seed: what a seed does is more than what packing does.
PERPLEXITIES = {"concatenate": (8.0, 9.0, 10.0), "best_fit": (7.0, 8.1, 8.9)}
BUCKETS = ((0, 255), (256, 511), (512, 1023))
N_EXACT = {128: 10, 1024: 1}
RUNS = {
    f"{strategy}-{seed}": {
        "model": "demo",
        "dataset": "chats",
        "packing": {"strategy": strategy, "row_tokens": 4096, "seed": seed},
        "recipe": {"rank": 32, "seed": seed},
    }
    for seed in range(3)
    for strategy in PERPLEXITIES
}


def positions(perplexity: float) -> PositionScores:
    def bucket(at: int, first: int, last: int) -> LossAtPositions:
        loss = loss_of(perplexity + at).changed(n_scored_tokens=100 + last)
        return LossAtPositions(first_position=first, last_position=last, **dict(loss))

    return PositionScores(
        precision="nf4",
        sliding_window=512,
        n_tokens_beyond_context=0,
        **dict(loss_of(perplexity)),
        buckets=tuple(bucket(at, *ends) for at, ends in enumerate(BUCKETS)),
        duration_seconds=1.5,
    )


def recall(perplexity: float) -> RecallScores:
    return RecallScores(
        precision="nf4",
        sliding_window=512,
        chance_nats_per_answer=math.log(9000),
        cells=tuple(
            cell_of(length, depth, n_exact - (depth == 0.0), 20).changed(
                nats_per_answer=perplexity + depth
            )
            for length, n_exact in N_EXACT.items()
            for depth in (0.0, 1.0)
        ),
        duration_seconds=1.5,
    )


@pytest.fixture
def folder(tmp_path):
    for run, settings in RUNS.items():
        perplexity = PERPLEXITIES[settings["packing"]["strategy"]][settings["recipe"]["seed"]]
        evaluation = tmp_path / "results" / "runs" / run / "evaluation"
        positions(perplexity).write(evaluation / "positions.json")
        recall(perplexity).write(evaluation / "recall.json")
    return tmp_path


@pytest.fixture
def arguments(folder):
    def make(runs=RUNS, *, recalls=True):
        evaluation = folder / "results" / "runs"
        paths = {key: folder / f"experiment.{key}" for key in ("tsv", "md", "html", "svg")}
        return paths, [
            *("--runs", json.dumps(runs)),
            *(
                "--positions",
                *(str(evaluation / run / "evaluation" / "positions.json") for run in runs),
            ),
            *(
                (
                    "--recall",
                    *(str(evaluation / run / "evaluation" / "recall.json") for run in runs),
                )
                if recalls
                else ()
            ),
            *("--tsv", str(paths["tsv"]), "--markdown", str(paths["md"])),
            *("--html", str(paths["html"]), "--figure", str(paths["svg"])),
        ]

    return make


@pytest.fixture
def write(arguments):
    def run(runs=RUNS):
        paths, argv = arguments(runs)
        report_experiment.main(argv)
        return paths

    return run


def change(folder, name, edit, runs=RUNS):
    for run in runs:
        path = folder / "results" / "runs" / run / "evaluation" / f"{name}.json"
        content = files.read_json(path)
        edit(content)
        files.write_json(path, content)


def cells_of(rows):
    """The remaining cells by figure and arm."""
    return {(figure, arm): cells for figure, arm, *cells in rows}


def test_each_arm_is_a_row_with_its_difference_by_seed(write, read_tsv):
    header, *rows = read_tsv(write()["tsv"])
    assert header == [
        "",
        "arm",
        "mean ± sd",
        "difference from concatenate, 95 %",
        "significant",
    ]
    assert [row[0] for row in rows if row[1] == "best_fit"] == [
        "Perplexity",
        "Perplexity, positions 0–255",
        "Perplexity, positions 256–511",
        "Perplexity, positions 512–1,023",
        "Facts recalled, 128 tokens, %",
        "Facts recalled, 1,024 tokens, %",
        "Loss of the right answer, 128 tokens, nats",
        "Loss of the right answer, 1,024 tokens, nats",
    ]
    found = cells_of(rows)
    # The three pairs are −1, −0.9, −1.1: mean −1, deviation 0.1, t 4.303. The deviation of each arm
    # alone is ten times larger.
    half_width = 4.303 * 0.1 / math.sqrt(3)
    assert found["Perplexity", "concatenate"] == ["9.000 ± 1.000", "", ""]
    expected = ["8.000 ± 0.954", f"−1.000 ± {half_width:.3f}", "yes"]
    assert found["Perplexity", "best_fit"] == expected
    assert found["Perplexity, positions 512–1,023", "concatenate"][0] == "11.000 ± 1.000"
    # (9 + 10) of 40 and (0 + 1) of 40 for every seed.
    for arm in ("concatenate", "best_fit"):
        assert found["Facts recalled, 128 tokens, %", arm][0] == "47.5 ± 0.0"
    expected = ["2.5 ± 0.0", "0.0 ± 0.0", "no"]
    assert found["Facts recalled, 1,024 tokens, %", "best_fit"] == expected
    cost = found["Loss of the right answer, 128 tokens, nats", "concatenate"]
    assert cost[0] == "9.50 ± 1.00"


def test_the_note_describes_the_arms(write):
    text = write()["md"].read_text()
    said = "concatenate: packing.strategy concatenate; best_fit: packing.strategy best_fit."
    assert f"Arms: {said}" in text


def test_without_recall_the_other_figures_remain(arguments, write, read_tsv):
    paths, argv = arguments(recalls=False)
    report_experiment.main(argv)
    figures = {row[0] for row in read_tsv(paths["tsv"])[1:]}
    assert len(figures) == 4 and all(name.startswith("Perplexity") for name in figures)
    text = paths["md"].read_text()
    assert "Recall" not in text and "prompts" not in text
    assert "<!-- Facts recalled" not in paths["svg"].read_text()


def test_the_result_is_given_as_a_sentence(write, folder):
    text = write()["md"].read_text()
    assert "The perplexity of best_fit is 11.1% lower than that of concatenate" in text
    assert "that of concatenate: a significant difference at 95 %." in text
    for part in ("12 validation", "34,567", "window of 512", "3 seeds", "40 prompts", "9.1 nats"):
        assert part in text
    higher = {"best_fit-1": 12.0}
    for run, value in higher.items():
        change(folder, "positions", lambda scores, v=value: scores.update(perplexity=v), [run])
    text = write()["md"].read_text()
    assert "3.3% higher than that of concatenate" in text
    assert "no significant difference at 95 %." in text


def test_with_one_seed_the_error_is_unknown(write):
    paths = write({run: RUNS[run] for run in ("concatenate-0", "best_fit-0")})
    assert "with one seed, its error is unknown" in paths["md"].read_text()
    assert "| Perplexity | best_fit-0 | 7.000 | −1.000 | no |" in paths["md"].read_text()


def test_three_arms_are_each_compared_with_the_first(write, folder, read_tsv):
    runs = dict(RUNS)
    for seed in range(3):
        other = json.loads(json.dumps(RUNS[f"best_fit-{seed}"]))
        other["packing"]["strategy"] = "none"
        runs[f"none-{seed}"] = other
        evaluation = folder / "results" / "runs" / f"none-{seed}" / "evaluation"
        positions(9.0 + seed).write(evaluation / "positions.json")
        recall(9.0).write(evaluation / "recall.json")
    paths = write(runs)
    found = cells_of(read_tsv(paths["tsv"])[1:])
    assert found["Perplexity", "none"] == ["10.000 ± 1.000", "+1.000 ± 0.000", "yes"]
    assert found["Perplexity", "best_fit"][1].startswith("−1.000")
    text = paths["md"].read_text()
    assert "The perplexity of none is 11.1% higher than that of concatenate" in text


def test_recall_without_answers_to_the_shortest_prompts_is_not_measurable(write, folder, read_tsv):
    def forget(scores):
        for cell in scores["cells"]:
            cell["n_exact"] = 0 if cell["length_tokens"] == 128 else 1

    change(folder, "recall", forget)
    paths = write()
    assert "No run finds a fact even in the shortest prompts" in paths["md"].read_text()
    found = cells_of(read_tsv(paths["tsv"])[1:])
    for length in ("128", "1,024"):
        for arm in ("concatenate", "best_fit"):
            cells = found[f"Facts recalled, {length} tokens, %", arm]
            assert cells == ["not measurable", "", ""]
    cost = found["Loss of the right answer, 128 tokens, nats", "concatenate"]
    assert cost[0] == "9.50 ± 1.00"

    def recall_one(scores):
        scores["cells"][0]["n_exact"] = 1

    change(folder, "recall", recall_one, ["best_fit-2"])  # one fact found by one run is enough
    paths = write()
    assert "No run finds" not in paths["md"].read_text()
    found = cells_of(read_tsv(paths["tsv"])[1:])
    assert found["Facts recalled, 128 tokens, %", "concatenate"][0] == "0.0 ± 0.0"
    assert found["Facts recalled, 128 tokens, %", "best_fit"][0] == "0.8 ± 1.4"


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("positions", lambda scores: scores["buckets"].pop()),
        ("positions", lambda scores: scores["buckets"][0].update(n_scored_tokens=1)),
        ("recall", lambda scores: scores["cells"][0].update(n_prompts=19)),
        ("recall", lambda scores: scores["cells"].reverse()),
    ],
    ids=["a bucket less", "other tokens", "fewer prompts", "another order"],
)
def test_runs_measured_on_different_tokens_or_prompts_are_not_compared(
    arguments, folder, ends_with_message, name, edit
):
    change(folder, name, edit, ["best_fit-1"])
    message = ends_with_message(report_experiment.main, arguments()[1])
    for part in (
        "measured on different tokens or prompts",
        "best_fit-1",
        "concatenate-0",
        "one dataset",
    ):
        assert part in message


def test_the_figure_is_svg_and_names_arms_window_and_guess(write):
    path = write()["svg"]
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    # matplotlib draws text as shapes and keeps the text in comments.
    text = path.read_text()
    for part in ("best_fit", "concatenate", "window", "guess", "Perplexity"):
        assert f"<!-- {part}" in text
    assert "<!-- not measurable" not in text


def test_recall_that_is_not_measurable_is_not_drawn_as_0_per_cent(write, folder):
    def n_lines(path):
        root = ElementTree.parse(path).getroot()
        groups = root.iter("{http://www.w3.org/2000/svg}g")
        return sum(group.get("id", "").startswith("LineCollection") for group in groups)

    drawn = n_lines(write()["svg"])

    def forget(scores):
        for cell in scores["cells"]:
            cell["n_exact"] = 0

    change(folder, "recall", forget)
    path = write()["svg"]
    assert "<!-- not measurable" in path.read_text()
    assert n_lines(path) == drawn * 2 // 3 > 0  # two of three panels have lines with bars


def test_a_model_without_a_window_has_no_line_for_it(write, folder):
    change(folder, "positions", lambda scores: scores.update(sliding_window=None))
    paths = write()
    assert "<!-- window" not in paths["svg"].read_text()
    assert "full attention" in paths["md"].read_text()


def test_the_same_results_give_the_same_bytes_and_others_another_figure(write, folder):
    first = {key: path.read_bytes() for key, path in write().items()}
    assert {key: path.read_bytes() for key, path in write().items()} == first

    def worsen(scores):
        scores["buckets"][1]["perplexity"] += 1

    change(folder, "positions", worsen, ["best_fit-2"])
    assert write()["svg"].read_bytes() != first["svg"]


def test_runs_without_a_difference_are_a_stage_error(arguments, ends_with_message):
    runs = {run: RUNS[run] for run in ("best_fit-0", "best_fit-1")}
    message = ends_with_message(report_experiment.main, arguments(runs)[1])
    assert "differ only in their seeds" in message


def test_help_starts_without_torch_or_matplotlib(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_experiment")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib", "numpy"}
