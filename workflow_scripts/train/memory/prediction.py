"""Memory of a training run, predicted from the model's shape.

What autograd keeps is derived from the operations of a decoder layer as they are run here (LoRA of
PEFT on bitsandbytes, `attention.py`, `loss.py`), and so is the moment at which most is alive: the
tests count both on real layers. The price: whoever changes those operations changes this file.

In formulas: h hidden size, f feed-forward width, H and K widths of all query and of all key heads,
c bytes of a computed number, s bytes of a hidden state between layers; bytes are per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from workflow_scripts.handover.training import MemoryParts, Setup
from workflow_scripts.train.memory.shape import PlannedRun, Shape

CUDA_WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper; 8 MiB before
# Of a CPU the whole process counts. Python with the libraries; and beside the largest tensors alive
# what operations make inside, and the gaps of the C library's heap (measured on the demo's model, 1
# and 8 rows of 2,560 tokens: 4 % to 13 % above what comes of these two numbers).
CPU_PROGRAM = 510 * 10**6
CPU_WORKSPACE_FACTOR = 2.5
NF4_BLOCK, ABSMAX_BLOCK, NF4_CODE, ABSMAX_CODE = 64, 256, 16, 256
OPTIMIZER_BLOCK = 256  # of bitsandbytes' 8-bit state
LEAST_8BIT_WEIGHTS = 4096  # smaller tensors keep a 32-bit state


def predict(run: PlannedRun, setup: Setup) -> MemoryParts:
    """Bytes by part at the moment when most is alive."""
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
    """`predict`, of a micro-batch of `n_tokens`."""
    facts, h, s, c = shape.facts, shape.hidden, shape.state_bytes, shape.compute_bytes
    n_layers = facts.n_layers
    tensors = shape.trained
    n_trained = sum(n * math.prod(size) for size, n in tensors.items())
    weights = base_weight_bytes(shape)
    shared = n_gpus if parallelism == "fsdp2" else 1
    communication = 0
    if n_gpus > 1:
        # DDP's buckets; FSDP2's gathered layer, and the next one on its way.
        communication = 4 * n_trained if shared == 1 else 2 * math.ceil(weights / n_layers)

    layer, casts = sum(kept_by_layer(shape).values()), _kept_weights(shape)
    state = s * h
    # Kept after the last layer, until its own backward pass: its norm, and the loss's gradient.
    after_layers = n_tokens * _norm_bytes(shape)
    before = _kept_by_layers(shape, n_tokens=n_tokens, setup=setup)
    per_token = layer_workspace(shape)
    f = facts.intermediate_size * (facts.n_experts_per_token or 1)
    recomputed = (n_tokens * layer + casts) * (setup.n_checkpointed_layers > 0)
    moments = {
        "logits": after_layers + 3 * n_tokens * state + _logits_bytes(shape, n_tokens),
        # RMSNorm's backward pass in PyTorch: five float32 tensors; Liger's writes in place.
        "final_norm": after_layers + n_tokens * h * ((2 * s) if shape.has_liger else 20),
        "layer": recomputed + n_tokens * per_token,
        "weight": recomputed
        + n_tokens * (per_token - f * c)
        + dequantized_bytes(shape)
        + _dora_workspace(shape),
    }
    activations = math.ceil(before)
    workspace = math.ceil(max(moments.values()))
    if shape.is_cuda:
        workspace += CUDA_WORKSPACE
    else:
        workspace = math.ceil(CPU_WORKSPACE_FACTOR * workspace)
    evaluation = evaluation_bytes(shape, evaluation_tokens)
    parts = {
        "base_weights": math.ceil(weights / shared),
        "adapter": 0 if shape.is_full else math.ceil(4 * n_trained / shared),
        "gradients": math.ceil(4 * n_trained / shared),
        "optimizer": math.ceil(optimizer_bytes(shape, tensors) / shared),
        "communication": communication,
        "activations": activations,
        "workspace": workspace,
        "evaluation": max(0, evaluation - activations - workspace),
        "program": 0 if shape.is_cuda else CPU_PROGRAM,
    }
    return MemoryParts(**parts, peak=sum(parts.values()))


def base_weight_bytes(shape: Shape) -> int:
    """The base as it is loaded; of a full fine-tune the weights that train.

    NF4 with double quantization: half a byte a weight, an 8-bit scale for each 64, a 32-bit scale
    for each 256 of these, and the tables. Embeddings, output layer and norms stay as computed.
    """
    facts, method = shape.facts, shape.recipe.method
    width = 4 if method == "full" else shape.compute_bytes
    per_layer = 0
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
    router = shape.hidden * (facts.n_experts or 0)
    per_layer += width * (router + 2 * shape.hidden)
    n_tables = 1 if facts.ties_embeddings else 2
    tables = n_tables * facts.vocabulary_size * shape.hidden
    return facts.n_layers * per_layer + width * (tables + shape.hidden)


def nf4_bytes(n_weights: int) -> int:
    """Of a tensor in NF4 with double quantization: its values, scales and tables."""
    n_scales = math.ceil(n_weights / NF4_BLOCK)
    of_scales = 4 * (math.ceil(n_scales / ABSMAX_BLOCK) + ABSMAX_CODE + 1)
    return math.ceil(n_weights / 2) + n_scales + 4 * NF4_CODE + of_scales


def optimizer_bytes(shape: Shape, tensors: Mapping[tuple[int, ...], int]) -> int:
    """State of the recipe's optimizer; what is paged to the CPU does not count on a GPU."""
    kind, total = shape.recipe.optimizer, 0
    for size, n in tensors.items():
        n_weights = math.prod(size)
        if kind == "adamw" or (kind != "adafactor" and n_weights < LEAST_8BIT_WEIGHTS):
            total += n * 8 * n_weights
        elif kind == "adafactor":
            # A row and a column of means of squares (a vector keeps them all), and a size.
            rows = math.prod(size[:-1]) + math.prod(size[:-2]) * size[-1] if len(size) > 1 else 0
            total += n * 4 * ((rows or n_weights) + 1)
        elif kind == "adamw_8bit" or not shape.is_cuda:
            total += n * 2 * (n_weights + 4 * math.ceil(n_weights / OPTIMIZER_BLOCK))
    return total


def kept_by_layer(shape: Shape) -> dict[str, float]:
    """Bytes a token that autograd keeps in a layer whose backward pass recomputes nothing.

    By part: `norms`; `inputs`, what the adapters (or the trained weights) multiply; `middles`,
    between A and B; `attention`: query, key, value, output and the log-sum-exp of each head;
    `feed_forward`: gate, SiLU and up. Frozen matrices keep nothing but themselves
    (bitsandbytes' MatMul4Bit saves the weight alone).
    """
    facts, recipe, c = shape.facts, shape.recipe, shape.compute_bytes
    h, query, kv = shape.hidden, shape.query_width, shape.kv_width
    adapted = [matrix for matrix in shape.matrices if matrix.rank]
    names = {matrix.name for matrix in (shape.matrices if shape.is_full else adapted)}

    # 16-bit arithmetic casts float32 inputs for each product on its own. PEFT makes them float32
    # in front of a base that is not quantized.
    from_peft = recipe.method == "lora" and not shape.is_fused
    is_cast_apart = c < 4 and (shape.state_bytes > c or from_peft)
    inputs = 0.0
    if recipe.dropout and not shape.is_full:
        mask = 1 if shape.is_cuda else c
        inputs = sum(matrix.n_in * (c + mask) for matrix in adapted)
    elif is_cast_apart:
        inputs = sum(matrix.n_in * c for matrix in shape.matrices if matrix.name in names)
        if shape.is_full and shape.is_cuda:
            # Attention's output and the product come as 16-bit; no cast for o; attention keeps it.
            inputs -= query * c
    else:
        inputs += h * c * bool(names & {"q_proj", "k_proj", "v_proj"})
        inputs += h * c * bool(names & {"gate_proj", "up_proj"})
        inputs += facts.intermediate_size * c * ("down_proj" in names)
        # By segment, the outputs are joined to one: a second copy.
        inputs += query * c * ("o_proj" in names and not shape.is_cuda)
    keys = query if shape.expands_keys else kv
    kept = {
        "norms": 2.0 * _norm_bytes(shape),
        "inputs": float(inputs),
        "middles": float(sum(matrix.rank for matrix in adapted) * c),
        "attention": float(c * (2 * query + 2 * keys) + 4 * facts.n_heads),
        "feed_forward": _kept_by_feed_forward(shape),
    }
    if recipe.dora:
        # The result without the adapter and the adapter's, for the gradient of the magnitudes.
        kept["dora"] = float(sum(2 * c * matrix.n_out for matrix in adapted))
    return kept


def _kept_by_feed_forward(shape: Shape) -> float:
    facts, f = shape.facts, shape.facts.intermediate_size
    width = 4 if shape.recipe.dora else shape.compute_bytes
    if not facts.n_experts:
        return float(width * f * (2 if shape.has_liger else 3))
    # Each token's states are gathered once an expert: gate and up as one, SiLU, product, and the
    # expert's input and output. An estimate: transformers chooses between several kernels.
    n_active = facts.n_experts_per_token or 1
    return float(width * n_active * (4 * f + 2 * shape.hidden) + 8 * facts.n_experts)


def _norm_bytes(shape: Shape) -> int:
    """RMSNorm in PyTorch keeps its input in float32, Liger's as it came; both 1 ÷ RMS. A
    weight that trains wants the normed states as well."""
    h = shape.hidden
    if shape.has_liger:
        return h * shape.state_bytes + 4
    return 4 * h + 4 + (4 * h if shape.is_full else 0)


def _common_bytes(shape: Shape) -> int:
    """A token's rotary tables; its ids, positions and labels."""
    return 2 * shape.facts.head_dim * shape.state_bytes + 32


def _kept_weights(shape: Shape) -> int:
    """Copies of weights that a layer's backward pass wants, bytes: of what trains in float32, as
    autocast multiplies it (a fused layer drops them again); of experts in NF4."""
    is_cast = shape.compute_bytes < 4 and not shape.is_fused
    n_trained = sum(n * math.prod(size) for size, n in shape.trained.items())
    casts = shape.compute_bytes * n_trained // shape.facts.n_layers if is_cast else 0
    return casts + kept_experts(shape)


def _kept_by_layers(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    n_again = setup.n_checkpointed_layers
    n_whole = shape.facts.n_layers - n_again
    of_layer = kept_by_layer(shape)
    # Of what went to the CPU a layer's input is back, and the one before it on its way.
    inputs = min(2, n_again) if setup.offloads_activations else n_again
    per_token = n_whole * sum(of_layer.values()) + _common_bytes(shape)
    per_token += inputs * shape.state_bytes * shape.hidden
    if n_whole and not shape.is_full and "embed_tokens" not in shape.recipe.modules_to_save:
        # The first layer is checkpointed last of all. No gradient goes through its first norm, nor
        # through the dropout of q, k and v behind it.
        per_token -= of_layer["norms"] / 2
        if shape.recipe.dropout:
            n_masked = sum(matrix.rank > 0 for matrix in shape.matrices if matrix.name[0] in "qkv")
            per_token -= n_masked * shape.hidden * (1 if shape.is_cuda else shape.compute_bytes)
    return n_tokens * per_token + n_whole * _kept_weights(shape)


def kept_bytes(shape: Shape, *, n_tokens: int, setup: Setup) -> int:
    """What is kept between the forward and the backward pass of a micro-batch of `n_tokens`."""
    kept = _kept_by_layers(shape, n_tokens=n_tokens, setup=setup)
    kept += n_tokens * (_norm_bytes(shape) + shape.state_bytes * shape.hidden)
    if shape.is_full or "lm_head" in shape.recipe.modules_to_save:
        kept += 4 * shape.facts.vocabulary_size * shape.hidden  # its gradient, already made
    return math.ceil(kept)


def layer_workspace(shape: Shape) -> float:
    """What a layer's backward pass adds to what it kept when most is alive, bytes a token.

    That is in the feed-forward part, where all that the layer kept is still there but what down's
    adapter read: three tensors of the product's size (its gradients by the base and by the adapter
    and their sum; or its gradient and those of its two factors), and the gradient that arrived.
    """
    f = shape.facts.intermediate_size * (shape.facts.n_experts_per_token or 1)
    c = 4 if shape.recipe.dora else shape.compute_bytes
    frees_product = not shape.recipe.dropout and any(
        matrix.name == "down_proj" and (matrix.rank or shape.is_full) for matrix in shape.matrices
    )
    return (2.0 if frees_product else 3.0) * c * f + shape.state_bytes * shape.hidden


def kept_experts(shape: Shape) -> int:
    """Experts in NF4 are dequantized for their products, which keep what they read, bytes a layer
    (`experts.py`)."""
    return shape.compute_bytes * sum(shape.expert_weights()) * (shape.recipe.method == "qlora")


def dequantized_bytes(shape: Shape) -> int:
    """The largest weight of a layer as it is multiplied, where the base is held in fewer bits."""
    if shape.recipe.method not in ("qlora", "lora_int8"):
        return 0
    return shape.compute_bytes * max(matrix.n_in * matrix.n_out for matrix in shape.matrices)


def evaluation_bytes(shape: Shape, n_tokens: int) -> int:
    """What a forward pass without gradients takes beside what training holds all the time.

    In a layer's feed-forward part there are four states (the embeddings, the layer's input, with
    attention added, normed) and the product with its two factors; where PEFT adds an adapter, up's
    result from the base, from the adapter, and their sum.
    """
    state = shape.state_bytes * shape.hidden
    f = shape.facts.intermediate_size * (shape.facts.n_experts_per_token or 1)
    width = shape.compute_bytes * f
    weight = max(dequantized_bytes(shape), kept_experts(shape)) + _dora_workspace(shape)
    in_layer = n_tokens * (4 * state + _common_bytes(shape)) + max(
        n_tokens * (3 if shape.is_fused else 4) * width, n_tokens * 2 * width + weight
    )
    return max(in_layer, 3 * n_tokens * state + _logits_bytes(shape, n_tokens))


def _logits_bytes(shape: Shape, n_tokens: int) -> int:
    """Logits of a chunk, twice in float32 (their exponentials; else the chunk before) and, of two
    chunks, as computed; and the output layer's gradient and its copies where it trains."""
    from workflow_scripts.train import loss

    vocabulary = shape.facts.vocabulary_size
    n_elements = loss.CUDA_CHUNK_ELEMENTS if shape.is_cuda else loss.CHUNK_ELEMENTS
    chunk_tokens = min(max(1, n_elements // vocabulary), n_tokens)
    table = vocabulary * shape.hidden
    trains = shape.is_full or "lm_head" in shape.recipe.modules_to_save
    of_weight = table * (2 * 4 + (shape.compute_bytes if shape.compute_bytes < 4 else 0))
    per_logit = 8 if chunk_tokens == n_tokens else 8 + 2 * shape.compute_bytes
    return per_logit * chunk_tokens * vocabulary + (of_weight if trains else 0)


def _dora_workspace(shape: Shape) -> int:
    """DoRA makes B·A of a whole matrix for its norm: the identity, the product, the weight, and
    their sum, in float32 or as computed."""
    if not shape.recipe.dora:
        return 0
    adapted = [matrix for matrix in shape.matrices if matrix.rank]
    return max(
        4 * matrix.n_in * matrix.n_in + 16 * matrix.n_in * matrix.n_out for matrix in adapted
    )
