"""Where the time of training goes: PyTorch's profiler over a few steps, by kernel family.

Operators are told apart by name and by the shapes they are given: a product with the LoRA rank in
it is the adapter's, one with the vocabulary in it the loss's. On a GPU the time is that of the
kernels an operator started, on a CPU its own. Profiling itself slows small operators down.

python -m tests.benchmarks.training_profile --shape demo --trace /tmp/trace.json
    --result tests/benchmarks/results/training_profile_cpu.json
python -m tests.benchmarks.training_profile --shape mistral-7b --row-tokens 4096 --rows 8
    --liger /tmp/liger --trace /tmp/trace.json --result training_profile_gpu.json
python -m tests.benchmarks.training_profile
    --table tests/benchmarks/results/training_profile_cpu.json
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.machine import circumstances, versions
from tests.benchmarks.model_shapes import CONFIGS, shape_of
from tests.benchmarks.training_contestants import OURS, SEED, our_trainer
from tests.benchmarks.training_documents import write_demo_documents, write_documents
from tests.benchmarks.training_throughput import MEASURES, PACKAGES
from workflow_scripts import files, log
from workflow_scripts.settings import RecipeSettings
from workflow_scripts.tokens.documents import Documents

logger = log.stage_logger("training_profile")

RANKS = (32, 16)  # the first that is no width of the model, so that products can be told apart
PRODUCTS = re.compile(r"^aten::(mm|addmm|matmul|linear)_?$")
# In this order; the first that matches the operator's name.
NAMES = {
    "NF4 dequantization": re.compile(r"bitsandbytes|dequantize|4bit", re.I),
    "attention": re.compile(
        r"scaled_dot_product|flash|varlen|aten::(bmm|baddbmm|_softmax|unfold)|packed_attention",
        re.I,
    ),
    "loss": re.compile(r"SummedCrossEntropy|logsumexp|cross_entropy|nll_loss|log_softmax", re.I),
    "optimizer": re.compile(r"_fused_adam|Optimizer|_foreach|clip_grad|linalg_vector_norm", re.I),
    "copies and waiting": re.compile(
        r"aten::(copy_|_to_copy|to|clone|contiguous|item|_local_scalar_dense|nonzero|cat|split.*"
        r"|index|index_put_?|_index_put_impl_|index_select|embedding.*)$|Memcpy|Memset|pin_memory"
        r"|IndexBackward|Synchronize",
    ),
    "norms, RoPE, activation": re.compile(
        r"liger|rms_norm|aten::(silu|silu_backward|pow|mean|rsqrt|neg|mul_?|add_?|sum|div_?|sub_?"
        r"|sigmoid|exp_?|cos|sin|neg)$",
        re.I,
    ),
}
FAMILIES = ("matrix products", "LoRA", *NAMES, "other")


class Operator(NamedTuple):
    """Calls of one operator with inputs of the same shapes."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    n_calls: int
    seconds: float
    """Of itself, without the operators inside."""


def family(operator: Operator, *, rank: int, vocabulary_size: int) -> str:
    """Which of `FAMILIES`."""
    sizes = {size for shape in operator.shapes for size in shape}
    matrices = [shape for shape in operator.shapes if len(shape) == 2]
    if vocabulary_size in sizes and "embedding" not in operator.name:
        return "loss"
    if PRODUCTS.match(operator.name):
        return "LoRA" if any(rank in shape for shape in matrices) else "matrix products"
    for name, pattern in NAMES.items():
        if pattern.search(operator.name):
            return name
    return "other"


def by_family(
    operators: Iterable[Operator], *, rank: int, vocabulary_size: int
) -> dict[str, dict[str, Any]]:
    """Seconds and calls of each family, and the operators that take most of it."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    within: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for operator in operators:
        name = family(operator, rank=rank, vocabulary_size=vocabulary_size)
        seconds[name] += operator.seconds
        calls[name] += operator.n_calls
        within[name][operator.name] += operator.seconds
    return {
        name: {
            "seconds": seconds[name],
            "n_calls": calls[name],
            "largest": sorted(within[name], key=within[name].__getitem__, reverse=True)[:4],
        }
        for name in FAMILIES
        if name in seconds
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument("--shape", choices=CONFIGS)
    parser.add_argument("--contestant", choices=tuple(OURS), default="tramontane")
    parser.add_argument("--documents", choices=("chats", "demo"), default="chats", help="whose")
    parser.add_argument("--row-tokens", type=int, help="default: the shape's")
    parser.add_argument("--rows", type=int, help="of a micro-batch; default: the shape's")
    parser.add_argument("--steps", type=int, default=3, help="profiled, after two to warm up")
    parser.add_argument("--liger", type=Path, help="folder to import liger_kernel from")
    parser.add_argument("--trace", type=Path, help="to write: for chrome://tracing or Perfetto")
    parser.add_argument("--result", type=Path, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return
    if not (arguments.shape and arguments.result):
        parser.error("--shape and --result are needed, or --table")
    if arguments.liger:
        sys.path.insert(0, str(arguments.liger))
    result = profile(arguments)
    files.write_json(arguments.result, result)
    print(table(result))


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps under the profiler."""
    import torch

    measure, config = MEASURES[arguments.shape], CONFIGS[arguments.shape]
    facts = shape_of(config)
    widths = {facts.query_size, facts.kv_size}
    rank = next(rank for rank in RANKS if rank not in widths)
    row_tokens = arguments.row_tokens or measure.row_tokens
    n_rows = arguments.rows or measure.rows_per_micro_batch
    with tempfile.TemporaryDirectory(prefix="training_profile.") as folder:
        path = Path(folder) / "documents.arrow"
        if arguments.documents == "demo":
            (Path(folder) / "stages").mkdir()
            write_demo_documents(path, Path(folder) / "stages")
        else:
            write_documents(
                path,
                n_documents=measure.n_documents,
                length_fraction=measure.length_fraction,
                longest=row_tokens,
                vocabulary_size=config["vocab_size"],
                seed=SEED,
            )
        recipe = RecipeSettings(
            rank=rank,
            alpha=2 * rank,
            schedule="constant",
            warmup_fraction=0.0,
            rows_per_step=n_rows,
            max_steps=2 + arguments.steps,
            evaluations=0,
            keeps_best=False,
            seed=SEED,
        )
        trainer, n_checkpointed = our_trainer(
            OURS[arguments.contestant],
            config,
            recipe,
            Documents(path),
            row_tokens=row_tokens,
            checkpoints="off",
            scratch=Path(folder) / "trainer",
        )
        operators, wall = watched(trainer, n_warm_up=2, trace=arguments.trace)
    return {
        **circumstances(),
        "versions": versions(sys.executable, PACKAGES),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "n_threads": torch.get_num_threads(),
        "shape": arguments.shape,
        "contestant": arguments.contestant,
        "row_tokens": row_tokens,
        "rows_per_micro_batch": n_rows,
        "rank": rank,
        "n_checkpointed_layers": n_checkpointed,
        "n_steps": arguments.steps,
        "duration_seconds": wall,
        "families": by_family(operators, rank=rank, vocabulary_size=config["vocab_size"]),
    }


def watched(trainer: Any, *, n_warm_up: int, trace: Path | None) -> tuple[list[Operator], float]:
    """What ran in the steps after those to warm up, and their wall time."""
    import time

    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    clock = [0.0, 0.0]

    class Callback(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            if state.global_step == n_warm_up:
                profiler.start()
                clock[0] = time.perf_counter()
            elif state.global_step == state.max_steps:
                clock[1] = time.perf_counter()
                profiler.stop()

    trainer.add_callback(Callback())
    trainer.train()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return operators_of(profiler, cuda=cuda), clock[1] - clock[0]


def operators_of(profiler: Any, *, cuda: bool) -> list[Operator]:
    """A stopped profiler's operators; on a GPU those that started kernels."""
    found = []
    for event in profiler.key_averages(group_by_input_shape=True):
        # A kernel is listed for itself as well; its operator has its time already.
        if cuda and event.device_type.name == "CUDA":
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        shapes = tuple(tuple(shape) for shape in event.input_shapes or [] if shape)
        found.append(Operator(event.key, shapes, event.count, microseconds / 1e6))
    return found


def table(result: Mapping[str, Any]) -> str:
    """Families, largest first."""
    machine = result["machine"]
    total = sum(entry["seconds"] for entry in result["families"].values())
    lines = [
        f"{result['date'][:10]}, commit {result['commit']}, {machine['processor']}, device "
        f"{result['device']}, {result['n_threads']} threads, torch {result['versions']['torch']}. "
        f"Shape {result['shape']}, {result['contestant']}, micro-batches of "
        f"{result['rows_per_micro_batch']} rows of {result['row_tokens']:,} tokens, "
        f"{result['n_checkpointed_layers']} layers checkpointed; {result['n_steps']} steps in "
        f"{result['duration_seconds']:.2f} s under the profiler.",
        "",
        "| family | seconds a step | share | calls a step | most of it in |",
        "|---|---:|---:|---:|---|",
    ]
    families = result["families"].items()
    for name, entry in sorted(families, key=lambda item: item[1]["seconds"], reverse=True):
        largest = ", ".join(f"`{operator}`" for operator in entry["largest"])
        lines.append(
            f"| {name} | {entry['seconds'] / result['n_steps']:.4f} | "
            f"{entry['seconds'] / total:.1%} | {entry['n_calls'] / result['n_steps']:,.0f} | "
            f"{largest} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
