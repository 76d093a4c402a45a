"""Tiny real models, adapters and documents, for the stages that compute."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from tests import llama_cpp_tools
from tests.facts import facts_of

# Fixtures that several rooms use: pytest finds them by their names here.
from tests.unit.prepared_chats import prepared, rendered  # noqa: F401
from tests.unit.trained_adapters import imatrix_of, mixtral_gguf, train  # noqa: F401
from workflow_scripts import files
from workflow_scripts.handover.facts import Facts
from workflow_scripts.packing.packing import Row, Rows
from workflow_scripts.packing.plan import Plan
from workflow_scripts.tokens.documents import Documents, documents_schema

WINDOW = 8
VOCABULARY = 300
Span = tuple[int, int]

# Tests share a machine: a thread that spins while it waits takes another's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """`make_checkpoint(folder, seed=0, dtype="bfloat16", max_shard_size="5GB", **config)`."""

    def make(
        folder: Path,
        *,
        seed: int = 0,
        dtype: str = "bfloat16",
        max_shard_size: str = "5GB",
        **config: object,
    ) -> Path:
        import torch
        from transformers import MistralConfig, MistralForCausalLM

        shape = {
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "sliding_window": WINDOW,
            "initializer_range": 0.06,  # so that logits differ from token to token
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        model = MistralForCausalLM(MistralConfig(**{**shape, **config}))
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
        return folder

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint, tmp_path_factory) -> Path:
    """A two-layer Mistral with random bfloat16 weights, 300 words and a window of 8."""
    return make_checkpoint(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory) -> Path:
    """A two-layer Mixtral of four experts, random bfloat16 weights."""
    import torch

    from tests.unit.train.mixtral import tiny_mixtral

    folder = tmp_path_factory.mktemp("mixtral")
    tiny_mixtral(sliding_window=None).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied(make_checkpoint, tmp_path_factory) -> Path:
    """A Mistral whose embeddings are its output layer."""
    return make_checkpoint(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def write_facts() -> Callable[..., Path]:
    """`write_facts(checkpoint, path)`: the facts and file hashes, no tokenizer asked for."""

    def write(checkpoint: Path, path: Path) -> Path:
        facts_of(checkpoint).write(path)
        return path

    return write


@pytest.fixture(scope="session")
def facts_path(checkpoint, write_facts, tmp_path_factory) -> Path:
    return write_facts(checkpoint, tmp_path_factory.mktemp("facts") / "facts.json")


@pytest.fixture(scope="session")
def facts(facts_path) -> Facts:
    return Facts.read(facts_path)


@pytest.fixture(scope="session")
def write_documents() -> Callable[..., Documents]:
    """`write_documents(path, tokens, spans)`: documents as render_chats writes them."""

    def write(
        path: Path, tokens: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]]
    ) -> Documents:
        rows = [
            {
                "id": f"chat/{number}",
                "input_ids": list(map(int, input_ids)),
                "supervised_spans": list(itertools.chain(*supervised)),
                "n_tokens": len(input_ids),
                "n_supervised_tokens": sum(end - start for start, end in supervised),
                "n_copies": 1,
            }
            for number, (input_ids, supervised) in enumerate(zip(tokens, spans, strict=True))
        ]
        files.write_arrow(path, pa.Table.from_pylist(rows, schema=documents_schema()))
        return Documents(path)

    return write


@pytest.fixture(scope="session")
def random_documents(write_documents) -> Callable[..., Documents]:
    """`random_documents(path, lengths, seed=0)`: BOS and random tokens; in each document of more
    than two tokens the second half and one early token are supervised."""

    def make(
        path: Path, lengths: Sequence[int], *, seed: int = 0, vocabulary: int = VOCABULARY
    ) -> Documents:
        generator = np.random.default_rng(seed)
        tokens = [
            np.concatenate([[1], generator.integers(3, vocabulary, size=length - 1)])
            for length in lengths
        ]
        spans = [
            [(1, 2), (max(2, length // 2), length)] if length > 2 else [(1, length)]
            for length in lengths
        ]
        return write_documents(path, tokens, spans)

    return make


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    """`plan_of(rows, row_tokens=…, strategy="best_fit")`: a plan whose rows cost their tokens."""

    def make(
        rows: Rows | Sequence[Row], *, row_tokens: int = 131_072, strategy: str = "best_fit"
    ) -> Plan:
        rows = rows if isinstance(rows, Rows) else Rows.of(rows)
        nothing = np.zeros(len(rows), dtype=np.int64)
        return Plan(rows, row_tokens, strategy, nothing, nothing, rows.n_tokens.astype(float))

    return make


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """`make_adapter(checkpoint, folder, **config)`: saved by PEFT, no matrix of it zero."""

    def make(checkpoint: Path, folder: Path, *, seed: int = 0, size: float = 0.05, **config):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        options = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **config}
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=size)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def uniform_adapter(checkpoint, make_adapter, tmp_path_factory) -> Path:
    return make_adapter(checkpoint, tmp_path_factory.mktemp("uniform"))


@pytest.fixture(scope="session")
def matched_adapter(checkpoint, make_adapter, tmp_path_factory) -> Path:
    """k and v have a quarter of the rank, and scales of their own."""
    return make_adapter(
        checkpoint,
        tmp_path_factory.mktemp("matched"),
        rank_pattern={"k_proj": 2, "v_proj": 2},
        alpha_pattern={"k_proj": 4, "v_proj": 6},
    )


class Chain(NamedTuple):
    """One run from its base to its GGUF, with the v3 tokenizer and a window of 300."""

    checkpoint: Path
    tokenizer: Path
    facts: Path
    adapter: Path
    merged: Path
    gguf: Path
    clean: Path
    tokens: Path


CHATS = [
    [("user", "What does len do?"), ("assistant", "It counts the items of a container.")],
    [
        ("system", "Answer in one word."),
        ("user", "Größe von «int»?\n\tBytes?"),
        ("assistant", "28 – mostly."),
        ("user", "  And 'float'? "),
        ("assistant", "24"),
    ],
    # Longer than the window, and than a batch of llama.cpp.
    [
        ("user", "Count to a hundred and say why."),
        ("assistant", ", ".join(f"{n} after {n - 1}" for n in range(1, 58)) + ". Because."),
    ],
]


@pytest.fixture(scope="session")
def chain(make_checkpoint, make_adapter, tokenizer_v3, tmp_path_factory) -> Chain:
    from workflow_scripts.chats.tables import clean_schema
    from workflow_scripts.merge import merge_adapter
    from workflow_scripts.models import read_model_facts
    from workflow_scripts.models.tokenizer_files import load_mistral_tokenizer
    from workflow_scripts.quantize import convert_gguf
    from workflow_scripts.tokens.rendering import Renderer

    folder = tmp_path_factory.mktemp("chain")
    paths = Chain(
        checkpoint=folder / "checkpoint",
        tokenizer=tokenizer_v3,
        facts=folder / "facts.json",
        adapter=folder / "adapter",
        merged=folder / "merged",
        gguf=folder / "run-F16.gguf",
        clean=folder / "validation.parquet",
        tokens=folder / "validation.arrow",
    )
    make_checkpoint(paths.checkpoint, vocab_size=32_768, sliding_window=300)
    shutil.copyfile(tokenizer_v3 / "tokenizer.model.v3", paths.checkpoint / "tokenizer.model.v3")
    make_adapter(paths.checkpoint, paths.adapter)
    read_model_facts.main(["--checkpoint", str(paths.checkpoint), "--facts", str(paths.facts)])

    renderer = Renderer(load_mistral_tokenizer(tokenizer_v3, for_training=True))
    chats, rows = [], []
    for number, turns in enumerate(CHATS):
        messages = [{"role": role, "content": content} for role, content in turns]
        rendering = renderer.render(messages)
        at = {"id": f"chat/{number}"}
        chats.append(
            {
                **at,
                "source": "web" if number else "ours",
                "messages": messages,
                "source_file": "c",
                "source_line": number,
            }
        )
        spans = list(itertools.chain(*rendering.supervised_spans))
        n_tokens = len(rendering.input_ids)
        rows.append({**at, "input_ids": rendering.input_ids, "supervised_spans": spans})
        rows[-1] |= {
            "n_tokens": n_tokens,
            "n_supervised_tokens": rendering.n_supervised_tokens,
            "n_copies": 1,
        }
    assert 300 < max(row["n_tokens"] for row in rows) < 512
    files.write_parquet(paths.clean, pa.Table.from_pylist(chats, schema=clean_schema()))
    files.write_arrow(paths.tokens, pa.Table.from_pylist(rows, schema=documents_schema()))

    merge_adapter.main(
        ["--checkpoint", str(paths.checkpoint), "--facts", str(paths.facts)]
        + ["--tokenizer", str(paths.tokenizer), "--adapter", str(paths.adapter)]
        + ["--merged", str(paths.merged)]
    )
    convert_gguf.main(
        ["--merged", str(paths.merged), "--facts", str(paths.facts)]
        + ["--name", "run", "--gguf", str(paths.gguf)]
    )
    return paths


@pytest.fixture(scope="session")
def as_json() -> Callable[..., str]:
    """`as_json(key=value)`: the text of a `--settings`."""
    return lambda **settings: json.dumps(settings)


@pytest.fixture
def ends_with_message(capsys) -> Callable[..., str]:
    """`ends_with_message(main, argv)`: the message of a stage that ends with exit code 1."""

    def run(main: Callable[..., None], argv: Sequence[object]) -> str:
        from workflow_scripts import log

        capsys.readouterr()
        assert log.run_stage(lambda: main([str(part) for part in argv])) == 1
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def llama_tool(request) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`llama_tool("quantize", *arguments)`: llama.cpp's own program, run in one thread."""
    kept = request.config.cache.mkdir(f"llama.cpp-{metadata.version('llama-cpp-python')}")

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [llama_cpp_tools.compiled(name, Path(kept)), *map(str, arguments)],
            env=os.environ | llama_cpp_tools.ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run


TEXT_WORDS = "the count of items a window holds is what its caller asked for, no more".split()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text of some 3,000 tokens, no two stretches of it alike."""
    words = np.random.default_rng(3).choice(TEXT_WORDS, size=2500)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words) + "\n", encoding="utf-8")
    return path
