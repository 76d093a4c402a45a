"""Benchmark of raw-text perplexity: evaluate_perplexity beside llama.cpp's own llama-perplexity.

The same GGUF, text, chunks and threads, in turn within every repetition, each a process of its own.
The program of llama.cpp is compiled with -O3 against the libraries that llama-cpp-python uses, so
that both run the same kernels.

python -m tests.benchmarks.text_perplexity --shape mistral-7b --layers 2 --chunks 8
    --repetitions 3 --scratch /tmp

python -m tests.benchmarks.text_perplexity --table tests/benchmarks/results/text_perplexity.json
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests import llama_cpp_tools
from tests.benchmarks import measured_command
from tests.benchmarks.machine import REPOSITORY, circumstances, versions
from tests.benchmarks.model_shapes import CONFIGS, bare_facts
from tests.benchmarks.text_perplexity_table import table
from workflow_scripts import files, log

logger = log.stage_logger("text_perplexity")

RESULT = REPOSITORY / "tests/benchmarks/results/text_perplexity.json"
PACKAGES = "torch llama_cpp_python numpy pyarrow".split()
CONTESTANTS = ("llama_perplexity", "tramontane")
# By vocabulary: the file of Mistral's that has as many tokens.
TOKENIZERS = {32_000: "tokenizer.model.v1", 32_768: "mistral_instruct_tokenizer_240323.model.v3"}
# Its log begins a line with the minutes, seconds, thousandths and millionths since its start.
FINAL = re.compile(r"(\d+)\.(\d\d)\.(\d{3})\.\d{3} I Final estimate: PPL = ([\d.]+)")


class Subject(NamedTuple):
    """What everyone scores."""

    gguf: Path
    facts: Path
    text: Path
    tokens: Path
    """The text in chunks."""
    context_tokens: int
    n_chunks: int
    n_threads: int


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--table", type=Path, help="print the table of this result, and end")
    parser.add_argument("--shape", choices=["demo", "mistral-7b"], default="mistral-7b")
    parser.add_argument("--layers", type=int, help="of the shape; default: all")
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M"], help="of the GGUFs")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512], help="tokens of a chunk")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", type=Path, help="room for three models")
    parser.add_argument("--result", type=Path, default=RESULT, help="to write: JSON")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(files.read_json(arguments.table)))
        return

    config = dict(CONFIGS[arguments.shape])
    config["num_hidden_layers"] = arguments.layers or config["num_hidden_layers"]
    result: dict[str, Any] = {
        **circumstances(),
        "versions": versions(sys.executable, PACKAGES),
        "shape": arguments.shape,
        "n_layers": config["num_hidden_layers"],
        "n_chunks": arguments.chunks,
        "n_threads": arguments.threads,
        "runs": [],
    }
    with tempfile.TemporaryDirectory(prefix="perplexity.", dir=arguments.scratch) as name:
        scratch = Path(name)
        program = llama_cpp_tools.compiled("perplexity", scratch, optimization="-O3")
        ggufs = write_ggufs(scratch, config, arguments.types)
        write_text(scratch / "text.txt")
        for context_tokens in arguments.contexts:
            tokens = chunk(scratch, context_tokens)
            for kind in arguments.types:
                subject = Subject(
                    ggufs[kind],
                    scratch / "facts.json",
                    scratch / "text.txt",
                    tokens,
                    context_tokens,
                    arguments.chunks,
                    arguments.threads,
                )
                runs: dict[str, Any] = {contestant: [] for contestant in CONTESTANTS}
                for _ in range(arguments.repetitions):
                    for contestant in CONTESTANTS:
                        measured = run(contestant, subject, program, scratch)
                        runs[contestant].append(measured)
                        logger.info(
                            "measured %s type=%s %s", contestant, kind, log.fields(measured)
                        )
                result["runs"].append(
                    {
                        "type": kind,
                        "size_bytes": ggufs[kind].stat().st_size,
                        "context_tokens": context_tokens,
                        "contestants": runs,
                    }
                )
                files.write_json(arguments.result, result)
    logger.info("wrote %s", arguments.result)
    print(table(result))


def write_ggufs(scratch: Path, config: dict[str, Any], types: Sequence[str]) -> dict[str, Path]:
    """By type, of a model of random weights; facts.json and the tokenizer stay beside them."""
    import mistral_common

    from tests.benchmarks.synthetic_checkpoint import write_checkpoint
    from workflow_scripts.models import exported_tokenizer
    from workflow_scripts.quantize import convert_gguf, quantize_gguf

    write_checkpoint(scratch / "base", config)
    tokenizer = TOKENIZERS[config["vocab_size"]]
    version = tokenizer[-2:]
    bare_facts(config, tokenizer_version=version).write(scratch / "facts.json")
    (scratch / "published").mkdir()
    shutil.copyfile(
        Path(mistral_common.__file__).parent / "data" / tokenizer,
        scratch / "published" / f"tokenizer.model.{version}",
    )
    exported_tokenizer.export(scratch / "published", scratch / "tokenizer")
    f16 = scratch / "model-F16.gguf"
    convert_gguf.main(
        ["--merged", str(scratch / "base"), "--tokenizer", str(scratch / "tokenizer")]
        + ["--facts", str(scratch / "facts.json"), "--name", "model", "--gguf", str(f16)]
    )
    shutil.rmtree(scratch / "base")
    ggufs = {"F16": f16}
    for kind in types:
        if kind != "F16":
            ggufs[kind] = scratch / f"model-{kind}.gguf"
            quantize_gguf.main(
                ["--gguf", str(f16), "--settings", f'{{"type": "{kind}"}}']
                + ["--threads", str(os.cpu_count()), "--quantized", str(ggufs[kind])]
            )
    return ggufs


def write_text(path: Path) -> None:
    """The documentation of Python's standard library, as the interpreter has it."""
    from workflow_scripts.demo import stdlib_docs

    text = "\n\n".join(entry.docstring for entry in stdlib_docs.entries())
    path.write_text(text, encoding="utf-8")


def chunk(scratch: Path, context_tokens: int) -> Path:
    from workflow_scripts.evaluate import chunk_text

    path = scratch / f"text-{context_tokens}.arrow"
    chunk_text.main(
        ["--text", str(scratch / "text.txt"), "--tokenizer", str(scratch / "tokenizer")]
        + ["--facts", str(scratch / "facts.json"), "--tokens", str(path)]
        + ["--settings", f'{{"text_context_tokens": {context_tokens}}}']
    )
    return path


def run(contestant: str, subject: Subject, program: Path, scratch: Path) -> dict[str, Any]:
    """One contestant, once: what the whole command costs, and the seconds from loading the model
    to the result, as it says itself."""
    log_file, scores = scratch / f"{contestant}.log", scratch / "scores.json"
    if contestant == "llama_perplexity":
        command: list[object] = [program, "-m", subject.gguf, "-f", subject.text]
        command += ["-c", subject.context_tokens, "--chunks", subject.n_chunks, "-ngl", 0]
        command += ["-t", subject.n_threads, "-tb", subject.n_threads]
        environment = llama_cpp_tools.ENVIRONMENT
    else:
        command = [sys.executable, "-m", "workflow_scripts.evaluate.evaluate_perplexity"]
        command += ["--gguf", subject.gguf, "--facts", subject.facts, "--tokens", subject.tokens]
        command += ["--settings", f'{{"max_conversations": {subject.n_chunks}}}']
        command += ["--threads", subject.n_threads, "--scores", scores]
        command += ["--token-scores", scratch / "scores.tokens.parquet"]
        environment = {"OMP_NUM_THREADS": str(subject.n_threads)}
    measured = measured_command.measure(
        command, folder=REPOSITORY, environment=environment, log_file=log_file
    )
    if contestant == "llama_perplexity":
        ((minutes, seconds, thousandths, perplexity),) = FINAL.findall(log_file.read_text())
        own = {
            "perplexity": float(perplexity),
            "scoring_seconds": 60 * int(minutes) + int(seconds) + int(thousandths) / 1000,
        }
    else:
        report = files.read_json(scores)
        own = {"perplexity": report["perplexity"], "scoring_seconds": report["duration_seconds"]}
    return {**dataclasses.asdict(measured), **own}


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
