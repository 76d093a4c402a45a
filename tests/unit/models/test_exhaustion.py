from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers.utils.logging

from tests.conftest import REPOSITORY
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.exhaustion import exhausts_memory, of_loading


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"),
    ],
)
def test_errors_of_exhausted_memory_are_recognized(error):
    assert exhausts_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("memory")])
def test_other_errors_are_not_recognized(error):
    assert not exhausts_memory(error)


LOAD = """
import logging, resource, sys
from pathlib import Path
import accelerate, bitsandbytes
import transformers.models.mistral.modeling_mistral
from workflow_scripts.models.checkpoint import load_model
from workflow_scripts.models.exhaustion import exhausts_memory

logging.basicConfig()
status = Path("/proc/self/status").read_text()
mapped = int(status.partition("VmData:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, [mapped + int(sys.argv[2])] * 2)
try:
    load_model(Path(sys.argv[1]), window=None, precision="nf4")
except (RuntimeError, MemoryError) as error:
    print(exhausts_memory(error), error)
else:
    print("loaded")
"""


@pytest.fixture(scope="module")
def large(make_checkpoint, tmp_path_factory):
    """100 MB in 16 bits, a quarter of it per layer."""
    folder = tmp_path_factory.mktemp("large")
    return make_checkpoint(
        folder / "checkpoint", hidden_size=1024, intermediate_size=3584, num_hidden_layers=4
    )


# About 250 MB are needed. With the lower limit the file (106 MB) cannot be mapped; with the higher
# one a weight's quantization fails, and transformers raises an error that hides the cause.
@pytest.mark.parametrize("limit_mb", [64, 160])
def test_memory_that_runs_out_while_loading_is_reported(large, limit_mb):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(large), str(limit_mb << 20)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CI": "true"},
    )  # fmt: skip
    said = done.stdout.splitlines()[-1]
    assert said.startswith("True") and "allocate memory" in said, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(params=[False, True], ids=["", "CI"])
def weights_logger(request):
    """A logger of transformers; with CI=true its records also reach the root's handlers."""
    library = transformers.utils.logging.get_logger("transformers")
    propagates = library.propagate
    library.propagate = request.param
    yield logging.getLogger("transformers.weights")
    library.propagate = propagates


@pytest.fixture
def logged():
    """Records that reach a handler of the root logger or of transformers."""
    found: list[str] = []
    handlers = {}
    for name in (None, "transformers"):
        handlers[name] = logging.Handler()
        handlers[name].emit = lambda record: found.append(record.getMessage())
        logging.getLogger(name).addHandler(handlers[name])
    yield found
    for name, handler in handlers.items():
        logging.getLogger(name).removeHandler(handler)


def test_a_table_of_memory_errors_becomes_its_line(weights_logger, logged):
    table = "| weight |\nTraceback\n  RuntimeError: can't allocate memory: 4 bytes\n"
    with pytest.raises(MemoryError, match="^RuntimeError: can't allocate memory: 4 bytes$"):
        with of_loading():
            weights_logger.warning(table)
            raise RuntimeError("conversion failed")
    assert logged == []


def test_other_records_are_logged_afterwards(weights_logger, logged):
    with pytest.raises(RuntimeError, match="conversion failed"):
        with of_loading():
            weights_logger.warning("a weight has another shape")
            raise RuntimeError("conversion failed")
    assert set(logged) == {"a weight has another shape"}
    logged.clear()
    weights_logger.warning("after it")
    assert set(logged) == {"after it"}


def test_other_errors_in_loading_are_raised_unchanged(demo_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(RuntimeError, match="mismatch"):
        load_model(folder, window=None, precision="float32")
