"""The tensors that a checkpoint's config.json requires, and those that its files contain.

transformers initializes a missing tensor at random with one log line, and ignores an extra or
misnamed tensor. Here both stop the build before training. That check reads headers only;
`check_values` reads every weight once.

Tensor names are those that transformers 5.23 writes for Mistral, Ministral and Mixtral; the tests
compare them with its models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from workflow_scripts import files
from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.log import StageError

# safetensors' name → numpy type of the same width, and the exponent's bits. A value whose exponent
# bits are all set is infinite or NaN (IEEE 754; bfloat16 is the upper half of float32).
FLOATS = {
    "F64": ("uint64", 0x7FF0_0000_0000_0000),
    "F32": ("uint32", 0x7F80_0000),
    "BF16": ("uint16", 0x7F80),
    "F16": ("uint16", 0x7C00),
}
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Tables of positions in checkpoints of 2023. Today they are computed from config.json;
# transformers, llama.cpp's converter and the merge ignore the stored ones.
POSITION_TABLE = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
# Parts of tensor names in quantized checkpoints only: GPTQ, AWQ, bitsandbytes, FP8, MXFP4.
QUANTIZED_PARTS = (
    "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale", "scale_inv", "input_scale",
    "absmax", "quant_state", "quant_map", "_blocks", "_scales", ".SCB",
)  # fmt: skip
# Elements compared or scanned at a time.
BLOCK_ELEMENTS = 2**22
SHOWN = 10
TAKE_16_BITS = (
    "set models.<name>.source to the unquantized model in 16 bits; an adapter trained on this"
    " model can be merged into that one: set runs.<name>.precision to how this one was loaded"
)


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    dtype: str
    """safetensors' name: `BF16`."""
    shape: tuple[int, ...]
    first_byte: int
    """Offset in the file."""
    n_bytes: int


def is_position_table(name: str) -> bool:
    """True for a rotary `inv_freq` of an old checkpoint, which is not a parameter of the model."""
    return POSITION_TABLE.fullmatch(name) is not None


def required(facts: ModelShape, *, fuses_experts: bool = False) -> dict[str, tuple]:
    """Return name → shape of every tensor that the files must contain.

    With tied embeddings, the output layer is not required.

    Args:
        fuses_experts: a mixture's experts are one tensor per layer and direction, as transformers 5
            keeps them in memory; else one per expert, as it and Mistral's releases store them.
    """
    hidden, inner = facts.hidden_size, facts.intermediate_size
    queries = facts.n_heads * facts.head_dim
    keys = facts.n_kv_heads * facts.head_dim
    n_experts = facts.n_experts
    shapes = {EMBEDDINGS: (facts.vocabulary_size, hidden), "model.norm.weight": (hidden,)}
    if not facts.ties_embeddings:
        shapes[OUTPUT] = (facts.vocabulary_size, hidden)
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    of_layer = {f"{name}.weight": shape for name, shape in layer.items()}
    if not n_experts:
        of_layer["mlp.gate_proj.weight"] = of_layer["mlp.up_proj.weight"] = (inner, hidden)
        of_layer["mlp.down_proj.weight"] = (hidden, inner)
    elif fuses_experts:
        of_layer["mlp.gate.weight"] = (n_experts, hidden)
        of_layer["mlp.experts.gate_up_proj"] = (n_experts, 2 * inner, hidden)
        of_layer["mlp.experts.down_proj"] = (n_experts, hidden, inner)
    else:
        of_layer["block_sparse_moe.gate.weight"] = (n_experts, hidden)
        for expert in range(n_experts):
            name = f"block_sparse_moe.experts.{expert}"
            of_layer[f"{name}.w1.weight"] = (inner, hidden)
            of_layer[f"{name}.w2.weight"] = (hidden, inner)
            of_layer[f"{name}.w3.weight"] = (inner, hidden)
    for number in range(facts.n_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def stored(shards: Sequence[Path]) -> dict[str, Stored]:
    """Read the headers of safetensors files; return their tensors by name.

    Raises:
        StageError: a file is not a complete safetensors file, or a tensor is in two files.
    """
    found: dict[str, Stored] = {}
    for shard in shards:
        for name, tensor in _header(shard).items():
            if name in found:
                raise StageError(
                    "two shards contain the same tensor",
                    where=f"{shard}, {name}",
                    found=f"it is also in {found[name].path.name}",
                    expected="every tensor once",
                    to_fix="fetch the model into an empty folder: files of two models are mixed",
                )
            found[name] = tensor
    return found


def _header(path: Path) -> dict[str, Stored]:
    """
    Raises:
        StageError: the file is not a complete safetensors file.
    """
    files.check_whole(path)
    try:
        with safe_open(path, framework="np"):  # checks that the file is as long as its header says
            pass
    except SafetensorError as error:
        raise StageError(
            "a weights file is damaged or truncated",
            where=path,
            found=f"{error} ({path.stat().st_size:,} bytes)",
            expected="a complete safetensors file",
            to_fix="fetch it or merge again",
        ) from error
    with path.open("rb") as stream:
        n_header = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(n_header))
    header.pop("__metadata__", None)
    return {
        name: Stored(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + n_header + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def check_tensors(shards: Sequence[Path], facts: ModelShape, *, where: Path) -> None:
    """Check that the files contain exactly the tensors that config.json requires.

    Args:
        facts: shape from `read_shape` of the same folder.
        where: the folder, for messages.
    Raises:
        StageError: tensors are missing, extra, or have a wrong shape or a type that cannot be
            merged; the message names the first ten.
    """
    found = stored(shards)
    needed = required(facts, fuses_experts="model.layers.0.mlp.experts.gate_up_proj" in found)
    tied = {EMBEDDINGS, OUTPUT} if facts.ties_embeddings else set()
    tables = {name for name in found if is_position_table(name)}
    missing = needed.keys() - found.keys()
    extra = found.keys() - needed.keys() - tied - tables
    shapes = needed | {name: needed[EMBEDDINGS] for name in tied}
    reshaped = {
        name: f"{name} {list(tensor.shape)}, expected {list(shapes[name])}"
        for name, tensor in found.items()
        if name in shapes and tensor.shape != shapes[name]
    }
    retyped = {
        name: f"{name} {tensor.dtype}"
        for name, tensor in found.items()
        if name not in tables and tensor.dtype not in FLOATS
    }
    if retyped or any(part in name for name in extra for part in QUANTIZED_PARTS):
        raise StageError(
            "the checkpoint is already quantized",
            where=where,
            found=_listed(retyped.values() or sorted(extra)),
            expected=f"weights in 16 or 32 bits ({', '.join(FLOATS)})",
            to_fix=TAKE_16_BITS,
        )
    problems = [
        f"{len(entries)} {what}: {_listed(entries)}"
        for what, entries in (
            ("missing", sorted(missing)),
            ("not in the model", sorted(extra)),
            ("with a wrong shape", [reshaped[name] for name in sorted(reshaped)]),
        )
        if entries
    ]
    if problems:
        raise StageError(
            "the checkpoint's tensors do not match its config.json",
            where=where,
            found="; ".join(problems),
            expected=f"{len(needed)} tensors for {facts.n_layers} layers",
            to_fix=_remedy(missing, extra, reshaped),
        )
    if tied <= found.keys() and tied and not _are_equal(found[EMBEDDINGS], found[OUTPUT]):
        raise StageError(
            "the checkpoint ties output layer and embeddings, but stores two different tensors",
            where=f"{where}: {EMBEDDINGS}, {OUTPUT}",
            found="tie_word_embeddings: true in config.json",
            expected="one tensor, or two equal tensors",
            to_fix="if training did not tie them, set tie_word_embeddings: false in config.json",
        )


def _remedy(missing: set[str], extra: set[str], reshaped: Mapping[str, str]) -> str:
    if missing == {OUTPUT} and not extra and not reshaped:
        return (
            "fetch the model again; if it ties its output layer to its embeddings, set"
            " tie_word_embeddings: true in config.json"
        )
    if any("lora_" in name or name.startswith("base_model.") for name in extra):
        return "this is an adapter, or a model saved with one: set it as runs.<name>.adapter"
    if set(reshaped) <= {EMBEDDINGS, OUTPUT} and reshaped and not missing and not extra:
        return (
            "use config.json and weights of the same model: vocab_size must equal the rows of the"
            " embeddings"
        )
    if missing == {EMBEDDINGS}:
        return (
            "fetch the model again; if it stores its tied matrix only as the output layer, load it"
            " with transformers and save_pretrained: llama.cpp's converter needs the embeddings"
        )
    return (
        "fetch the model again into an empty folder; config.json and weights must belong together"
    )


def _listed(entries: Iterable[str]) -> str:
    entries = list(entries)
    more = f", … ({len(entries) - SHOWN} more)" if len(entries) > SHOWN else ""
    return ", ".join(entries[:SHOWN]) + more


def check_types(found: Mapping[str, Stored]) -> None:
    """
    Raises:
        StageError: a tensor has a type that cannot be merged: integers, 8-bit floats.
    """
    for name, tensor in found.items():
        if tensor.dtype not in FLOATS:
            raise StageError(
                "a tensor is stored in a type that cannot be merged",
                where=f"{tensor.path}, {name}",
                found=tensor.dtype,
                expected=", ".join(FLOATS),
                to_fix="save it in 16 or 32 bits",
            )


def values(tensor: Stored) -> np.ndarray:
    """Return the bits of a stored tensor as unsigned integers, memory-mapped."""
    kind = np.dtype(FLOATS[tensor.dtype][0])
    n_elements = tensor.n_bytes // kind.itemsize
    if not n_elements:
        return np.empty(0, kind)
    # Mapped as bytes, because the data may not be aligned.
    mapped = np.memmap(tensor.path, np.uint8, "r", tensor.first_byte, (tensor.n_bytes,))
    return mapped.view(kind)


def _blocks(tensor: Stored) -> Iterator[np.ndarray]:
    content = values(tensor)
    for first in range(0, len(content), BLOCK_ELEMENTS):
        yield content[first : first + BLOCK_ELEMENTS]


def _are_equal(one: Stored, other: Stored) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        (left == right).all() for left, right in zip(_blocks(one), _blocks(other), strict=True)
    )


def check_values(tensor: Stored, name: str) -> None:
    """Check that all weights are finite, and that embeddings, output layer and norms are not zero.

    The tensor is read once. A download that reserves disk space and is then interrupted leaves a
    file of the right length that ends in zeros. Other matrices may be all zeros (layers added by
    depth up-scaling).

    Raises:
        StageError: a weight is wrong; the message names the tensor and the first wrong element.
    """
    exponent = FLOATS[tensor.dtype][1]
    first, is_zero = 0, True
    for block in _blocks(tensor):
        is_special = (block & block.dtype.type(exponent)) == exponent
        if is_special.any():
            raise StageError(
                "a weight is not a finite number",
                where=f"{tensor.path}, {name}",
                found=f"NaN or infinity at element {first + int(is_special.argmax())}",
                expected="finite numbers: with others, a model answers with nonsense or not at all",
                to_fix="fetch the file again; if its values stay the same, use another version",
            )
        is_zero = is_zero and not block.any()
        first += len(block)
    if is_zero and (name in (EMBEDDINGS, OUTPUT) or "norm" in name):
        raise StageError(
            "a tensor that cannot be zero is all zeros",
            where=f"{tensor.path}, {name}",
            found=f"{first} zeros",
            expected="trained weights",
            to_fix="fetch the file again: an interrupted download can end in zeros",
        )


def check_all_values(shards: Sequence[Path]) -> None:
    """Run `check_values` on every weight in the files."""
    for name, tensor in stored(shards).items():
        if not is_position_table(name):
            check_values(tensor, name)
