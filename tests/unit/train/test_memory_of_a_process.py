"""The resident memory of a real training process on a CPU, compared with the prediction."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.facts import facts_of
from tests.unit.train.shapes import setup_of
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train.memory import prediction
from workflow_scripts.train.memory.shape import PlannedRun

RESIDENT = """
import sys
from pathlib import Path
import torch, transformers, peft, bitsandbytes
from tests.benchmarks.resident_memory import resident_bytes
from workflow_scripts import files
from tests.facts import facts_of
from workflow_scripts.handover.facts import Facts
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.train import attention, optimization
from workflow_scripts.train.activations import save_less
from workflow_scripts.train.model import adapt

folder = Path(sys.argv[1])
n_rows, row_tokens, n_again = map(int, sys.argv[2:])
recipe, facts = RecipeSettings(), Facts.read(folder / "facts.json")
base = load_model(
    folder, window=512, precision="nf4", attention=attention.register(), device="cpu"
)
model = adapt(base, facts, recipe).train()
save_less(model, n_checkpointed_layers=n_again)
optimizer = optimization.optimizer(model, recipe)
ids = torch.randint(3, 32_000, (1, n_rows * row_tokens))
bounds = torch.arange(0, n_rows * row_tokens + 1, row_tokens, dtype=torch.int32)
for _ in range(2):
    model(
        input_ids=ids, labels=ids, position_ids=torch.arange(row_tokens).repeat(n_rows)[None],
        cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=row_tokens,
        max_length_k=row_tokens,
    ).loss.backward()
    optimizer.step()
print(resident_bytes("VmHWM"))
"""


@pytest.mark.parametrize(("n_rows", "n_again"), [(1, 0), (4, 4)])
def test_a_process_on_a_cpu_takes_about_what_is_predicted(
    n_rows, n_again, make_checkpoint, tmp_path
):
    """The demo's shape. The tolerance is wide because the C library's heap keeps freed memory."""
    folder = make_checkpoint(
        tmp_path / "checkpoint",
        vocab_size=32_768,
        intermediate_size=1024,
        num_hidden_layers=4,
        max_position_embeddings=4096,
        sliding_window=512,
    )
    facts = facts_of(folder)
    facts.write(folder / "facts.json")
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, *map(str, (folder, n_rows, 2560, n_again))],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run = PlannedRun(
        facts,
        RecipeSettings(evaluations=0),
        TrainingSettings(),
        row_tokens=2560,
        device_type="cpu",
    )
    parts = prediction.predict(run, setup_of(n_rows, n_again, False))
    assert int(done.stdout.split()[-1]) == pytest.approx(parts.peak, rel=0.3)
