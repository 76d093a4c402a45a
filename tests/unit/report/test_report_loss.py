from __future__ import annotations

from xml.etree import ElementTree

import pytest

from workflow_scripts.handover.training import History
from workflow_scripts.report import report_loss


@pytest.fixture
def write(results, tmp_path):
    def run():
        figure = tmp_path / "loss.svg"
        histories = sorted(map(str, results.folder.glob("runs/*/adapter/history.json")))
        report_loss.main(["--histories", *histories, "--figure", str(figure)])
        return figure

    return run


def test_the_figure_is_svg_and_the_same_bytes_again(write):
    first = write().read_bytes()
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert write().read_bytes() == first


def test_every_history_changes_the_figure(write, results):
    before = write().read_bytes()
    path = results.folder / "runs" / "mistral" / "adapter" / "history.json"
    history = History.read(path)
    for key in ("train", "validation"):
        raised = [
            entry.changed(loss_nats_per_token=entry.loss_nats_per_token + 1)
            for entry in getattr(history, key)
        ]
        history.changed(**{key: raised}).write(path)
        assert write().read_bytes() != before, key


def test_help_starts_without_torch_or_matplotlib(ask_for_help):
    done, imported = ask_for_help("workflow_scripts.report.report_loss")
    assert done.returncode == 0
    assert not imported & {"torch", "transformers", "matplotlib"}
