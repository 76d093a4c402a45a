"""Memory of a training run, predicted from the model's shape.

The formulas follow the operations of a decoder layer as they run here (LoRA of PEFT on
bitsandbytes, `attention.py`, `loss.py`): what autograd keeps, and the moment at which most memory
is in use. The tests count both on real layers. The cost: a change to those operations must be
mirrored here.

In formulas: h hidden size, f feed-forward width, c bytes of a number in arithmetic, s bytes of a
number of the hidden states between layers. Bytes are per token unless the text says otherwise.
"""

from __future__ import annotations

import math

from workflow_scripts.handover.training import MemoryParts, Setup
from workflow_scripts.train import loss
from workflow_scripts.train.memory.shape import PlannedRun, Shape

CUDA_WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper; 8 MiB before
# On a CPU the whole process counts: Python with its libraries, the temporary tensors inside
# operations, and the gaps in the C library's heap (measured on the demo's model, 1 and 8 rows of
# 2,560 tokens: 4 % to 13 % above what these two numbers give).
CPU_PROGRAM = 510 * 10**6
CPU_WORKSPACE_FACTOR = 2.5
NF4_BLOCK, ABSMAX_BLOCK, NF4_CODE, ABSMAX_CODE = 64, 256, 16, 256
OPTIMIZER_BLOCK = 256  # values per scale of bitsandbytes' 8-bit state
LEAST_8BIT_WEIGHTS = 4096  # smaller tensors keep a 32-bit state


def predict(run: PlannedRun, setup: Setup) -> MemoryParts:
    """Bytes by part at the moment when most memory is in use."""
    return predict_shape(
        run.shape,
        n_tokens=setup.rows_per_micro_batch * run.row_tokens,
        setup=setup,
        n_gpus=run.n_gpus,
        parallelism=run.training.parallelism,
        evaluation_tokens=run.evaluation_tokens,
    )


def predict_shape(
    shape: Shape,
    *,
    n_tokens: int,
    setup: Setup,
    n_gpus: int = 1,
    parallelism: str = "ddp",
    evaluation_tokens: int = 0,
) -> MemoryParts:
    """`predict` for a micro-batch of `n_tokens`."""
    gradients = 4 * shape.n_trained
    weights = base_weight_bytes(shape)
    shared = n_gpus if parallelism == "fsdp2" else 1
    communication = 0
    if n_gpus > 1:
        # DDP's buckets; FSDP2's gathered layer, and the next one on its way.
        communication = gradients if shared == 1 else 2 * math.ceil(weights / shape.facts.n_layers)

    state = shape.state_bytes * shape.hidden
    # Kept from the last layer to its backward pass: the final norm's input, the loss's gradient.
    after_layers = n_tokens * norm_bytes(shape)
    per_token = _layer_workspace(shape)
    recomputed = 0.0
    if setup.n_checkpointed_layers:
        recomputed = n_tokens * sum(kept_by_layer(shape).values()) + _kept_weights(shape)
    moments = (
        # The logits of the loss.
        after_layers + 3 * n_tokens * state + _logits_bytes(shape, n_tokens),
        # The final norm. RMSNorm's backward pass in PyTorch takes five float32 tensors; Liger's
        # writes in place.
        after_layers + n_tokens * (2 * state if shape.has_liger else 20 * shape.hidden),
        # The backward pass of a layer.
        recomputed + n_tokens * per_token,
        # The same, while a weight is dequantized.
        recomputed
        + n_tokens * (per_token - shape.active_width * shape.compute_bytes)
        + _dequantized_bytes(shape)
        + _dora_workspace(shape),
    )
    activations = math.ceil(kept_by_layers(shape, n_tokens=n_tokens, setup=setup))
    workspace = math.ceil(max(moments))
    if shape.is_cuda:
        workspace += CUDA_WORKSPACE
    else:
        workspace = math.ceil(CPU_WORKSPACE_FACTOR * workspace)
    evaluation = evaluation_bytes(shape, evaluation_tokens)
    parts = {
        "base_weights": math.ceil(weights / shared),
        "adapter": 0 if shape.is_full else math.ceil(gradients / shared),
        "gradients": math.ceil(gradients / shared),
        "optimizer": math.ceil(optimizer_bytes(shape) / shared),
        "communication": communication,
        "activations": activations,
        "workspace": workspace,
        "evaluation": max(0, evaluation - activations - workspace),
        "program": 0 if shape.is_cuda else CPU_PROGRAM,
    }
    return MemoryParts(**parts, peak=sum(parts.values()))


def base_weight_bytes(shape: Shape) -> int:
    """Size of the base as it is loaded; for a full fine-tune, of the weights that train.

    Embeddings, output layer and norms are not quantized.
    """
    facts, method = shape.facts, shape.recipe.method
    width = 4 if method == "full" else shape.compute_bytes
    n_norms_and_router = shape.hidden * (2 + (facts.n_experts or 0))
    per_layer = width * n_norms_and_router
    for matrix in shape.matrices:
        n_weights = matrix.n_in * matrix.n_out
        if method == "qlora":
            per_layer += nf4_bytes(n_weights)
        elif method == "lora_int8":
            per_layer += n_weights + 4 * matrix.n_out
        else:
            per_layer += width * n_weights
    for n_weights in shape.expert_weights():
        per_layer += nf4_bytes(n_weights) if method == "qlora" else width * n_weights
    n_tables = 1 if facts.ties_embeddings else 2
    tables = n_tables * facts.vocabulary_size * shape.hidden
    return facts.n_layers * per_layer + width * (tables + shape.hidden)


def nf4_bytes(n_weights: int) -> int:
    """Size of a tensor in NF4 with double quantization.

    Half a byte per weight, an 8-bit scale for each 64, a 32-bit scale for each 256 of these, and
    the tables.
    """
    n_scales = math.ceil(n_weights / NF4_BLOCK)
    of_scales = 4 * (math.ceil(n_scales / ABSMAX_BLOCK) + ABSMAX_CODE + 1)
    return math.ceil(n_weights / 2) + n_scales + 4 * NF4_CODE + of_scales


def optimizer_bytes(shape: Shape) -> int:
    """State of the recipe's optimizer; on a GPU, state that is paged to the CPU does not count."""
    kind, total = shape.recipe.optimizer, 0
    for size, n in shape.trained.items():
        n_weights = math.prod(size)
        if kind == "adamw" or (kind != "adafactor" and n_weights < LEAST_8BIT_WEIGHTS):
            total += n * 8 * n_weights
        elif kind == "adafactor":
            # Means of squares by row and by column (a vector keeps every square), and a size.
            rows = math.prod(size[:-1]) + math.prod(size[:-2]) * size[-1] if len(size) > 1 else 0
            total += n * 4 * ((rows or n_weights) + 1)
        elif kind == "adamw_8bit" or not shape.is_cuda:
            total += n * 2 * (n_weights + 4 * math.ceil(n_weights / OPTIMIZER_BLOCK))
    return total


def kept_by_layer(shape: Shape) -> dict[str, float]:
    """Bytes per token that autograd keeps in a layer that is not checkpointed.

    By part: `norms`; `inputs` of the adapters (or of the trained weights); `middles` between A and
    B; `attention`: query, key, value, output and the log-sum-exp of each head; `feed_forward`:
    gate, SiLU and up. A frozen matrix keeps no activation (bitsandbytes' MatMul4Bit saves only the
    weight).
    """
    facts, recipe, c = shape.facts, shape.recipe, shape.compute_bytes
    h, query, kv = shape.hidden, shape.query_width, shape.kv_width
    adapted = [matrix for matrix in shape.matrices if matrix.rank]
    names = {matrix.name for matrix in (shape.matrices if shape.is_full else adapted)}

    # 16-bit arithmetic casts float32 inputs once per product. PEFT casts them to float32 in front
    # of a base that is not quantized.
    from_peft = recipe.method == "lora" and not shape.is_fused
    is_cast_apart = c < 4 and (shape.state_bytes > c or from_peft)
    if recipe.dropout and not shape.is_full:
        mask = 1 if shape.is_cuda else c
        inputs = sum(matrix.n_in * (c + mask) for matrix in adapted)
    elif is_cast_apart:
        inputs = sum(matrix.n_in * c for matrix in shape.matrices if matrix.name in names)
        if shape.is_full and shape.is_cuda:
            # The input of o is attention's output: 16-bit, no cast, and counted under attention.
            inputs -= query * c
    else:
        inputs = c * (
            h * bool(names & {"q_proj", "k_proj", "v_proj"})
            + h * bool(names & {"gate_proj", "up_proj"})
            + facts.intermediate_size * ("down_proj" in names)
            # Attention by segment joins its outputs, which is a second copy.
            + query * ("o_proj" in names and not shape.is_cuda)
        )
    keys = query if shape.expands_keys else kv
    kept = {
        "norms": 2.0 * norm_bytes(shape),
        "inputs": float(inputs),
        "middles": float(sum(matrix.rank for matrix in adapted) * c),
        "attention": float(c * (2 * query + 2 * keys) + 4 * facts.n_heads),
        "feed_forward": _kept_by_feed_forward(shape),
    }
    if recipe.dora:
        # The results of base and adapter, for the gradient of the magnitudes.
        kept["dora"] = float(sum(2 * c * matrix.n_out for matrix in adapted))
    return kept


def _kept_by_feed_forward(shape: Shape) -> float:
    facts, f = shape.facts, shape.facts.intermediate_size
    width = 4 if shape.recipe.dora else shape.compute_bytes
    if not facts.n_experts:
        return float(width * f * (2 if shape.has_liger else 3))
    # Each token's states are gathered once per expert: gate and up as one tensor, SiLU, product,
    # and the expert's input and output. An estimate: transformers chooses between several kernels.
    n_active = facts.n_experts_per_token or 1
    return float(width * n_active * (4 * f + 2 * shape.hidden) + 8 * facts.n_experts)


def norm_bytes(shape: Shape) -> int:
    """Bytes that a norm keeps: its input (in PyTorch as float32, in Liger as it came) and 1 ÷ RMS;
    the normed states too where its weight trains."""
    if shape.has_liger:
        return shape.hidden * shape.state_bytes + 4
    return 4 * shape.hidden * (2 if shape.is_full else 1) + 4


def _common_bytes(shape: Shape) -> int:
    """Bytes of a token's rotary tables, ids, position and label."""
    return 2 * shape.facts.head_dim * shape.state_bytes + 32


def _kept_weights(shape: Shape) -> int:
    """Bytes of the weight copies that a layer keeps for its backward pass: autocast's 16-bit copies
    of float32 weights that train (a fused layer drops them), and dequantized experts."""
    is_cast = shape.compute_bytes < 4 and not shape.is_fused
    casts = shape.compute_bytes * shape.n_trained // shape.facts.n_layers if is_cast else 0
    return casts + _kept_experts(shape)


def kept_by_layers(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    """Bytes that all layers keep between the forward and the backward pass of `n_tokens`."""
    n_checkpointed = setup.n_checkpointed_layers
    n_whole = shape.facts.n_layers - n_checkpointed
    of_layer = kept_by_layer(shape)
    # Of the offloaded inputs two are on the GPU: the one in use and the one being copied back.
    inputs = min(2, n_checkpointed) if setup.offloads_activations else n_checkpointed
    per_token = n_whole * sum(of_layer.values()) + _common_bytes(shape)
    per_token += inputs * shape.state_bytes * shape.hidden
    if n_whole and not shape.is_full and "embed_tokens" not in shape.recipe.modules_to_save:
        # The first layer is checkpointed only where all are. No gradient flows through its first
        # norm, nor through the dropout of q, k and v behind it.
        per_token -= of_layer["norms"] / 2
        if shape.recipe.dropout:
            n_masked = sum(matrix.rank > 0 for matrix in shape.matrices if matrix.name[0] in "qkv")
            per_token -= n_masked * shape.hidden * (1 if shape.is_cuda else shape.compute_bytes)
    return n_tokens * per_token + n_whole * _kept_weights(shape)


def _layer_workspace(shape: Shape) -> float:
    """Bytes that a layer's backward pass needs at its peak beyond what the layer kept.

    The peak is in the feed-forward part, where everything that the layer kept is still there
    except the input of down's adapter. Added are three tensors of the product's size (its gradients
    by the base and by the adapter and their sum; or its gradient and those of its two factors) and
    the gradient that arrived.
    """
    c = 4 if shape.recipe.dora else shape.compute_bytes
    frees_product = not shape.recipe.dropout and any(
        matrix.name == "down_proj" and (matrix.rank or shape.is_full) for matrix in shape.matrices
    )
    n_tensors = 2.0 if frees_product else 3.0
    return n_tensors * c * shape.active_width + shape.state_bytes * shape.hidden


def _kept_experts(shape: Shape) -> int:
    """Bytes of the dequantized experts that a layer keeps, where they are in NF4 (`experts.py`)."""
    return shape.compute_bytes * sum(shape.expert_weights()) * (shape.recipe.method == "qlora")


def _dequantized_bytes(shape: Shape) -> int:
    """Bytes of a layer's largest weight once dequantized; 0 where the base is not quantized."""
    if shape.recipe.method not in ("qlora", "lora_int8"):
        return 0
    return shape.compute_bytes * max(matrix.n_in * matrix.n_out for matrix in shape.matrices)


def evaluation_bytes(shape: Shape, n_tokens: int) -> int:
    """Bytes that a forward pass without gradients takes, weights and optimizer not counted.

    In a layer's feed-forward part four states are in use (the embeddings, the layer's input, the
    sum with attention, the normed sum) and the product with its two factors; where PEFT adds an
    adapter, up's result from the base, from the adapter, and their sum.
    """
    state = shape.state_bytes * shape.hidden
    width = shape.compute_bytes * shape.active_width
    weight = max(_dequantized_bytes(shape), _kept_experts(shape)) + _dora_workspace(shape)
    in_layer = n_tokens * (4 * state + _common_bytes(shape)) + max(
        n_tokens * (3 if shape.is_fused else 4) * width, n_tokens * 2 * width + weight
    )
    return max(in_layer, 3 * n_tokens * state + _logits_bytes(shape, n_tokens))


def _logits_bytes(shape: Shape, n_tokens: int) -> int:
    """Bytes of the loss: a chunk's logits twice in float32 (with their exponentials or the chunk
    before), those of two chunks as computed; and the output layer's gradient with its copies where
    that layer trains."""
    vocabulary = shape.facts.vocabulary_size
    n_elements = loss.CUDA_CHUNK_ELEMENTS if shape.is_cuda else loss.CHUNK_ELEMENTS
    chunk_tokens = min(max(1, n_elements // vocabulary), n_tokens)
    per_logit = 8 if chunk_tokens == n_tokens else 8 + 2 * shape.compute_bytes
    logits = per_logit * chunk_tokens * vocabulary
    if not (shape.is_full or "lm_head" in shape.recipe.modules_to_save):
        return logits
    per_weight = 2 * 4 + (shape.compute_bytes if shape.compute_bytes < 4 else 0)
    return logits + per_weight * vocabulary * shape.hidden


def _dora_workspace(shape: Shape) -> int:
    """Bytes that DoRA takes for the norm of a whole matrix: an identity, B·A, the weight and
    their sum, in float32 or in the type of the arithmetic."""
    if not shape.recipe.dora:
        return 0
    adapted = [matrix for matrix in shape.matrices if matrix.rank]
    return max(
        4 * matrix.n_in * matrix.n_in + 16 * matrix.n_in * matrix.n_out for matrix in adapted
    )
