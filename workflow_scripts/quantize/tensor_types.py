"""Types of a GGUF's tensors, before the file is made and after.

llama.cpp uses several types in one quantization, and a fallback type if the length of a row is not
a multiple of the type's block: 256 for k-quants and most i-quants, 32 for the rest. A width of 576
turns most of Q4_K_M into Q5_0. Before training, a dry run of llama.cpp's own quantizer gives the
types, on a file with the model's shapes and no weights.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.plans import GgufContents, TensorTypes
from workflow_scripts.log import StageError
from workflow_scripts.models import tensors
from workflow_scripts.quantize import gguf_names, llama_cpp_source
from workflow_scripts.settings import GgufSettings, MixSettings

# Tensors that the converter keeps in float32.
IN_FLOAT32 = re.compile(r".*_norm\.weight|.*ffn_gate_inp\.weight")
# Above this share of the weights in other types than requested there is a warning.
TOLD_FRACTION = 0.05
# A multiple of the block of every type.
BLOCK = 256
DRY_RUN_LINE = re.compile(
    r"^\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s+-\s+\[.*?\], type =\s*(?P<type>\S+), size =[^\n]*?"
    r"(?:\((?P<planned>\w+)\))?$",
    re.MULTILINE,
)


def gguf_shapes(facts: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a model's GGUF by name; the row length comes last."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter, shape in tensors.required(facts, fuses_experts=True).items():
        names = gguf_names.names(parameter)
        if len(names) == 2:
            n_experts, n_rows, n_columns = shape
            shape = (n_experts, n_rows // 2, n_columns)
        shapes |= dict.fromkeys(names, shape)
    return shapes


def types_of(
    facts: ModelShape, settings: GgufSettings, name: str, *, fits_blocks: bool = False
) -> dict[str, str]:
    """Return `planned_types` for a quantization that a config names."""
    return planned_types(
        facts,
        settings.mix(name),
        has_imatrix=settings.uses_imatrix(name),
        fits_blocks=fits_blocks,
        name=name,
    )


def planned(facts: ModelShape, settings: GgufSettings, name: str) -> TensorTypes:
    """Describe a quantization that has not been made yet."""
    shapes = gguf_shapes(facts)
    made = types_of(facts, settings, name)
    weights = {tensor: (kind, prod(shapes[tensor])) for tensor, kind in made.items()}
    return described(facts, settings, name, weights)


def written(path: Path, facts: ModelShape, settings: GgufSettings, name: str) -> GgufContents:
    """Describe the types in a file, and the size of its weights.

    Args:
        name: name of its quantization, or `F16`.
    """
    from workflow_scripts.quantize import quantizer  # llama_cpp: the release page needs none of it

    table = quantizer.tensor_table(path)
    n_weights = sum(tensor.n_elements for tensor in table.values())
    weights = {tensor: (entry.type, entry.n_elements) for tensor, entry in table.items()}
    types = described(facts, settings, name, weights)
    return GgufContents(
        n_weights=n_weights,
        bits_per_weight=8 * sum(tensor.n_bytes for tensor in table.values()) / n_weights,
        **dict(types),
    )


def described(
    facts: ModelShape,
    settings: GgufSettings,
    name: str,
    weights: Mapping[str, tuple[str, int]],
) -> TensorTypes:
    """Compare the types in a quantization with those that its name means.

    Args:
        name: name of the quantization, or `F16`.
        weights: type and number of weights of each tensor.
    """
    asked = {} if name == "F16" else types_of(facts, settings, name, fits_blocks=True)
    by_type: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    n_fallen = 0
    for tensor, (kind, n) in weights.items():
        by_type[kind] += n
        if asked.get(tensor, kind) != kind:
            n_fallen += n
            fallbacks[f"{asked[tensor]} → {kind}"] += 1
    total = by_type.total()
    return TensorTypes(
        fallback_fraction=n_fallen / total,
        type_fractions={kind: n / total for kind, n in by_type.most_common()},
        fallbacks=dict(fallbacks.most_common()),
    )


def planned_types(
    facts: ModelShape,
    mix: MixSettings,
    *,
    has_imatrix: bool,
    fits_blocks: bool = False,
    name: str | None = None,
) -> dict[str, str]:
    """Return the type that llama.cpp's quantizer will give each tensor of a model's GGUF.

    Args:
        mix: settings of the quantization.
        has_imatrix: True if it is made with an importance matrix, which changes some choices.
        name: name of the quantization for messages; None is the mix's type.
        fits_blocks: plan as if every row were a multiple of every block: the types that the
            quantization's name means.
    Raises:
        StageError: llama.cpp refuses the quantization.
    """
    import llama_cpp  # the release page needs none of it
    from llama_cpp._logger import llama_log_callback

    from workflow_scripts.quantize import quantizer

    shapes = gguf_shapes(facts)
    if fits_blocks:
        shapes = {
            name: (*shape[:-1], -(-shape[-1] // BLOCK) * BLOCK) for name, shape in shapes.items()
        }
    logged: list[bytes] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        logged.append(text)

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "shapes.gguf")
        write_shapes(model, facts, shapes)
        llama_cpp.llama_backend_init()
        params = quantizer.parameters(mix)
        params.dry_run = True
        importance = {"none": np.ones(1, np.float32)}  # only its presence counts
        if has_imatrix:
            params.imatrix = quantizer.imatrix_entries(importance)
        llama_cpp.llama_log_set(listen, None)
        try:
            code = llama_cpp.llama_model_quantize(
                str(model).encode(), str(Path(folder, "none.gguf")).encode(), ctypes.byref(params)
            )
        finally:
            llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    text = b"".join(logged).decode(errors="replace")
    if code:
        raise StageError(
            f"llama.cpp cannot make {name or mix.type} of this model's widths",
            where=f"gguf.quantizations, {name or mix.type}",
            found=" ".join(text.strip().splitlines()[-1].split()),
            expected="rows that are multiples of the type's block, or a type with a fallback",
            to_fix="choose another type: Q8_0, Q5_0 and Q4_0 need rows that are multiples of 32",
        )
    planned = {
        match["name"]: (match["planned"] or match["type"]).upper()
        for match in DRY_RUN_LINE.finditer(text)
    }
    assert planned.keys() == shapes.keys(), text
    # llama.cpp takes `output` and `token_embd` of a mix unchecked, and would abort the process.
    for tensor, kind in planned.items():
        block = quantizer.block_size(kind)
        if shapes[tensor][-1] % block:
            raise StageError(
                f"{kind} cannot hold rows of {shapes[tensor][-1]}",
                where=f"gguf.quantizations, {name or mix.type}: {tensor}",
                found=f"{shapes[tensor][-1]} weights in a row",
                expected=f"a multiple of {block}",
                to_fix="choose F16 for this tensor, or a type with smaller blocks",
            )
    return planned


def write_shapes(path: Path, facts: ModelShape, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a GGUF with a model's header and no weights: the file ends in a hole of their size."""
    gguf = llama_cpp_source.gguf_package()
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_block_count(facts.n_layers)
    writer.add_context_length(facts.context_tokens)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_head_count(facts.n_heads)
    writer.add_head_count_kv(facts.n_kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(facts.vocabulary_size)
    if facts.n_experts:
        writer.add_expert_count(facts.n_experts)
        writer.add_expert_used_count(facts.n_experts_per_token)
    n_bytes = 0
    for name, shape in shapes.items():
        is_float32 = IN_FLOAT32.fullmatch(name) is not None
        kind = gguf.GGMLQuantizationType.F32 if is_float32 else gguf.GGMLQuantizationType.F16
        dtype: np.dtype[np.floating] = np.dtype(np.float32 if is_float32 else np.float16)
        size = dtype.itemsize * prod(shape)
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=kind)
        n_bytes += -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + gguf.GGUF_DEFAULT_ALIGNMENT + n_bytes)
