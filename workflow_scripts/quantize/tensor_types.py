"""The types that the tensors of a GGUF get, before it is made and after.

llama.cpp gives the tensors of one quantization several types, and another one altogether where the
length of a row is not a multiple of the type's block: 256 for k-quants and most i-quants, 32 for
the rest. A width of 576 turns most of Q4_K_M into Q5_0. Before training, llama.cpp's own quantizer
is asked in a dry run, on a file that has the model's shapes and no weights.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from workflow_scripts.handover.facts import ModelShape
from workflow_scripts.handover.plans import GgufContents, TensorTypes
from workflow_scripts.log import StageError
from workflow_scripts.models import tensors
from workflow_scripts.quantize import llama_cpp_source, quantizer
from workflow_scripts.settings import GgufSettings, MixSettings

if TYPE_CHECKING:
    import numpy as np

# Name in a checkpoint → in a GGUF. Source: llama.cpp, gguf-py/gguf/tensor_mapping.py.
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
}
# llama.cpp holds the halves of this one apart.
GATE_UP, HALVES = "mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight")
# What the converter keeps in float32.
IN_FLOAT32 = re.compile(r".*_norm\.weight|.*ffn_gate_inp\.weight")
# Share of the weights in other types than asked above which it is said.
TOLD_FRACTION = 0.05
# Every block of every type divides it.
BLOCK = 256
DRY_RUN_LINE = re.compile(
    r"^\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s+-\s+\[.*?\], type =\s*(?P<type>\S+), size =[^\n]*?"
    r"(?:\((?P<planned>\w+)\))?$",
    re.MULTILINE,
)


def gguf_shapes(facts: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a model's GGUF; the length of a row comes last."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.required(facts, fuses_experts=True).items():
        if name in NAMES:
            shapes[NAMES[name]] = shape
            continue
        _, _, number, kind = name.split(".", 3)
        if kind == GATE_UP:
            n_experts, n_rows, n_columns = shape
            for half in HALVES:
                shapes[f"blk.{number}.{half}"] = (n_experts, n_rows // 2, n_columns)
        else:
            shapes[f"blk.{number}.{LAYER_NAMES[kind]}"] = shape
    return shapes


def types_of(
    facts: ModelShape, settings: GgufSettings, name: str, *, fits_blocks: bool = False
) -> dict[str, str]:
    """`planned_types` of a quantization that a config names."""
    return planned_types(
        facts,
        settings.mix(name),
        has_imatrix=settings.uses_imatrix(name),
        fits_blocks=fits_blocks,
        name=name,
    )


def planned(facts: ModelShape, settings: GgufSettings, name: str) -> TensorTypes:
    """`described` of a quantization that is not made yet."""
    shapes = gguf_shapes(facts)
    made = types_of(facts, settings, name)
    weights = {tensor: (kind, prod(shapes[tensor])) for tensor, kind in made.items()}
    return described(facts, settings, name, weights)


def written(path: Path, facts: ModelShape, settings: GgufSettings, name: str) -> GgufContents:
    """`described` of a file, from its own table, with the size of its weights.

    Args:
        name: of its quantization, or `F16`.
    """
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
    """What a quantization holds against what its name means.

    Args:
        name: of the quantization, or `F16`.
        weights: type of each tensor, and how many weights it has.
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
    """The type that llama.cpp's quantizer will give each tensor of a model's GGUF.

    Args:
        mix: the quantization.
        has_imatrix: whether it is made with an importance matrix, which changes some choices.
        name: of the quantization, for the message; None is the mix's type.
        fits_blocks: as if every row were a multiple of every block: what the quantization means.
    Raises:
        StageError: llama.cpp refuses the quantization.
    """
    import llama_cpp
    import numpy as np
    from llama_cpp._logger import llama_log_callback

    shapes = gguf_shapes(facts)
    if fits_blocks:
        shapes = {
            name: (*shape[:-1], -(-shape[-1] // BLOCK) * BLOCK) for name, shape in shapes.items()
        }
    said: list[bytes] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        said.append(text)

    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "shapes.gguf")
        write_shapes(model, facts, shapes)
        llama_cpp.llama_backend_init()
        params = quantizer.parameters(mix)
        params.dry_run = True
        importance = {"none": np.ones(1, np.float32)}  # asked for its presence, not its content
        if has_imatrix:
            params.imatrix = quantizer.imatrix_entries(importance)
        llama_cpp.llama_log_set(listen, None)
        try:
            code = llama_cpp.llama_model_quantize(
                str(model).encode(), str(Path(folder, "none.gguf")).encode(), ctypes.byref(params)
            )
        finally:
            llama_cpp.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    text = b"".join(said).decode(errors="replace")
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
    # `output` and `token_embd` of a mix are taken as they are: quantizing would abort the process.
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
    """A GGUF with a model's header and no weights: the file ends in a hole of their size."""
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
        size = (4 if is_float32 else 2) * prod(shape)
        writer.add_tensor_info(name, shape, _numpy_type(is_float32), size, raw_dtype=kind)
        n_bytes += -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + gguf.GGUF_DEFAULT_ALIGNMENT + n_bytes)


def _numpy_type(is_float32: bool) -> np.dtype[np.float16 | np.float32]:
    import numpy as np

    return np.dtype(np.float32 if is_float32 else np.float16)
