"""One way to train on documents, once, in a process of its own: speed, memory, arithmetic, loss.

Of the product's own plan, sampler, collator, model and trainer: `none`, `concatenate` and
`best_fit`; `best_fit_transformers`, which differs from `best_fit` in attention alone; `tramontane`,
`best_fit` with as few layers checkpointed as memory asks for, `tramontane_checkpointed`, all of
them, `tramontane_offloaded`, all of them and their inputs in the CPU's memory. Of others:
`trl` with its own packing, `trl_our_attention`, `transformers_peft` with padded batches, `unsloth`.

A contestant that cannot run writes why: `failed`.

python -m tests.benchmarks.training_contestants --contestant best_fit --shape demo
    --documents documents.arrow --row-tokens 4096 --rows 2 --scratch scratch/ --measured run.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks import peer_trainers
from tests.benchmarks.model_shapes import CONFIGS, shape_of
from tests.benchmarks.peer_trainers import Work
from tests.benchmarks.training_meter import Meter
from tests.training import identity_of
from workflow_scripts import files, log
from workflow_scripts.packing.cost import CostModel
from workflow_scripts.settings import PackingSettings, RecipeSettings, TrainingSettings
from workflow_scripts.tokens.documents import Documents


class Ours(NamedTuple):
    """How the product is set up."""

    strategy: str = "best_fit"
    attention: str | None = None
    """transformers' name; None is ours."""
    checkpoints: str | None = None
    """`training.gradient_checkpointing`; None is as for the others."""
    offloads: bool = False


class Peer(NamedTuple):
    """Somebody else's trainer."""

    make: Callable[[Work], Any]
    lengths: Callable[[Any], list[int]]
    """Of the documents in what its collator is given."""
    attention: str | None = None
    """None is the fastest of transformers' own."""
    pads: bool = False


OURS = {
    "none": Ours("none"),
    "concatenate": Ours("concatenate"),
    "best_fit": Ours(),
    "best_fit_transformers": Ours(attention="sdpa"),
    "tramontane": Ours(checkpoints="auto"),
    "tramontane_checkpointed": Ours(checkpoints="full"),
    "tramontane_offloaded": Ours(checkpoints="full", offloads=True),
}
PEERS = {
    "trl": Peer(peer_trainers.trl_trainer, peer_trainers.packed_lengths),
    "trl_our_attention": Peer(
        peer_trainers.trl_trainer, peer_trainers.packed_lengths, attention="tramontane_packed"
    ),
    "transformers_peft": Peer(
        peer_trainers.transformers_peft_trainer, peer_trainers.document_lengths, pads=True
    ),
    "unsloth": Peer(peer_trainers.unsloth_trainer, peer_trainers.packed_lengths),
}
CONTESTANTS = (*OURS, *PEERS)
OUT_OF_MEMORY = "out of memory"
SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=log.HelpFormatter)
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--shape", choices=CONFIGS, required=True)
    parser.add_argument("--documents", type=Path, required=True, help="as render_chats writes them")
    parser.add_argument("--row-tokens", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of a micro-batch, one a step")
    parser.add_argument("--documents-per-batch", type=int, default=1, help="of a padded batch")
    parser.add_argument("--batches-per-step", type=int, default=1, help="padded ones")
    parser.add_argument("--peer-attention", help="default: the fastest that is installed")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="of every layer")
    parser.add_argument("--most-steps", type=int, help="default: an epoch")
    parser.add_argument("--most-seconds", type=float, help="of measured steps; default: no limit")
    parser.add_argument("--warm-up-steps", type=int, default=2, help="not measured")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the trainer")
    parser.add_argument("--measured", type=Path, required=True, help="to write: JSON")
    arguments = parser.parse_args(argv)

    missing = peer_trainers.missing_package(arguments.contestant)
    if arguments.contestant == "unsloth" and not missing:
        import unsloth  # noqa: F401  # it patches what is imported after it

    import torch

    measured: dict[str, Any]
    try:
        measured = {"failed": missing} if missing else train(arguments)
    except torch.OutOfMemoryError as error:
        measured = {"failed": f"{OUT_OF_MEMORY}: {str(error).partition('. ')[0]}"}
    cuda = torch.cuda.is_available()
    files.write_json(
        arguments.measured,
        {"device": torch.cuda.get_device_name() if cuda else "cpu", **measured},
    )


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contestant's trainer, from its first step to its last."""
    name, config = arguments.contestant, CONFIGS[arguments.shape]
    documents = Documents(arguments.documents)
    recipe = RecipeSettings(
        rank=32,
        alpha=64,
        schedule="constant",
        warmup_fraction=0.0,
        rows_per_step=arguments.rows,
        max_steps=arguments.most_steps,
        evaluations=0,
        keeps_best=False,
        seed=SEED,
    )
    meter = Meter(
        cost=CostModel.of(shape_of(config)),
        n_warm_up=arguments.warm_up_steps,
        most_seconds=arguments.most_seconds,
    )
    if name in OURS:
        trainer, n_checkpointed = our_trainer(
            OURS[name],
            config,
            recipe,
            documents,
            row_tokens=arguments.row_tokens,
            checkpoints="full" if arguments.gradient_checkpointing else "off",
            scratch=arguments.scratch,
        )
        meter.watch(trainer, lengths=lambda rows: [piece.length for row in rows for piece in row])
    else:
        peer = PEERS[name]
        trainer = peer.make(
            Work(
                config=config,
                recipe=recipe,
                documents=documents,
                row_tokens=arguments.row_tokens,
                rows_per_micro_batch=arguments.rows,
                documents_per_batch=arguments.documents_per_batch,
                batches_per_step=arguments.batches_per_step,
                gradient_checkpointing=arguments.gradient_checkpointing,
                attention=peer_attention(peer, arguments.peer_attention),
                scratch=arguments.scratch,
            )
        )
        if peer.pads:
            meter.micro_batches_per_step = arguments.batches_per_step
        n_checkpointed = config["num_hidden_layers"] * arguments.gradient_checkpointing
        meter.watch(trainer, lengths=peer.lengths)
    trainer.train()
    return meter.measured(trainer, n_checkpointed_layers=n_checkpointed)


def our_trainer(
    ours: Ours,
    config: dict[str, Any],
    recipe: RecipeSettings,
    documents: Documents,
    *,
    row_tokens: int,
    checkpoints: str,
    scratch: Path,
) -> tuple[Any, int]:
    """The product's trainer over the product's plan, all rows of a step in one micro-batch.

    Args:
        checkpoints: `training.gradient_checkpointing`, where `ours` has none of its own.
    Returns:
        It, and how many layers it checkpoints.
    """
    from tests.benchmarks.random_models import random_base
    from workflow_scripts.packing.pack_sequences import make_plan
    from workflow_scripts.train import attention
    from workflow_scripts.train.activations import save_less
    from workflow_scripts.train.checkpoints import Checkpoints
    from workflow_scripts.train.job import Job
    from workflow_scripts.train.kernels import liger_runs, use_liger
    from workflow_scripts.train.model import adapt
    from workflow_scripts.train.trainer import make_trainer

    facts = shape_of(config)
    packing = PackingSettings(strategy=ours.strategy, row_tokens=row_tokens, seed=SEED)
    # No document is longer than a row, so none is split and no tokenizer read.
    plan, _ = make_plan(documents, facts, packing, Path())
    job = Job(
        recipe=recipe,
        training=TrainingSettings(
            rows_per_micro_batch=recipe.rows_per_step,
            gradient_checkpointing=ours.checkpoints or checkpoints,
            offload_activations=ours.offloads,
            checkpoint_steps=1_000_000,
            trackers=[],
        ),
        facts=facts,
        plan=plan,
        train=documents,
        validation=documents,  # asked for by none
        identity=identity_of(recipe=recipe),
    )
    base = random_base(config, attention=ours.attention or attention.register(), seed=recipe.seed)
    if liger_runs(job.training.kernels):
        use_liger(base)
    model = adapt(base, facts, recipe)
    n_checkpointed = checkpointed_layers(job)
    save_less(model, n_checkpointed_layers=n_checkpointed, offloads=ours.offloads)
    trainer = make_trainer(
        model,
        job,
        Checkpoints(scratch, job.identity),
        rows_per_micro_batch=recipe.rows_per_step,
    )
    return trainer, n_checkpointed


def checkpointed_layers(job: Any) -> int:
    """As the product would have it with its base already on the GPU; on a CPU `auto` is none."""
    from workflow_scripts.models.checkpoint import default_device

    wanted = job.training.gradient_checkpointing
    if wanted != "auto" or default_device().type == "cpu":
        return job.facts.n_layers if wanted == "full" else 0
    import torch

    from workflow_scripts.train.memory import device, fit
    from workflow_scripts.train.memory.layouts import Layouts

    chosen = fit.choose(
        Layouts.of(job.planned_run(n_gpus=1)),
        available_bytes=device.available_bytes() + torch.cuda.memory_reserved(),
    )
    return chosen.n_checkpointed_layers


def peer_attention(peer: Peer, wanted: str | None) -> str:
    if peer.attention is None:
        return wanted or peer_trainers.best_attention()
    from workflow_scripts.train import attention

    attention.register()
    return peer.attention


if __name__ == "__main__":
    raise SystemExit(log.run_stage(main))
