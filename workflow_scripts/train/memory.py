"""Memory of a training run, predicted from the model's shape, and the layout that fits.

What autograd keeps is derived from the operations of a decoder layer as they are run here (LoRA of
PEFT on bitsandbytes, `attention.py`, `loss.py`), and so is the moment at which most is alive: the
tests count both on real layers. The price: whoever changes those operations changes this file.

In formulas: h hidden size, f feed-forward width, H and K widths of all query and of all key heads,
c bytes of a computed number, s bytes of a hidden state between layers; bytes are per token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

from workflow_scripts.data.cost import CostModel
from workflow_scripts.log import StageError
from workflow_scripts.models.checkpoint import served_context
from workflow_scripts.settings import RecipeSettings, TrainingSettings
from workflow_scripts.train.lora import ATTENTION, MLP, kv_rank, target_modules

DeviceType = Literal["cuda", "cpu"]
Facts = Mapping[str, Any]

# Share of the available bytes left alone: the allocator's gaps between blocks of unequal size.
MARGIN = 0.06
# Setups whose speeds differ by less are equal: the smaller one is taken.
EQUAL_SPEED = 0.02
# A step down after an out-of-memory asks for this share of what was predicted.
STEP_DOWN = 0.85
# Arithmetic that passes while a byte moves, of GPUs since Ampere (A100: 312 TFLOP/s ÷ 1.6 TB/s).
FLOPS_PER_BYTE = 200
CUDA_WORKSPACE = 32 * 2**20  # cuBLAS's on Hopper; 8 MiB before
# Of a CPU the whole process counts. Python with the libraries; and beside the largest tensors alive
# what operations make inside, and the gaps of the C library's heap (measured on the demo's model, 1
# and 8 rows of 2,560 tokens: 4 % to 13 % above what comes of these two numbers).
CPU_PROGRAM = 510 * 10**6
CPU_WORKSPACE_FACTOR = 2.5
NF4_BLOCK, ABSMAX_BLOCK, NF4_CODE, ABSMAX_CODE = 64, 256, 16, 256
OPTIMIZER_BLOCK = 256  # of bitsandbytes' 8-bit state
LEAST_8BIT_WEIGHTS = 4096  # smaller tensors keep a 32-bit state
ROW_STEP_TOKENS = 64  # of a suggested row length
PARTS = (
    "base_weights", "adapter", "gradients", "optimizer", "communication", "activations",
    "workspace", "evaluation", "program",
)  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """How a run is laid out on a GPU."""

    rows_per_micro_batch: int
    n_checkpointed_layers: int
    """Recomputed in the backward pass, evenly spread."""
    offloads_activations: bool
    """What checkpointing saves goes to the CPU's memory."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a decoder layer, and the rank of its adapter."""

    name: str
    n_in: int
    n_out: int
    rank: int
    """0 where it has none."""


@dataclass(frozen=True)
class Shape:
    """A model under a recipe on a kind of device: what every formula below asks for."""

    facts: Facts
    recipe: RecipeSettings
    compute_bytes: int
    is_cuda: bool
    """Attention by the varlen kernel; dropout keeps a mask of single bytes."""
    has_liger: bool
    expands_keys: bool = False
    """`varlen_attn` without `enable_gqa` (torch 2.11) is given keys repeated for every head."""
    fuses: bool = True
    """Plain LoRA runs as one operation (`projections.py`), else as PEFT has it."""

    @property
    def hidden(self) -> int:
        return self.facts["hidden_size"]

    @property
    def query_width(self) -> int:
        return self.facts["n_heads"] * self.facts["head_dim"]

    @property
    def kv_width(self) -> int:
        return self.facts["n_kv_heads"] * self.facts["head_dim"]

    @property
    def is_full(self) -> bool:
        return self.recipe.method == "full"

    @property
    def is_fused(self) -> bool:
        recipe = self.recipe
        return (
            self.fuses
            and recipe.method in ("qlora", "lora")
            and not (recipe.dora or recipe.dropout)
        )

    @property
    def state_bytes(self) -> int:
        """Of a hidden state's number: float32 where float32 embeddings or DoRA's float32 magnitudes
        make it so, else as computed."""
        return 4 if self.is_full or self.recipe.dora else self.compute_bytes

    @cached_property
    def matrices(self) -> list[Matrix]:
        """Those of one layer, experts left out."""
        facts = self.facts
        feed_forward = facts["intermediate_size"]
        widths = {
            "q_proj": (self.hidden, self.query_width),
            "k_proj": (self.hidden, self.kv_width),
            "v_proj": (self.hidden, self.kv_width),
            "o_proj": (self.query_width, self.hidden),
        }
        if not facts["n_experts"]:
            widths |= {
                "gate_proj": (self.hidden, feed_forward),
                "up_proj": (self.hidden, feed_forward),
                "down_proj": (feed_forward, self.hidden),
            }
        of_kv = kv_rank(self.recipe, n_heads=facts["n_heads"], n_kv_heads=facts["n_kv_heads"])
        targets = [] if self.is_full else target_modules(self.recipe, dict(facts))
        names = {name.split(".")[-1]: name for name in ATTENTION + MLP}
        return [
            Matrix(
                name,
                *width,
                (of_kv if name in ("k_proj", "v_proj") else self.recipe.rank)
                if any(f".{names[name]}".endswith(f".{target}") for target in targets)
                else 0,
            )
            for name, width in widths.items()
        ]

    def expert_weights(self) -> list[int]:
        """Of the two tensors that hold all experts of a layer; none in a dense model."""
        size = (self.facts["n_experts"] or 0) * self.hidden * self.facts["intermediate_size"]
        return [2 * size, size] if size else []

    @cached_property
    def trained(self) -> dict[tuple[int, ...], int]:
        """How many tensors of each shape train beside a frozen base, or all of them for `full`."""
        facts, recipe = self.facts, self.recipe
        n_layers, n_experts = facts["n_layers"], facts["n_experts"] or 0
        feed_forward, vocabulary = facts["intermediate_size"], facts["vocabulary_size"]
        found: dict[tuple[int, ...], int] = {}

        def add(size: tuple[int, ...], n: int = n_layers) -> None:
            found[size] = found.get(size, 0) + n

        for matrix in self.matrices:
            if self.is_full:
                add((matrix.n_out, matrix.n_in))
            elif matrix.rank:
                add((matrix.rank, matrix.n_in))
                add((matrix.n_out, matrix.rank))
                if recipe.dora:
                    add((matrix.n_out,))
        if self.is_full:
            add((vocabulary, self.hidden), 1 if facts["ties_embeddings"] else 2)
            add((self.hidden,), 2 * n_layers + 1)
            if n_experts:
                add((n_experts, 2 * feed_forward, self.hidden))
                add((n_experts, self.hidden, feed_forward))
        elif recipe.adapts_experts and n_experts:
            for n_in, n_out in ((self.hidden, 2 * feed_forward), (feed_forward, self.hidden)):
                add((recipe.rank * n_experts, n_in))
                add((n_out, recipe.rank * n_experts))
        if n_experts and recipe.trains_router:
            add((n_experts, self.hidden))
        for _ in recipe.modules_to_save:
            add((vocabulary, self.hidden), 1)
        return found


def shape_of(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    device_type: DeviceType,
) -> Shape:
    """What runs on this kind of device: 16-bit arithmetic and the varlen kernel on CUDA."""
    is_cuda = device_type == "cuda"
    return Shape(
        facts,
        recipe,
        compute_bytes=2 if is_cuda else 4,
        is_cuda=is_cuda,
        has_liger=is_cuda and _liger_is_used(training, facts),
        expands_keys=is_cuda and not _varlen_groups_heads(),
    )


def _liger_is_used(training: TrainingSettings, facts: Facts) -> bool:
    if training.kernels == "torch" or facts["model_type"] != "mistral":
        return False
    import importlib.util

    return training.kernels == "liger" or importlib.util.find_spec("liger_kernel") is not None


@cache
def _varlen_groups_heads() -> bool:
    from importlib import metadata

    major, minor = metadata.version("torch").split(".")[:2]
    return (int(major), int(minor)) >= (2, 12)


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
    router = shape.hidden * (facts["n_experts"] or 0)
    per_layer += width * (router + 2 * shape.hidden)
    n_tables = 1 if facts["ties_embeddings"] else 2
    tables = n_tables * facts["vocabulary_size"] * shape.hidden
    return facts["n_layers"] * per_layer + width * (tables + shape.hidden)


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
        inputs += facts["intermediate_size"] * c * ("down_proj" in names)
        # By segment, the outputs are joined to one: a second copy.
        inputs += query * c * ("o_proj" in names and not shape.is_cuda)
    keys = query if shape.expands_keys else kv
    kept = {
        "norms": 2.0 * _norm_bytes(shape),
        "inputs": float(inputs),
        "middles": float(sum(matrix.rank for matrix in adapted) * c),
        "attention": float(c * (2 * query + 2 * keys) + 4 * facts["n_heads"]),
        "feed_forward": _kept_by_feed_forward(shape),
    }
    if recipe.dora:
        # The result without the adapter and the adapter's, for the gradient of the magnitudes.
        kept["dora"] = float(sum(2 * c * matrix.n_out for matrix in adapted))
    return kept


def _norm_bytes(shape: Shape) -> int:
    """RMSNorm in PyTorch keeps its input in float32, Liger's as it came; both 1 ÷ RMS. A
    weight that trains wants the normed states as well."""
    h = shape.hidden
    if shape.has_liger:
        return h * shape.state_bytes + 4
    return 4 * h + 4 + (4 * h if shape.is_full else 0)


def _common_bytes(shape: Shape) -> int:
    """A token's rotary tables; its ids, positions and labels."""
    return 2 * shape.facts["head_dim"] * shape.state_bytes + 32


def _kept_weights(shape: Shape) -> int:
    """Copies of weights that a layer's backward pass wants, bytes: of what trains in float32, as
    autocast multiplies it (a fused layer drops them again); of experts in NF4."""
    is_cast = shape.compute_bytes < 4 and not shape.is_fused
    n_trained = sum(n * math.prod(size) for size, n in shape.trained.items())
    casts = shape.compute_bytes * n_trained // shape.facts["n_layers"] if is_cast else 0
    return casts + kept_experts(shape)


def _kept_by_layers(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    n_again = setup.n_checkpointed_layers
    n_whole = shape.facts["n_layers"] - n_again
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
        kept += 4 * shape.facts["vocabulary_size"] * shape.hidden  # its gradient, already made
    return math.ceil(kept)


def _kept_by_feed_forward(shape: Shape) -> float:
    facts, f = shape.facts, shape.facts["intermediate_size"]
    width = 4 if shape.recipe.dora else shape.compute_bytes
    if not facts["n_experts"]:
        return float(width * f * (2 if shape.has_liger else 3))
    # Each token's states are gathered once an expert: gate and up as one, SiLU, product, and the
    # expert's input and output. An estimate: transformers chooses between several kernels.
    n_active = facts["n_experts_per_token"]
    return float(width * n_active * (4 * f + 2 * shape.hidden) + 8 * facts["n_experts"])


def layer_workspace(shape: Shape) -> float:
    """What a layer's backward pass adds to what it kept when most is alive, bytes a token.

    That is in the feed-forward part, where all that the layer kept is still there but what down's
    adapter read: three tensors of the product's size (its gradients by the base and by the adapter
    and their sum; or its gradient and those of its two factors), and the gradient that arrived.
    """
    f = shape.facts["intermediate_size"] * (shape.facts["n_experts_per_token"] or 1)
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


def predict(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    setup: Setup,
    n_gpus: int,
    device_type: DeviceType,
    evaluation_tokens: int | None = None,
) -> dict[str, int]:
    """Bytes by part at the moment when most is alive, and their sum, `peak`.

    Args:
        facts: of read_model_facts.
        row_tokens: length of a row of training.
        n_gpus: of all nodes.
        evaluation_tokens: longest row of the validation loss; None is the longest there can be.
    """
    return predict_shape(
        shape_of(facts, recipe, training, device_type=device_type),
        n_tokens=setup.rows_per_micro_batch * row_tokens,
        setup=setup,
        n_gpus=n_gpus,
        parallelism=training.parallelism,
        evaluation_tokens=_evaluation_tokens(facts, recipe, row_tokens, evaluation_tokens),
    )


def _evaluation_tokens(
    facts: Facts, recipe: RecipeSettings, row_tokens: int, longest: int | None
) -> int:
    """Longest row of the validation loss, as `validation.py` packs them; 0 where none is taken."""
    return max(row_tokens, longest or served_context(dict(facts))) if recipe.evaluations else 0


def predict_shape(
    shape: Shape,
    *,
    n_tokens: int,
    setup: Setup,
    n_gpus: int = 1,
    parallelism: str = "ddp",
    evaluation_tokens: int = 0,
) -> dict[str, int]:
    """`predict`, of a micro-batch of `n_tokens`."""
    facts, h, s, c = shape.facts, shape.hidden, shape.state_bytes, shape.compute_bytes
    n_layers = facts["n_layers"]
    tensors = shape.trained
    n_trained = sum(n * math.prod(size) for size, n in tensors.items())
    weights = base_weight_bytes(shape)
    shared = n_gpus if parallelism == "fsdp2" else 1
    parts = dict.fromkeys(PARTS, 0)
    parts["base_weights"] = math.ceil(weights / shared)
    parts["adapter"] = 0 if shape.is_full else math.ceil(4 * n_trained / shared)
    parts["gradients"] = math.ceil(4 * n_trained / shared)
    parts["optimizer"] = math.ceil(optimizer_bytes(shape, tensors) / shared)
    if n_gpus > 1:
        # DDP's buckets; FSDP2's gathered layer, and the next one on its way.
        parts["communication"] = 4 * n_trained if shared == 1 else 2 * math.ceil(weights / n_layers)

    layer, casts = sum(kept_by_layer(shape).values()), _kept_weights(shape)
    state = s * h
    # Kept after the last layer, until its own backward pass: its norm, and the loss's gradient.
    after_layers = n_tokens * _norm_bytes(shape)
    before = _kept_by_layers(shape, n_tokens=n_tokens, setup=setup)
    per_token = layer_workspace(shape)
    f = facts["intermediate_size"] * (facts["n_experts_per_token"] or 1)
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
    parts["activations"] = math.ceil(before)
    parts["workspace"] = math.ceil(max(moments.values()))
    if shape.is_cuda:
        parts["workspace"] += CUDA_WORKSPACE
    else:
        parts["workspace"] = math.ceil(CPU_WORKSPACE_FACTOR * parts["workspace"])
        parts["program"] = CPU_PROGRAM

    evaluation = evaluation_bytes(shape, evaluation_tokens)
    parts["evaluation"] = max(0, evaluation - parts["activations"] - parts["workspace"])
    return parts | {"peak": sum(parts.values())}


def evaluation_bytes(shape: Shape, n_tokens: int) -> int:
    """What a forward pass without gradients takes beside what training holds all the time.

    In a layer's feed-forward part there are four states (the embeddings, the layer's input, with
    attention added, normed) and the product with its two factors; where PEFT adds an adapter, up's
    result from the base, from the adapter, and their sum.
    """
    state = shape.state_bytes * shape.hidden
    f = shape.facts["intermediate_size"] * (shape.facts["n_experts_per_token"] or 1)
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

    vocabulary = shape.facts["vocabulary_size"]
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


def flops_per_token(shape: Shape, *, n_tokens: int, setup: Setup) -> float:
    """Time of a token of training as arithmetic: what is multiplied, and what passes meanwhile.

    A frozen base multiplies twice (output, gradient of its input), a trained one three times; a
    checkpointed layer once more. NF4 and int8 are read and written out in 16 bits at each of these
    passes, whatever the micro-batch: few tokens waste it. Offloading waits for the CPU's bus.
    """
    costs = CostModel.of(shape.facts)
    weights = costs.linear_flops_per_token / 4
    again = setup.n_checkpointed_layers / shape.facts["n_layers"]
    passes = (3 if shape.is_full else 2) + again
    moved = {"qlora": 0.5 + 2, "lora_int8": 1 + 2}.get(shape.recipe.method, 0.0)
    ratio = FLOPS_PER_BYTE if shape.is_cuda else FLOPS_PER_BYTE / 10
    slower = 1.2 if setup.offloads_activations else 1.0
    return slower * (2 * weights * passes + ratio * moved * weights * passes / n_tokens)


def rows_a_gpu(recipe: RecipeSettings, n_gpus: int) -> int:
    """Rows of an optimizer step on each GPU.

    Raises:
        StageError: the step cannot be shared out.
    """
    rows, rest = divmod(recipe.rows_per_step, n_gpus)
    if rest:
        nearest = [n * n_gpus for n in (rows, rows + 1) if n]
        raise StageError(
            "the rows of a step cannot be shared out over the GPUs",
            where="recipes.<name>.rows_per_step, training.gpus × training.nodes",
            found=f"{recipe.rows_per_step} rows over {n_gpus} GPUs",
            expected=f"a multiple of {n_gpus}",
            to_fix="rows_per_step: " + " or ".join(map(str, nearest)),
        )
    return rows


def setups(
    facts: Facts, recipe: RecipeSettings, training: TrainingSettings, *, n_gpus: int
) -> list[Setup]:
    """Every layout that the settings leave open.

    Raises:
        StageError: `rows_per_micro_batch` does not divide the rows of a GPU.
    """
    n_rows, n_layers = rows_a_gpu(recipe, n_gpus), facts["n_layers"]
    divisors = [n for n in range(1, n_rows + 1) if n_rows % n == 0]
    rows = training.rows_per_micro_batch
    if rows != "auto" and rows not in divisors:
        raise StageError(
            "a step has no whole number of such micro-batches",
            where="training.rows_per_micro_batch",
            found=f"{rows}, of {n_rows} rows a step on each GPU",
            expected="one of " + ", ".join(map(str, divisors)),
        )
    again = {
        "auto": list(range(n_layers + 1)),
        "off": [0],
        "full": [n_layers],
    }.get(training.gradient_checkpointing)
    if again is None:
        again = [min(training.gradient_checkpointing, n_layers)]
    offloads = training.offload_activations
    return [
        Setup(n_rows_at_once, n_again, away)
        for n_rows_at_once in (divisors if rows == "auto" else [rows])
        for n_again in again
        for away in ((False, True) if offloads == "auto" else (offloads,))
        # What is not checkpointed is not offloaded; `auto` offloads where all layers are.
        if not away or (n_again and (offloads != "auto" or n_again == n_layers))
    ]


@dataclass(frozen=True)
class Candidate:
    """A layout, what it takes, and how long it takes."""

    setup: Setup
    parts: dict[str, int]
    flops_per_token: float

    @property
    def peak(self) -> int:
        return self.parts["peak"]


def candidates(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    n_gpus: int,
    device_type: DeviceType,
    evaluation_tokens: int | None = None,
) -> list[Candidate]:
    """All that `setups` lists, predicted."""
    shape = shape_of(facts, recipe, training, device_type=device_type)
    found = []
    for setup in setups(facts, recipe, training, n_gpus=n_gpus):
        n_tokens = setup.rows_per_micro_batch * row_tokens
        parts = predict_shape(
            shape,
            n_tokens=n_tokens,
            setup=setup,
            n_gpus=n_gpus,
            parallelism=training.parallelism,
            evaluation_tokens=_evaluation_tokens(facts, recipe, row_tokens, evaluation_tokens),
        )
        time = flops_per_token(shape, n_tokens=n_tokens, setup=setup)
        found.append(Candidate(setup, parts, time))
    return found


def fastest(found: Iterable[Candidate], limit: float) -> Candidate | None:
    """The fastest that takes no more than `limit` bytes; of equally fast ones the smallest."""
    fitting = [candidate for candidate in found if candidate.peak <= limit]
    if any(not candidate.setup.offloads_activations for candidate in fitting):
        fitting = [one for one in fitting if not one.setup.offloads_activations]
    if not fitting:
        return None
    bound = min(one.flops_per_token for one in fitting) * (1 + EQUAL_SPEED)
    equal = [one for one in fitting if one.flops_per_token <= bound]
    return min(equal, key=lambda one: (one.peak, one.flops_per_token))


def usable_bytes(training: TrainingSettings, available: int) -> float:
    """What the planner counts on: `training.memory_gb` or what is available, less the margin."""
    total = available if training.memory_gb is None else training.memory_gb * 1e9
    return total * (1 - MARGIN)


def choose(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    n_gpus: int,
    available_bytes: int,
    device_type: DeviceType,
    n_steps_down: int = 0,
    evaluation_tokens: int | None = None,
) -> tuple[Setup, dict[str, int]]:
    """The fastest layout that fits, what is `auto` filled in, and its bytes by part.

    Args:
        available_bytes: of one GPU; `training.memory_gb` goes before it.
        n_steps_down: how often a run met an out-of-memory: each time a layout that takes clearly
            less.
        evaluation_tokens: as in `predict`.
    Raises:
        StageError: none fits; with the nearest settings that do, or the table.
    """
    options: dict[str, Any] = {
        "row_tokens": row_tokens,
        "n_gpus": n_gpus,
        "device_type": device_type,
        "evaluation_tokens": evaluation_tokens,
    }
    found = candidates(facts, recipe, training, **options)
    limit = usable_bytes(training, available_bytes)
    chosen = fastest(found, limit)
    for _ in range(n_steps_down):
        if chosen is None:
            break
        limit = STEP_DOWN * chosen.peak
        smallest = min(found, key=lambda one: one.peak)
        if limit < smallest.peak < chosen.peak:
            limit = smallest.peak  # less than asked for, but less
        chosen = fastest(found, limit)
    if chosen is None:
        raise _no_fit(facts, recipe, training, found=found, limit=limit, options=options)
    return chosen.setup, chosen.parts


def _no_fit(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    found: list[Candidate],
    limit: float,
    options: dict[str, Any],
) -> StageError:
    """Why nothing fits, and the changes of the settings that would make it fit."""
    least = min(found, key=lambda one: one.peak)
    return StageError(
        "training does not fit into the memory",
        where="training, recipes.<name>, packings.<name>.row_tokens",
        found=f"at least {gigabytes(least.peak)} ({_largest(least.parts)})",
        expected=f"at most {gigabytes(limit)}, {MARGIN:.0%} of the memory being left free",
        to_fix="\n".join(
            [
                _advice(facts, recipe, training, found=found, limit=limit, options=options),
                *_rows_of_table(found, chosen=None, limit=limit),
            ]
        ),
    )


def _advice(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    found: list[Candidate],
    limit: float,
    options: dict[str, Any],
) -> str:
    changes = remedies(facts, recipe, training, limit=limit, options=options)
    if changes:
        return "one of: " + "; ".join(changes)
    least = min(one.peak for one in found)
    return f"a GPU with {gigabytes(least / (1 - MARGIN))} free, or a smaller model"


def refusal(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    n_gpus: int,
    n_steps_down: int,
    error: str,
) -> StageError:
    """What to say when memory ran out while training: what was planned, and what takes less.

    Args:
        row_tokens: as in `predict`, as is `n_gpus`.
        n_steps_down: as in `choose`, of the layout that ran out.
        error: the allocator's message.
    """
    options: dict[str, Any] = {
        "row_tokens": row_tokens,
        "n_gpus": n_gpus,
        "device_type": _device_type(),
    }
    total = _total_bytes()
    found = candidates(facts, recipe, training, **options)
    try:
        setup, parts = choose(
            facts, recipe, training, available_bytes=total, n_steps_down=n_steps_down, **options
        )
    except StageError:  # what ran out was planned for more than there is now
        setup, parts = None, min(found, key=lambda one: one.peak).parts
    limit = STEP_DOWN * parts["peak"]
    return StageError(
        "the memory ran out",
        where="training",
        found=f"{error}; predicted were {gigabytes(parts['peak'])} ({_largest(parts)})",
        expected=f"a layout that fits beside whatever else uses the {gigabytes(total)}",
        to_fix="\n".join(
            [
                _advice(facts, recipe, training, found=found, limit=limit, options=options)
                if min(one.peak for one in found) > limit
                else f"training.memory_gb: {limit / 1e9:.3g}, and leave the rest `auto`",
                *_rows_of_table(found, chosen=setup, limit=usable_bytes(training, total)),
            ]
        ),
    )


def _device_type() -> DeviceType:
    from workflow_scripts.models.checkpoint import default_device

    return "cuda" if default_device().type == "cuda" else "cpu"


def _total_bytes() -> int:
    """Of this process's GPU, else of the machine, used or not."""
    import os

    if _device_type() == "cuda":
        import torch

        from workflow_scripts.models.checkpoint import default_device

        return torch.cuda.mem_get_info(default_device())[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def remedies(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    limit: float,
    options: dict[str, Any],
) -> list[str]:
    """Changes of the settings after which a layout is predicted to fit: the ones that change
    nothing learned first. Single ones; all that spare memory together where none is enough.

    Args:
        options: of `candidates`.
    """

    def fits(recipe: RecipeSettings, training: TrainingSettings, **changed: Any) -> bool:
        found = candidates(facts, recipe, training, **options | changed)
        return min(one.peak for one in found) <= limit

    def with_training(**changed: Any) -> TrainingSettings:
        return training.model_copy(update=changed)

    def with_recipe(**changed: Any) -> RecipeSettings:
        return recipe.model_copy(update=changed)

    found = []
    frugal: dict[str, Any] = {}
    for key, value, text in (
        ("rows_per_micro_batch", 1, "training.rows_per_micro_batch: 1"),
        ("gradient_checkpointing", "full", "training.gradient_checkpointing: full"),
        ("offload_activations", True, "training.offload_activations: true"),
        ("parallelism", "fsdp2", "training.parallelism: fsdp2"),
    ):
        if getattr(training, key) in ("auto", value):
            continue
        if key == "parallelism" and options["n_gpus"] == 1:
            continue
        changed = {key: value}
        if key == "offload_activations":
            changed["gradient_checkpointing"] = "full"
            text += " with gradient_checkpointing: full"
        frugal |= changed
        if fits(recipe, with_training(**changed)):
            found.append(text)
    if not found and len(frugal) > 1 and fits(recipe, with_training(**frugal)):
        found.append("training: " + ", ".join(f"{key}: {value}" for key, value in frugal.items()))
    if found:
        return found
    smallest = with_training(**frugal)
    lesser: dict[str, Any] = {}
    if recipe.method in ("lora", "lora_int8", "full"):
        lesser["method"] = "qlora"
        if fits(with_recipe(method="qlora"), training):
            found.append("recipes.<name>.method: qlora")
    if recipe.optimizer == "adamw":
        lesser["optimizer"] = "adamw_8bit"
        if fits(with_recipe(optimizer="adamw_8bit"), smallest):
            found.append("recipes.<name>.optimizer: adamw_8bit")
    if recipe.method != "full":
        rank = recipe.rank // 2
        while rank >= 4 and not _rank_fits(recipe, facts, rank, fits, smallest):
            rank //= 2
        if rank >= 4:
            found.append(f"recipes.<name>.rank: {rank}")
    tokens = _longest_row(options["row_tokens"], lambda n: fits(recipe, smallest, row_tokens=n))
    if tokens:
        found.append(f"packings.<name>.row_tokens: {tokens}")
    if not found and lesser:
        together = with_recipe(**lesser)
        tokens = _longest_row(
            options["row_tokens"], lambda n: fits(together, smallest, row_tokens=n)
        )
        if tokens:
            found.append(
                ", ".join(f"recipes.<name>.{key}: {value}" for key, value in lesser.items())
                + f", packings.<name>.row_tokens: {tokens}"
            )
    if found and frugal and smallest is not training:
        held = ", ".join(f"{key}: {value}" for key, value in frugal.items())
        found = [f"{text} (with training: {held})" for text in found]
    return found


def _rank_fits(
    recipe: RecipeSettings, facts: Facts, rank: int, fits: Any, training: TrainingSettings
) -> bool:
    smaller = recipe.model_copy(update={"rank": rank})
    try:
        kv_rank(smaller, n_heads=facts["n_heads"], n_kv_heads=facts["n_kv_heads"])
    except StageError:  # `matched` has no whole number there
        return False
    return fits(smaller, training)


def _longest_row(row_tokens: int, fits: Any) -> int | None:
    """Most tokens a row, in steps, below `row_tokens`; None where not even one step fits."""
    low, high = 0, (row_tokens - 1) // ROW_STEP_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * ROW_STEP_TOKENS) else (low, middle - 1)
    return low * ROW_STEP_TOKENS or None


def available_bytes() -> int:
    """Memory that is free now: of this process's GPU, else of the machine."""
    import torch

    from workflow_scripts.models.checkpoint import default_device

    device = default_device()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available_ram()


def _available_ram() -> int:
    """What Linux could give without swapping, less where a control group allows less."""
    from pathlib import Path

    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group of version 2
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - used))


def gigabytes(n_bytes: float) -> str:
    """`12.3 GB`, of 10⁹ bytes as `training.memory_gb`."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes < 1e10 else f"{n_bytes / 1e9:.1f} GB"


def _largest(parts: Mapping[str, int]) -> str:
    """The three largest parts in words."""
    largest = sorted(PARTS, key=lambda name: -parts[name])[:3]
    return ", ".join(f"{name.replace('_', ' ')} {gigabytes(parts[name])}" for name in largest)


def table(
    facts: Facts,
    recipe: RecipeSettings,
    training: TrainingSettings,
    *,
    row_tokens: int,
    n_gpus: int,
    available_bytes: int,
    device_type: DeviceType,
    chosen: Setup | None = None,
    evaluation_tokens: int | None = None,
) -> str:
    """What is printed: layouts with their parts in GB, which fit, which is chosen.

    Args:
        chosen: of `choose`; None where none fits.
    """
    found = candidates(
        facts, recipe, training, row_tokens=row_tokens, n_gpus=n_gpus, device_type=device_type,
        evaluation_tokens=evaluation_tokens,
    )  # fmt: skip
    limit = usable_bytes(training, available_bytes)
    title = (
        f"memory of training, GB: rows of {row_tokens} tokens, {n_gpus} GPU(s), at most"
        f" {limit / 1e9:.2f} to be used"
    )
    return "\n".join([title, *_rows_of_table(found, chosen=chosen, limit=limit)])


def _rows_of_table(found: list[Candidate], *, chosen: Setup | None, limit: float) -> list[str]:
    """A line a layout; of the many numbers of checkpointed layers those that tell something."""
    n_layers = max(one.setup.n_checkpointed_layers for one in found)
    telling = {0, n_layers // 4, n_layers // 2, 3 * n_layers // 4, n_layers}
    shown = [
        one
        for one in found
        if one.setup == chosen or one.setup.n_checkpointed_layers in telling or len(found) < 12
    ]
    heads = ["rows", "again", "away", *(name.split("_")[0] for name in PARTS), "peak", "time", ""]
    best = min(one.flops_per_token for one in found)
    lines = [heads]
    for one in sorted(shown, key=lambda one: -one.peak):
        verdict = "chosen" if one.setup == chosen else "fits" if one.peak <= limit else "too large"
        lines.append(
            [
                str(one.setup.rows_per_micro_batch),
                str(one.setup.n_checkpointed_layers),
                "yes" if one.setup.offloads_activations else "no",
                *(f"{one.parts[name] / 1e9:.2f}" for name in PARTS),
                f"{one.peak / 1e9:.2f}",
                f"{one.flops_per_token / best:.2f}",
                verdict,
            ]
        )
    widths = [max(len(line[at]) for line in lines) for at in range(len(heads))]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]


def as_json(candidate: Candidate) -> dict[str, Any]:
    """A candidate as it is written."""
    return dataclasses.asdict(candidate.setup) | {
        "parts_bytes": candidate.parts,
        "flops_per_token": candidate.flops_per_token,
    }
