"""Names of a checkpoint's tensors in a GGUF. Source: llama.cpp, gguf-py/gguf/tensor_mapping.py."""

from __future__ import annotations

import re

from workflow_scripts.log import StageError

TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
IN_LAYER = {
    "input_layernorm": ("attn_norm",),
    "post_attention_layernorm": ("ffn_norm",),
    "self_attn.q_proj": ("attn_q",),
    "self_attn.k_proj": ("attn_k",),
    "self_attn.v_proj": ("attn_v",),
    "self_attn.o_proj": ("attn_output",),
    "mlp.gate_proj": ("ffn_gate",),
    "mlp.up_proj": ("ffn_up",),
    "mlp.down_proj": ("ffn_down",),
    "mlp.gate": ("ffn_gate_inp",),
    # llama.cpp keeps the two halves apart.
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "mlp.experts.down_proj": ("ffn_down_exps",),
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def names(parameter: str) -> tuple[str, ...]:
    """Return the names of a parameter's tensors in a GGUF: two if llama.cpp splits its rows.

    Raises:
        StageError: a GGUF has no place for the parameter.
    """
    module = parameter.removesuffix(".weight")
    if module in TOP:
        return (f"{TOP[module]}.weight",)
    match = LAYER.fullmatch(module)
    if match is None or match[2] not in IN_LAYER:
        raise StageError("a tensor of the merged model has no place in a GGUF", where=parameter)
    return tuple(f"blk.{match[1]}.{name}.weight" for name in IN_LAYER[match[2]])
